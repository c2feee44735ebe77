"""Which implementation of an operation runs: `auto`, `reference`, `cpp` or `triton`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "cpp", "triton")
BUILD_COMMAND = "MASKPRUNE_REQUIRE_EXT=1 pip install --force-reinstall --no-deps ."


def extension() -> ModuleType | None:
    """The compiled module `maskprune._C`, or None where it was not built."""
    try:
        return importlib.import_module("maskprune._C")
    except ImportError:
        return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot serve tensors on `device`, with what to do; None if it can."""
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ backend serves CPU tensors, not {device}; use backend='triton'"
        if extension() is None:
            return f"the C++ extension is not built; build it with: {BUILD_COMMAND}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; install it with: pip install triton"
        if device.type != "cuda" and not interpreted():
            return (
                f"the Triton backend serves CUDA tensors, these are on {device}; "
                "set TRITON_INTERPRET=1 before importing maskprune to interpret it on the CPU"
            )
    return None


def choose(op: str, backend: str, tensor: torch.Tensor) -> str:
    """The backend that runs `op` on `tensor`.

    `auto` is Triton for CUDA tensors, C++ for CPU tensors, and the reference where that one is
    not available. An explicit choice is honoured or raises; it never falls back.

    Raises:
        ValueError: `backend` is none of `auto`, `reference`, `cpp`, `triton`.
        RuntimeError: an explicit backend that cannot serve this tensor.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        preferred = {"cuda": "triton", "cpu": "cpp"}.get(tensor.device.type, "reference")
        return "reference" if unavailable(preferred, tensor.device) else preferred
    if reason := unavailable(backend, tensor.device):
        raise RuntimeError(f"{op}: {reason}")
    return backend
