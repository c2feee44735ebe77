"""Fold a mask into the kept columns of a weight, and take its kept rows.

Letters: O rows, I columns, K kept. Fold of MaskPrune (arXiv 2502.14008, section 3.2) with the mask
in W_O and W_down, whose columns are the pruned units: exact for the printed forward.

Rounding, the same on every backend, bit for bit: the product is taken in float32 (float64 for
float64 weights) and rounded once to the weight's dtype, to nearest even, denormals kept. Where the
factor is exactly 1 the value is copied with all its bits. Every other NaN of the result is the
canonical quiet NaN (0x7fc00000, 0x7e00, 0x7fc0); torch leaves its sign and payload open.
"""

from __future__ import annotations

import torch

from maskprune.ops.backend import DTYPE_CODES, Backend, choose, compiled


def fold_columns(
    weight: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """weight[:, keep] * scale[keep], rounded once.

    Args:
        weight: (O, I) float32, float16, bfloat16 or float64; left as it is.
        scale: (I,) float32, one factor per column.
        keep: (K,) int64 in 0..I-1, any order, repeats allowed; fastest where it ascends.
        backend: `auto` (C++ on the CPU, the reference elsewhere: export runs on the CPU),
            `reference` or `cpp`.

    Returns:
        (O, K) new contiguous tensor of the weight's dtype. Not differentiable.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or indices that do not fit.
        RuntimeError: an explicit backend that is not available here.
    """
    _check_weight("fold_columns", weight)
    _check_keep("fold_columns", keep, weight, weight.shape[-1], "columns")
    if weight.dim() != 2:
        raise ValueError(f"fold_columns: weight has shape {tuple(weight.shape)}; expected (O, I)")
    if scale.dtype != torch.float32:
        raise TypeError(
            f"fold_columns: scale is {scale.dtype}; expected float32; pass scale.float()"
        )
    if scale.shape != weight.shape[1:] or scale.device != weight.device:
        raise ValueError(
            f"fold_columns: scale is {tuple(scale.shape)} on {scale.device}; expected "
            f"({weight.shape[1]},) on {weight.device}, one factor per column of weight"
        )
    weight, scale = weight.detach(), scale.detach()
    if choose("fold_columns", backend, weight, triton=False) == Backend.REFERENCE:
        return fold_columns_reference(weight, scale, keep)
    weight, keep, factors = weight.contiguous(), keep.contiguous(), scale[keep]
    out = weight.new_empty(weight.shape[0], keep.numel())
    compiled().fold_columns(
        weight.data_ptr(),
        *weight.shape,
        DTYPE_CODES[weight.dtype],
        keep.data_ptr(),
        keep.numel(),
        factors.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        "auto",
    )
    return out


def gather_rows(weight: torch.Tensor, keep: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """weight[keep], bit for bit.

    Args:
        weight: (O, I), or a bias (O,); float32, float16, bfloat16 or float64; left as it is.
        keep: (K,) int64 in 0..O-1, any order, repeats allowed.
        backend: as in `fold_columns`.

    Returns:
        (K, I) or (K,) new contiguous tensor of the weight's dtype. Not differentiable.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or indices that do not fit.
        RuntimeError: an explicit backend that is not available here.
    """
    _check_weight("gather_rows", weight)
    _check_keep("gather_rows", keep, weight, weight.shape[0] if weight.dim() else 0, "rows")
    weight = weight.detach()
    if choose("gather_rows", backend, weight, triton=False) == Backend.REFERENCE:
        return weight.index_select(0, keep)
    weight, keep = weight.contiguous(), keep.contiguous()
    out = weight.new_empty(keep.numel(), *weight.shape[1:])
    compiled().gather_rows(
        weight.data_ptr(),
        weight.shape[0],
        weight[:1].numel() * weight.element_size(),
        keep.data_ptr(),
        keep.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def fold_columns_reference(
    weight: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """The definition of `fold_columns`, in plain torch."""
    kept, factors = weight.index_select(1, keep), scale.index_select(0, keep)
    return scale_exactly(kept, factors)


def scale_exactly(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """weight * factors, broadcast, under the rounding rules at the head of this file."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = (weight.to(wide) * factors.to(wide)).to(weight.dtype)
    canonical = torch.full_like(product, float("nan"))
    product = torch.where(product.isnan(), canonical, product)
    return torch.where(factors == 1, weight, product)


def _check_weight(op: str, weight: torch.Tensor) -> None:
    if weight.dtype not in DTYPE_CODES:
        raise TypeError(
            f"{op}: weight is {weight.dtype}; expected float32, float16, bfloat16 or float64; "
            "quantised weights must be dequantised first"
        )
    if weight.dim() not in (1, 2):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (O, I) or (O,)")


def _check_keep(op: str, keep: torch.Tensor, weight: torch.Tensor, size: int, what: str) -> None:
    if keep.dtype != torch.int64:
        raise TypeError(f"{op}: keep is {keep.dtype}; expected int64; pass keep.long()")
    if keep.dim() != 1 or keep.device != weight.device:
        raise ValueError(
            f"{op}: keep is {tuple(keep.shape)} on {keep.device}; expected (K,) on {weight.device}"
        )
    if not keep.numel():
        return
    low, high = int(keep.min()), int(keep.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"{op}: keep has {low if low < 0 else high}; expected 0 to {size - 1}, "
            f"weight has {size} {what}"
        )
