"""Which implementation of an operation runs: `auto`, `reference`, `cpp` or `triton`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch.compiler import is_dynamo_compiling

BACKENDS = ("auto", "reference", "cpp", "triton")
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
BUILD_COMMAND = "MASKPRUNE_REQUIRE_EXT=1 pip install --force-reinstall --no-deps ."


# Kept, found or not: the import system is slow to ask at every call of a small operation.
@functools.cache
def extension() -> ModuleType | None:
    """The compiled module `maskprune._C`, or None where it was not built."""
    try:
        return importlib.import_module("maskprune._C")
    except ImportError:
        return None


def eager(*tensors: torch.Tensor) -> bool:
    """Whether an operation without gradients may run at once, without torch's dispatcher.

    It may not in torch.compile, nor on fake tensors (export) and other subclasses: they must
    meet the registered operation. A TorchDispatchMode over plain tensors does not see it.
    """
    return not is_dynamo_compiling() and PLAIN.issuperset(map(type, tensors))


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
    if backend == "auto":
        if tensor.is_cpu:
            return "cpp" if extension() else "reference"
        preferred = "triton" if tensor.is_cuda else "reference"
        return "reference" if unavailable(preferred, tensor.device) else preferred
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if reason := unavailable(backend, tensor.device):
        raise RuntimeError(f"{op}: {reason}")
    return backend
