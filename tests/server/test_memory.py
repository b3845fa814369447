"""Freed uploads leave the process: measured in one of its own, with the allocator as it is and as it is told to be."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

KEPT_MIB = """
import sys
from pathlib import Path
from medfl.server.memory import give_back_large_buffers

def resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

if sys.argv[1] == "told":
    assert give_back_large_buffers()
bytes(bytearray(20 << 20))  # what a first upload teaches the allocator
before = resident()
pieces = [bytes([n]) * (5 << 20) for n in range(40)]  # 200 MiB
del pieces[:-1]  # the last one lies above the others in the same heap, and stays
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_pieces_of_an_upload_leave_the_process_once_it_is_told() -> None:
    def kept(how: str) -> float:
        command = [sys.executable, "-c", KEPT_MIB, how]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert kept("told") < 20
    assert kept("untold") > 100  # or this test shows nothing
