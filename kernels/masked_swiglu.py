"""out = act(gate) * up * mask and its gradients in Triton.

Legend: T rows (tokens), F columns (FFN units), t and j their indices, m mask, f = act(gate),
df = act'(gate). Both activations are g * sigmoid(z(g)): silu has z = g, gelu_tanh has
z = 2k (g + a g^3). A tile is BLOCK_T rows by BLOCK_F columns. In backward a program owns one tile
of columns and a slab of rows: it sums dm in registers and stores one partial row, and a second
kernel adds the slabs in order, so no atomics and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from maskprune.kernels.slabs import add_slabs, load, slabs_of, store

# By bytes per value: rows of a tile, such that every thread of 4 warps has two 128-bit accesses
# per operand in flight and backward keeps everything in registers (tests/test_offline_compile.py).
BLOCK_T = {2: 4, 4: 2}
BLOCK_F, WARPS = 512, 4


@triton.jit
def _activate(g, GELU: tl.constexpr):
    """f and df; sigmoid and 1 - sigmoid from exp(-|z|): neither overflows nor cancels."""
    k = 0.7978845608028654
    a = 0.044715
    if GELU:
        z = 2.0 * k * (g + a * g * g * g)
        dz = 2.0 * k * (1.0 + 3.0 * a * g * g)
    else:
        z = g
        dz = tl.full(g.shape, 1.0, tl.float32)
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    sigmoid = tl.where(z >= 0.0, large, small)
    rest = tl.where(z >= 0.0, small, large)
    f = g * sigmoid
    slope = tl.where(small > 0.0, rest * dz, 0.0)
    return f, sigmoid + f * slope


@triton.jit
def masked_swiglu_forward(
    gate_ptr,
    up_ptr,
    m_ptr,
    out_ptr,
    T,
    F,
    stride_gt,
    stride_ut,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    across = tl.cdiv(F, BLOCK_F)
    t = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = (tl.program_id(0) % across) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t[:, None] < T) & (j[None, :] < F)

    m = load(m_ptr, j, j < F)
    g = load(gate_ptr, t[:, None] * stride_gt + j[None, :], inside)
    u = load(up_ptr, t[:, None] * stride_ut + j[None, :], inside)

    f, _ = _activate(g, GELU)
    store(out_ptr, t[:, None] * F + j[None, :], f * u * m[None, :], inside)


@triton.jit
def masked_swiglu_backward(
    dout_ptr,
    gate_ptr,
    up_ptr,
    m_ptr,
    dgate_ptr,
    dup_ptr,
    partial_ptr,
    T,
    F,
    slab,
    stride_dt,
    stride_gt,
    stride_ut,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    across = tl.cdiv(F, BLOCK_F)
    s = (tl.program_id(0) // across).to(tl.int64)
    j = (tl.program_id(0) % across) * BLOCK_F + tl.arange(0, BLOCK_F)
    m = load(m_ptr, j, j < F)

    dm = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    first = 0
    while first < slab:
        t = s * slab + first + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < T) & (j[None, :] < F)
        d = load(dout_ptr, t[:, None] * stride_dt + j[None, :], inside)
        g = load(gate_ptr, t[:, None] * stride_gt + j[None, :], inside)
        u = load(up_ptr, t[:, None] * stride_ut + j[None, :], inside)

        f, df = _activate(g, GELU)
        dm += d * (f * u)
        masked = d * m[None, :]
        store(dup_ptr, t[:, None] * F + j[None, :], masked * f, inside)
        store(dgate_ptr, t[:, None] * F + j[None, :], masked * u * df, inside)
        first += BLOCK_T
    tl.store(partial_ptr + s * F + j, tl.sum(dm, axis=0), mask=j < F)


def forward(
    gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, activation: str
) -> torch.Tensor:
    """gate, up (T, F) with contiguous rows, mask (F,) float32 -> (T, F)."""
    T, F = gate.shape
    block_t = BLOCK_T[gate.element_size()]
    out = torch.empty((T, F), dtype=gate.dtype, device=gate.device)
    if out.numel():
        masked_swiglu_forward[(triton.cdiv(T, block_t) * triton.cdiv(F, BLOCK_F),)](
            gate_ptr=gate,
            up_ptr=up,
            m_ptr=mask,
            out_ptr=out,
            T=T,
            F=F,
            stride_gt=gate.stride(0),
            stride_ut=up.stride(0),
            GELU=activation == "gelu_tanh",
            BLOCK_T=block_t,
            BLOCK_F=BLOCK_F,
            num_warps=WARPS,
        )
    return out


def backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `forward`: dgate, dup (T, F), dmask (F,)."""
    T, F = gate.shape
    block_t = BLOCK_T[gate.element_size()]
    dgate, dup = (torch.empty((T, F), dtype=x.dtype, device=x.device) for x in (gate, up))
    dm = torch.zeros_like(mask)
    if dgate.numel():
        across = triton.cdiv(F, BLOCK_F)
        S, slab = slabs_of(T, across, block_t, gate.device)
        partial = torch.empty((S, F), dtype=torch.float32, device=gate.device)
        masked_swiglu_backward[(S * across,)](
            dout_ptr=dout,
            gate_ptr=gate,
            up_ptr=up,
            m_ptr=mask,
            dgate_ptr=dgate,
            dup_ptr=dup,
            partial_ptr=partial,
            T=T,
            F=F,
            slab=slab,
            stride_dt=dout.stride(0),
            stride_gt=gate.stride(0),
            stride_ut=up.stride(0),
            GELU=activation == "gelu_tanh",
            BLOCK_T=block_t,
            BLOCK_F=BLOCK_F,
            num_warps=WARPS,
        )
        add_slabs(partial, dm)
    return dgate, dup, dm
