"""How much memory a call, or a phase of a run, holds at its peak."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def status_kib(field: str) -> int:
    """A figure of this process in KiB, as /proc/self/status has it: VmRSS, VmHWM.

    Raises OSError or KeyError where there is none.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def restart_peak() -> None:
    """Reset VmHWM, the peak of the resident set, to the present size."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """Memory one call adds at its peak, in MiB: CUDA's allocator, or the resident set on Linux.

    None where neither can be read. On a CPU the allocator's unused memory is first returned to the
    system, where the C library can do that; else a call that reuses it seems to add less.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        restart_peak()
        before = status_kib("VmRSS")
        call()
        return max(0.0, (status_kib("VmHWM") - before) / 2**10)
    except (OSError, KeyError):
        return None
