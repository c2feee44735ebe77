"""Which implementation of an operation runs, and what Python hands to the compiled one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Container
from enum import StrEnum
from types import ModuleType

import torch
from torch.compiler import is_dynamo_compiling


class Backend(StrEnum):
    """The implementations of an operation; its argument `backend` takes one of these, or "auto"."""

    REFERENCE = "reference"
    CPP = "cpp"
    TRITON = "triton"


BACKENDS = ("auto", *Backend)
# The dtypes of operations that compute in float32, whatever they read and store.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The codes of `Dtype` in csrc/dtypes.hpp; BYTES is any dtype that is only copied.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
BYTES = -1
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
BUILD_COMMAND = "MASKPRUNE_REQUIRE_EXT=1 pip install --force-reinstall --no-deps ."


# Cached, found or not: a failed import costs more than a small operation.
@functools.cache
def extension() -> ModuleType | None:
    """The compiled module `maskprune._C`, or None where it was not built."""
    try:
        return importlib.import_module("maskprune._C")
    except ImportError:
        return None


def compiled() -> ModuleType:
    """`extension()`, for callers to whom `choose` has given the C++ backend."""
    module = extension()
    assert module is not None
    return module


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


def choose(
    op: str,
    backend: str,
    tensor: torch.Tensor,
    *,
    dtypes: Container[torch.dtype] | None = None,
    triton: bool = True,
) -> Backend:
    """The backend that runs `op` on `tensor`.

    "auto" is Triton for CUDA tensors, C++ for CPU tensors, and the reference where that one is
    not available or does not take the tensor. An explicit choice is honoured or raises; it never
    falls back.

    Args:
        dtypes: what C++ and Triton take; None: whatever the operation itself takes.
        triton: whether the operation has a Triton backend.

    Raises:
        ValueError: `backend` is none of `auto`, `reference`, `cpp`, `triton`.
        TypeError: an explicit backend that does not take the tensor's dtype.
        RuntimeError: an explicit backend that is not available for this tensor.
    """
    fits = dtypes is None or tensor.dtype in dtypes
    if backend == "auto":
        fast = Backend.CPP if tensor.is_cpu else Backend.TRITON if tensor.is_cuda else None
        if not fast or not fits or (fast == Backend.TRITON and not triton):
            return Backend.REFERENCE
        return Backend.REFERENCE if unavailable(fast, tensor.device) else fast
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == Backend.TRITON and not triton:
        raise RuntimeError(f"{op}: there is no Triton backend; use 'auto', 'reference' or 'cpp'")
    if reason := unavailable(backend, tensor.device):
        raise RuntimeError(f"{op}: {reason}")
    if backend != Backend.REFERENCE and not fits:
        raise TypeError(
            f"{op}: backend {backend!r} does not take {tensor.dtype}; use backend='reference'"
        )
    return Backend(backend)
