"""Time of one stage and of one exchange of a 30 MB model: three site processes, TLS on loopback.

A stage is a query with a trivial reply; an exchange sends the model to all sites and gets one of that size from each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

# isort: split
import numpy as np
from certified import create_consortium
from federation import Lab, question, until
from flwr.app import Array, ArrayRecord, Message, RecordDict

STAGES, EXCHANGES, SITES = 40, 7, ("north", "south", "west")
SITE_PROCESS = Path(__file__).parents[1] / "support" / "site_process.py"


def main() -> None:
    """Print one line per measurement: median, best and worst, in seconds, beside the target."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        consortium = create_consortium(folder / "consortium", sites=SITES, hosts=["127.0.0.1"])
        link = Lab(folder, consortium, stack).link()
        ids = link.enrol({site: files.node_public_key.read_text() for site, files in consortium.sites.items()})
        for site in SITES:
            command = [sys.executable, SITE_PROCESS, folder / "consortium", site, str(link.port), folder / site]
            process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
            stack.callback(process.wait)
            stack.callback(process.terminate)
        until(lambda: link.online() == set(ids.values()), 60)
        with link.run(None, name="benchmark", digest="0" * 64) as run:

            def exchange(messages: list[Message]) -> float:
                started = time.perf_counter()
                replies = run.grid.send_and_receive(messages, timeout=60)
                assert len(replies) == len(SITES)
                assert all(reply.has_content() for reply in replies)
                return time.perf_counter() - started

            stages = [exchange([question(i) for i in ids.values()]) for _ in range(STAGES)]
            report("one stage, trivial reply, 3 sites", stages, target_s=0.3)
            weights = np.random.default_rng(0).normal(size=7_500_000).astype("f4")
            rounds = []
            for number in range(EXCHANGES):
                content = RecordDict({"arrays": ArrayRecord({"float32": Array(weights + number)})})
                rounds.append(exchange([Message(content, i, "train") for i in ids.values()]))
            report("30 MB down and up, 3 sites", rounds, target_s=2.0)


def report(what: str, seconds: list[float], *, target_s: float) -> None:
    """One line."""
    middle, best, worst = median(seconds), min(seconds), max(seconds)
    print(f"{what:<36} median {middle:6.3f} s  best {best:6.3f}  worst {worst:6.3f}  (target {target_s} s)")


if __name__ == "__main__":
    main()
