"""Sums over rows without atomics: each program sums one slab of rows, then the slabs are added.

Legend: T rows, S slabs, N columns, t, s, j their indices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_S, BLOCK_N = 16, 64
# Enough programs to fill the device, and so few slabs that adding them is a percent of the work.
# The interpreter has no multiprocessors; it takes a few, so that small tests see several slabs.
PROGRAMS_PER_SM, SLABS_PER_SM, INTERPRETER_SMS = 8, 2, 4


@triton.jit
def load(ptr, offs, mask):
    """float32 whatever the pointer's type; 0 outside."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, offs, value, mask):
    """One rounding, to the pointer's type."""
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_slabs(partial_ptr, out_ptr, S, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[j] = sum over s of partial[s, j], in the order of s; partial (S, N) float32."""
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    # `while`, here and in the kernels: Triton 3.6's interpreter cannot take a run-time bound in
    # `range` with NumPy 2.4 or newer.
    first = 0
    while first < S:
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (s[:, None] < S) & (j[None, :] < N)
        total += tl.load(partial_ptr + s[:, None] * N + j[None, :], mask=inside, other=0.0)
        first += BLOCK_S
    tl.store(out_ptr + j, tl.sum(total, axis=0), mask=j < N)


def slabs_of(T: int, across: int, block_t: int, device: torch.device) -> tuple[int, int]:
    """(S, rows of a slab) for T rows under `across` tiles of columns; slabs are whole tiles."""
    sms = INTERPRETER_SMS
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(SLABS_PER_SM * sms, max(1, PROGRAMS_PER_SM * sms // across))
    slab = triton.cdiv(triton.cdiv(T, wanted), block_t) * block_t
    return triton.cdiv(T, slab), slab


def add_slabs(partial: torch.Tensor, out: torch.Tensor) -> None:
    """out (N,) = the sum of partial (S, N) over S."""
    S, N = partial.shape
    sum_slabs[(triton.cdiv(N, BLOCK_N),)](
        partial_ptr=partial, out_ptr=out, S=S, N=N, BLOCK_S=BLOCK_S, BLOCK_N=BLOCK_N
    )
