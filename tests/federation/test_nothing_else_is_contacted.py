"""Nothing but the coordinator is contacted: by watching every lookup, and where there is nothing else to reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

EXCHANGE = """
import socket, sys
calls = []
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = args[1] if event != "socket.getaddrinfo" else args[:2]
        if isinstance(address, tuple):
            calls.append((event, str(address[0]), address[1]))
sys.addaudithook(watch)
from contextlib import ExitStack
from pathlib import Path
from federation import *
from certified import create_consortium
folder = Path(sys.argv[1])
consortium = create_consortium(folder / "c", sites=["north"], hosts=["127.0.0.1"])
with ExitStack() as stack:
    lab = Lab(folder, consortium, stack)
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest="d" * 64) as run:
        replies = run.grid.send_and_receive([question(i) for i in ids.values()], timeout=60)
        assert [text_of(reply) for reply in replies] == ["hello"]
        port = link.port
others = {call for call in calls if call[1:] != ("127.0.0.1", port)}
assert calls, "the audit hook saw nothing"
assert not others, others
print("only the coordinator")
"""


def run(prefix: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The exchange in a process of its own, with a home folder of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "HTTPS_PROXY", "https_proxy"))}
    environment |= {"PYTHONPATH": str(SUPPORT), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, "-c", EXCHANGE, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_no_other_host_is_looked_up_or_dialled(tmp_path: Path) -> None:
    done = run([], tmp_path)
    assert done.stdout == "only the coordinator\n", done.stderr


@pytest.mark.network
def test_an_exchange_works_in_a_namespace_that_has_only_loopback(tmp_path: Path) -> None:
    namespace = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("unshare -rn or ip is not permitted or not installed here")
    done = run(namespace, tmp_path)
    assert done.stdout == "only the coordinator\n", done.stderr
    assert not list((tmp_path / "home").rglob("*")), "something was written to the home folder"
