"""out[t, h, i] = x[t, h, i] * m[h] and its gradients in Triton.

Legend: T rows (tokens), H heads of D values, t, h, i their indices, m mask. A tile is BLOCK_T rows
of BLOCK_H whole heads, each padded to BLOCK_D values. In backward a program owns one tile of heads
and a slab of rows (slabs.py): no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from maskprune.kernels.slabs import add_slabs, load, slabs_of, store

# As in masked_swiglu: a tile of 4 x 512 values under 4 warps.
BLOCK_T, BLOCK_COLUMNS, WARPS = 4, 512, 4


@triton.jit
def scale_heads_forward(
    x_ptr,
    m_ptr,
    out_ptr,
    T,
    H,
    stride_xt,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    across = tl.cdiv(H, BLOCK_H)
    t = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = (tl.program_id(0) % across) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_D)
    column = h[None, :, None] * D + i[None, None, :]
    inside = (t[:, None, None] < T) & (h[None, :, None] < H) & (i[None, None, :] < D)

    m = load(m_ptr, h, h < H)
    x = load(x_ptr, t[:, None, None] * stride_xt + column, inside)

    store(out_ptr, t[:, None, None] * (H * D) + column, x * m[None, :, None], inside)


@triton.jit
def scale_heads_backward(
    dout_ptr,
    x_ptr,
    m_ptr,
    dx_ptr,
    partial_ptr,
    T,
    H,
    slab,
    stride_dt,
    stride_xt,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    across = tl.cdiv(H, BLOCK_H)
    s = (tl.program_id(0) // across).to(tl.int64)
    h = (tl.program_id(0) % across) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_D)
    column = h[None, :, None] * D + i[None, None, :]
    m = load(m_ptr, h, h < H)

    dm = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_D], tl.float32)
    first = 0
    while first < slab:
        t = s * slab + first + tl.arange(0, BLOCK_T)
        inside = (t[:, None, None] < T) & (h[None, :, None] < H) & (i[None, None, :] < D)
        d = load(dout_ptr, t[:, None, None] * stride_dt + column, inside)
        x = load(x_ptr, t[:, None, None] * stride_xt + column, inside)

        dm += d * x
        store(dx_ptr, t[:, None, None] * (H * D) + column, d * m[None, :, None], inside)
        first += BLOCK_T
    tl.store(partial_ptr + s * H + h, tl.sum(tl.sum(dm, axis=2), axis=0), mask=h < H)


def tile_of(D: int) -> dict[str, int]:
    """The tile for heads of D values."""
    BLOCK_D = triton.next_power_of_2(max(1, D))
    return {"BLOCK_T": BLOCK_T, "BLOCK_H": max(1, BLOCK_COLUMNS // BLOCK_D), "BLOCK_D": BLOCK_D}


def forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (T, H * D) with contiguous rows, mask (H,) float32 -> (T, H * D)."""
    T, H = x.shape[0], mask.numel()
    tile = tile_of(x.shape[1] // H)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        scale_heads_forward[(triton.cdiv(T, BLOCK_T) * triton.cdiv(H, tile["BLOCK_H"]),)](
            x_ptr=x,
            m_ptr=mask,
            out_ptr=out,
            T=T,
            H=H,
            stride_xt=x.stride(0),
            D=x.shape[1] // H,
            **tile,
            num_warps=WARPS,
        )
    return out


def backward(
    dout: torch.Tensor, x: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `forward`: dx (T, H * D), dmask (H,)."""
    T, H = x.shape[0], mask.numel()
    tile = tile_of(x.shape[1] // H)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dm = torch.zeros_like(mask)
    if dx.numel():
        across = triton.cdiv(H, tile["BLOCK_H"])
        S, slab = slabs_of(T, across, BLOCK_T, x.device)
        partial = torch.empty((S, H), dtype=torch.float32, device=x.device)
        scale_heads_backward[(S * across,)](
            dout_ptr=dout,
            x_ptr=x,
            m_ptr=mask,
            dx_ptr=dx,
            partial_ptr=partial,
            T=T,
            H=H,
            slab=slab,
            stride_dt=dout.stride(0),
            stride_xt=x.stride(0),
            D=x.shape[1] // H,
            **tile,
            num_warps=WARPS,
        )
        add_slabs(partial, dm)
    return dx, dm
