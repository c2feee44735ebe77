"""Least-s proximal step in Triton: one program per row, one launch for all rows.

m[i] *= shrink for the k = ceil(s) entries of smallest |m|, ties to the lower index
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from maskprune.kernels.least_s_long import prox_chunked, prox_packed
from maskprune.kernels.least_s_rows import prox_all_pairs, prox_pieces, tile_for


@triton.jit
def locate(m_ptr, offsets_ptr, lengths_ptr, stride_row, N, TABLE: tl.constexpr, WIDE: tl.constexpr):
    """(start, length) of this program's row: strided rows, or entries of a table."""
    row = tl.program_id(0)
    if TABLE:
        start = tl.load(offsets_ptr + row)
        length = tl.load(lengths_ptr + row)
        if WIDE:
            start = tl.multiple_of(start, 4)
            length = tl.multiple_of(length, 4)
    else:
        start = row.to(tl.int64) * stride_row
        length = N
    return m_ptr + start, length


@triton.jit
def store_results(sum_sq_ptr, next_sq_ptr, sum_sq, next_sq, sound):
    row = tl.program_id(0)
    tl.store(sum_sq_ptr + row, tl.where(sound, sum_sq, float("nan")))
    tl.store(next_sq_ptr + row, tl.where(sound, next_sq, float("nan")))


@triton.jit
def pieces(
    m_ptr,
    s_ptr,
    shrink_ptr,
    offsets_ptr,
    lengths_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    N,
    stride_row,
    stride_s,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    C: tl.constexpr,
):
    row_ptr, n = locate(m_ptr, offsets_ptr, lengths_ptr, stride_row, N, TABLE, WIDE)
    s = tl.load(s_ptr + tl.program_id(0) * stride_s)
    shrink = tl.load(shrink_ptr)
    sum_sq, next_sq, sound = prox_pieces(row_ptr, row_ptr, s, shrink, n, False, R0, R1, R2, C)
    store_results(sum_sq_ptr, next_sq_ptr, sum_sq, next_sq, sound)


@triton.jit
def packed(
    m_ptr,
    s_ptr,
    shrink_ptr,
    offsets_ptr,
    lengths_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    N,
    stride_row,
    stride_s,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    C: tl.constexpr,
):
    row_ptr, n = locate(m_ptr, offsets_ptr, lengths_ptr, stride_row, N, TABLE, WIDE)
    s = tl.load(s_ptr + tl.program_id(0) * stride_s)
    shrink = tl.load(shrink_ptr)
    sum_sq, next_sq, sound = prox_packed(row_ptr, row_ptr, s, shrink, n, False, R0, R1, R2, R3, C)
    store_results(sum_sq_ptr, next_sq_ptr, sum_sq, next_sq, sound)


@triton.jit
def all_pairs(
    m_ptr,
    s_ptr,
    shrink_ptr,
    offsets_ptr,
    lengths_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    N,
    stride_row,
    stride_s,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, n = locate(m_ptr, offsets_ptr, lengths_ptr, stride_row, N, TABLE, WIDE)
    s = tl.load(s_ptr + tl.program_id(0) * stride_s)
    sum_sq, next_sq, sound = prox_all_pairs(
        row_ptr, row_ptr, s, tl.load(shrink_ptr), n, False, BLOCK
    )
    store_results(sum_sq_ptr, next_sq_ptr, sum_sq, next_sq, sound)


@triton.jit
def chunked(
    m_ptr,
    s_ptr,
    shrink_ptr,
    offsets_ptr,
    lengths_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    N,
    stride_row,
    stride_s,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, n = locate(m_ptr, offsets_ptr, lengths_ptr, stride_row, N, TABLE, WIDE)
    s = tl.load(s_ptr + tl.program_id(0) * stride_s)
    sum_sq, next_sq, sound = prox_chunked(row_ptr, row_ptr, s, tl.load(shrink_ptr), n, False, BLOCK)
    store_results(sum_sq_ptr, next_sq_ptr, sum_sq, next_sq, sound)


KERNELS = {"all_pairs": all_pairs, "pieces": pieces, "packed": packed, "chunked": chunked}


def least_s_prox(
    mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, N) rows of stride 1, s 0-dim or (R,), shrink 0-dim -> (sum_sq, next_sq)."""
    R, N = mask.shape
    return _launch(mask, s, shrink, None, None, R, N, mask.stride(0), wide=False)


def foreach_least_s_prox(
    masks: Sequence[torch.Tensor], s: torch.Tensor, shrink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on 1-D tensors of one device; the first call with new addresses copies a table."""
    longest = max(masks, key=torch.Tensor.numel)
    base = longest.data_ptr()
    starts = tuple((m.data_ptr() - base) // 4 if m.numel() else 0 for m in masks)
    lengths = tuple(m.numel() for m in masks)
    offsets, sizes = _table(starts, lengths, str(longest.device))
    wide = base % 16 == 0 and all(x % 4 == 0 for x in (*starts, *lengths))
    R, N = len(masks), longest.numel()
    return _launch(longest, s, shrink, offsets, sizes, R, N, 0, wide=wide)


@lru_cache(maxsize=64)
def _table(
    starts: tuple[int, ...], lengths: tuple[int, ...], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(starts, dtype=torch.int64, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def _launch(
    m: torch.Tensor,
    s: torch.Tensor,
    shrink: torch.Tensor,
    offsets: torch.Tensor | None,
    lengths: torch.Tensor | None,
    R: int,
    N: int,
    stride_row: int,
    *,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    sum_sq, next_sq = m.new_empty(R), m.new_empty(R)
    if R:
        tile = tile_for(N)
        KERNELS[tile.kernel][(R,)](
            m_ptr=m,
            s_ptr=s.float().contiguous(),
            shrink_ptr=shrink.float(),
            offsets_ptr=offsets,
            lengths_ptr=lengths,
            sum_sq_ptr=sum_sq,
            next_sq_ptr=next_sq,
            N=N,
            stride_row=stride_row,
            stride_s=s.dim(),
            TABLE=offsets is not None,
            WIDE=wide,
            num_warps=tile.warps,
            num_stages=1,
            **tile.sizes,
        )
    return sum_sq, next_sq
