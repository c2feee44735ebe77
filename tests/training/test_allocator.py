"""Freed memory returns to the system, though blocks allocated beside it are still in use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from maskprune.training.allocator import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "yes":
    return_freed_memory()
large = bytearray(24 * 2**20)  # after which glibc keeps blocks of up to that size on its heap
del large
parts = [bytearray(2**22) for _ in range(32)]
before = resident()
del parts[::2]
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or sys.platform != "linux", reason="glibc only")
def test_memory_freed_between_blocks_in_use_returns_to_the_system():
    if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("glibc only")
    names = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    env = {k: v for k, v in os.environ.items() if k not in names}

    def returned(asked: str, **more: str) -> float:
        command = [sys.executable, "-c", SCRIPT, asked]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert returned("yes") == pytest.approx(64, abs=2)
    assert returned("no") < 8
    assert returned("yes", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=33554432") < 8
