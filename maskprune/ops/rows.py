"""What the elementwise operations share: tensors as rows of raw memory, dtypes, the extension."""

from __future__ import annotations

from types import ModuleType

import torch

from maskprune.ops.backend import choose, extension

# What the compiled and Triton backends read and store; inside they compute in float32.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x (..., width) -> (T, width) whose rows are contiguous; copies only where it must.

    Half of a fused projection (`chunk`) keeps its memory: rows may lie any distance apart.
    """
    rows = x.reshape(x.numel() // width if width else 0, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()


def choose_floats(op: str, backend: str, x: torch.Tensor) -> str:
    """`choose`, with dtypes that only the reference computes left to it.

    Raises:
        TypeError: an explicit backend that does not take x's dtype.
    """
    chosen = choose(op, backend, x)
    if x.dtype in DTYPES or chosen == "reference":
        return chosen
    if backend == "auto":
        return "reference"
    raise TypeError(
        f"{op}: backend {backend!r} takes {', '.join(DTYPES.values())}; these are {x.dtype}; "
        "use backend='reference'"
    )


def compiled(op: str, x: torch.Tensor) -> ModuleType:
    """The extension, for tensors that it serves; else raises as `choose_floats` does."""
    choose_floats(op, "cpp", x)
    module = extension()
    assert module is not None
    return module
