"""Freed host memory goes back to the system, so that a run needs little more than it holds."""

from __future__ import annotations

import contextlib
import ctypes
import os

_M_MMAP_THRESHOLD = -3
# glibc maps each larger block by itself and returns it as soon as it is freed. By default it raises
# that limit to 32 MiB after the first large tensors, and then keeps what ranking and proof freed on
# a fragmented heap. A lower limit makes training slow: it takes new pages for every activation.
THRESHOLD = 2**22
USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def return_freed_memory() -> None:
    """Let glibc return every freed tensor of 4 MiB or more; only for programs: it cannot be undone.

    Does nothing with another C library, or where the environment chooses an allocator.
    """
    if any(name in os.environ for name in USERS_OWN):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD)
