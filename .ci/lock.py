"""Write requirements.txt of a folder of wheels: each with its version and SHA-256, for pip --require-hashes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from packaging.utils import parse_wheel_filename

folder = Path(sys.argv[1])
lines = []
for wheel in sorted(folder.glob("*.whl")):
    name, version, _, _ = parse_wheel_filename(wheel.name)
    lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
(folder / "requirements.txt").write_text("".join(lines))
size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
print(f"{folder}/requirements.txt: {len(lines)} wheels, {size / 1e6:.0f} MB")
