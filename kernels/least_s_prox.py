"""Least-s proximal step in Triton: one program per row, one launch for all rows.

m[i] *= shrink for the k = ceil(s) entries of smallest |m|, ties to the lower index
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from maskprune.kernels.least_s_long import prox_chunked, prox_packed
from maskprune.kernels.least_s_rows import prox_all_pairs, prox_pieces, tile_for


@triton.jit
def prox_row(
    row_ptr,
    saved_ptr,
    s,
    shrink,
    N,
    CLAMP: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    C: tl.constexpr,
):
    """One row by the search of its tile -> (sum_sq, next_sq, whether all were numbers)."""
    if KERNEL == "all_pairs":
        sum_sq, next_sq, sound = prox_all_pairs(row_ptr, saved_ptr, s, shrink, N, CLAMP, BLOCK)
    elif KERNEL == "pieces":
        sum_sq, next_sq, sound = prox_pieces(row_ptr, saved_ptr, s, shrink, N, CLAMP, R0, R1, R2, C)
    elif KERNEL == "packed":
        sum_sq, next_sq, sound = prox_packed(
            row_ptr, saved_ptr, s, shrink, N, CLAMP, R0, R1, R2, R3, C
        )
    else:
        sum_sq, next_sq, sound = prox_chunked(row_ptr, saved_ptr, s, shrink, N, CLAMP, BLOCK)
    return sum_sq, next_sq, sound


@triton.jit
def prox_rows(
    m_ptr,
    s_ptr,
    shrink_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    N,
    stride_row,
    stride_s,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = m_ptr + row.to(tl.int64) * stride_row
    s = tl.load(s_ptr + row * stride_s)
    shrink = tl.load(shrink_ptr)

    sum_sq, next_sq, sound = prox_row(
        row_ptr, row_ptr, s, shrink, N, False, KERNEL, BLOCK, R0, R1, R2, R3, C
    )

    tl.store(sum_sq_ptr + row, tl.where(sound, sum_sq, float("nan")))
    tl.store(next_sq_ptr + row, tl.where(sound, next_sq, float("nan")))


def least_s_prox(
    mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, N) rows of stride 1, s 0-dim or (R,), shrink 0-dim -> (sum_sq, next_sq)."""
    R, N = mask.shape
    sum_sq, next_sq = mask.new_empty(R), mask.new_empty(R)
    if R:
        tile = tile_for(N)
        prox_rows[(R,)](
            m_ptr=mask,
            s_ptr=s.float().contiguous(),
            shrink_ptr=shrink.float(),
            sum_sq_ptr=sum_sq,
            next_sq_ptr=next_sq,
            N=N,
            stride_row=mask.stride(0),
            stride_s=s.dim(),
            **tile.constants,
            num_warps=tile.warps,
            num_stages=1,
        )
    return sum_sq, next_sq
