"""Makes ``secagg_world`` importable in the tests of secure aggregation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "secagg"))
