"""Where freed memory goes: measured in processes of their own, with the allocator as it is and as it is told to be."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

RESIDENT = """
import sys
from pathlib import Path
from medfl.shared.memory import *

def resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
"""

UPLOADS = """
if sys.argv[1] == "told":
    assert give_back_large_buffers()
bytes(bytearray(20 << 20))  # what a first upload teaches the allocator
before = resident()
pieces = [bytes([n]) * (5 << 20) for n in range(40)]  # 200 MiB
del pieces[:-1]  # the last one lies above the others in the same heap, and stays
print(resident() - before)
"""

STEPS = """
if sys.argv[1] != "untold":
    assert keep_freed_buffers()
before = resident()
pieces = [bytes([n]) * (5 << 20) for n in range(40)]  # 200 MiB
del pieces
if sys.argv[1] == "told and given back":
    give_back_freed_buffers()
print(resident() - before)
"""


def kept(script: str, how: str) -> float:
    """MiB that stay with the process."""
    command = [sys.executable, "-c", RESIDENT + script, how]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_pieces_of_an_upload_leave_the_process_once_it_is_told() -> None:
    assert kept(UPLOADS, "told") < 20
    assert kept(UPLOADS, "untold") > 100  # or this test shows nothing


def test_what_a_training_step_frees_stays_for_the_next_until_it_is_given_back() -> None:
    assert kept(STEPS, "told") > 150
    assert kept(STEPS, "untold") < 100  # or this test shows nothing
    assert kept(STEPS, "told and given back") < 20
