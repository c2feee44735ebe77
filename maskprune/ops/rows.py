"""Tensors as rows of memory, for the compiled and Triton backends."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x (..., width) -> (T, width) whose rows are contiguous; copies only where it must.

    Half of a fused projection (`chunk`) keeps its memory: rows may lie any distance apart.
    """
    rows = x.reshape(x.numel() // width if width else 0, width)
    return rows if rows.stride(-1) == 1 or width == 1 else rows.contiguous()
