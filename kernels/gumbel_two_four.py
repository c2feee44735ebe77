"""W * m with m a Gumbel-softmax sample of the 2:4 mask, its norm, and the logits' gradient.

Legend: g a group of four weights, in memory order, G how many; n its six integers, p its softmax,
m0 to m3 its mask, dm the gradient of its mask; candidates 0 to 5 are 1100, 1010, 1001, 0110, 0101,
0011. A program owns BLOCK groups. Everything is in base 2, as CUDA's instructions are:
p_k = 2^(z_k - max z) / sum, z = (kappa log2(e) pi - log2(-log2 u)) / tau; the constant that this
drops from g = -log(-log u) is the same for all k. Squares are summed per program, then over
programs by one program, so no atomics and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from maskprune.kernels.slabs import load, store

# A thread of 4 warps has four logits of each plane, one 128-bit access, and their 16 weights.
BLOCK, WARPS = 512, 4
BLOCK_S, SUM_WARPS = 8192, 16


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):
    """In one instruction, absolutely within 2^-22 near 1, relatively elsewhere; or exactly."""
    # .ftz: no argument here is denormal, and handling them costs three instructions.
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _exp2(x, APPROXIMATE: tl.constexpr):
    """In one instruction, within 2 ulp and 0 where float32 has no normal number; or exactly."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _minus_log2_of_exponential(n, APPROXIMATE: tl.constexpr):
    """-log2(-log2 u), u = (n + 1/2) / 2^21.

    Near u = 1 the instruction's error is as large as -log2 u, and may even cross 0. From v = 1 - u
    <= 1/16 on, v + v^2/2 + v^3/3 + v^4/4 has a relative error below v^4/5 = 3e-6 instead; up to
    there the instruction's is below 2^-22 / log2(16/15) = 2.6e-6.
    """
    u = (n.to(tl.int32).to(tl.float32) + 0.5) * 4.76837158203125e-07
    exponential = -_log2(u, APPROXIMATE)
    if APPROXIMATE:
        v = 1.0 - u
        series = v * (1.4426950408889634 + v * (0.7213475204444817 + v * (
            0.4808983469629878 + v * 0.36067376022224085)))  # fmt: skip
        exponential = tl.where(v <= 0.0625, series, exponential)
    return -_log2(exponential, APPROXIMATE)


@triton.jit
def _integers(seed, low, high):
    """n of groups with the number low + 2^32 high."""
    c0 = low.to(tl.uint32)
    zero = c0 * 0
    a, b, c, d = tl.philox(seed, c0, zero + high.to(tl.uint32), zero, zero)
    e = ((a & 0x7FF) << 10) | (b & 0x3FF)
    f = ((c & 0x7FF) << 10) | (d & 0x3FF)
    return a >> 11, b >> 11, c >> 11, d >> 11, e, f


@triton.jit
def _sample(pi_ptr, seed_ptr, kappa_ptr, tau_ptr, first, g, inside, G, APPROXIMATE: tl.constexpr):
    """p of the groups first + g."""
    n0, n1, n2, n3, n4, n5 = _integers(
        tl.load(seed_ptr), (first & 0xFFFFFFFF).to(tl.uint32) + g.to(tl.uint32), first >> 32
    )
    # Scaled after the maximum is subtracted: differences next to 0 keep their bits.
    kappa = tl.load(kappa_ptr) * 1.4426950408889634
    inverse = 1.0 / tl.load(tau_ptr)
    plane = pi_ptr + first
    G = first * 0 + G  # int64: five planes may pass 2^31
    x0 = kappa * load(plane, g, inside) + _minus_log2_of_exponential(n0, APPROXIMATE)
    x1 = kappa * load(plane + G, g, inside) + _minus_log2_of_exponential(n1, APPROXIMATE)
    x2 = kappa * load(plane + 2 * G, g, inside) + _minus_log2_of_exponential(n2, APPROXIMATE)
    x3 = kappa * load(plane + 3 * G, g, inside) + _minus_log2_of_exponential(n3, APPROXIMATE)
    x4 = kappa * load(plane + 4 * G, g, inside) + _minus_log2_of_exponential(n4, APPROXIMATE)
    x5 = kappa * load(plane + 5 * G, g, inside) + _minus_log2_of_exponential(n5, APPROXIMATE)
    # A NaN that the maximum leaves out comes back through its own exponential.
    peak = tl.maximum(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), tl.maximum(x4, x5))
    e0 = _exp2((x0 - peak) * inverse, APPROXIMATE)
    e1 = _exp2((x1 - peak) * inverse, APPROXIMATE)
    e2 = _exp2((x2 - peak) * inverse, APPROXIMATE)
    e3 = _exp2((x3 - peak) * inverse, APPROXIMATE)
    e4 = _exp2((x4 - peak) * inverse, APPROXIMATE)
    e5 = _exp2((x5 - peak) * inverse, APPROXIMATE)
    share = 1.0 / (e0 + e1 + e2 + e3 + e4 + e5)
    return e0 * share, e1 * share, e2 * share, e3 * share, e4 * share, e5 * share


@triton.jit
def _interleaved(m0, m1, m2, m3, BLOCK: tl.constexpr):
    """(BLOCK,) four times -> (4 * BLOCK,), group by group."""
    return tl.reshape(tl.join(tl.join(m0, m2), tl.join(m1, m3)), [4 * BLOCK])


@triton.jit
def gumbel_two_four_forward(
    w_ptr,
    pi_ptr,
    seed_ptr,
    kappa_ptr,
    tau_ptr,
    masked_ptr,
    partial_ptr,
    G,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    g = tl.arange(0, BLOCK)
    i = tl.arange(0, 4 * BLOCK)
    inside = g < G - first
    inside_w = i < 4 * (G - first)

    W = load(w_ptr + 4 * first, i, inside_w)
    p0, p1, p2, p3, p4, p5 = _sample(
        pi_ptr, seed_ptr, kappa_ptr, tau_ptr, first, g, inside, G, APPROXIMATE
    )
    m = _interleaved(p0 + p1 + p2, p0 + p3 + p4, p1 + p3 + p5, p2 + p4 + p5, BLOCK)
    product = W * m

    store(masked_ptr + 4 * first, i, product, inside_w)
    # Outside, W and the logits are 0: no NaN comes in.
    tl.store(partial_ptr + tl.program_id(0), tl.sum(product * product, axis=0))


@triton.jit
def gumbel_two_four_backward(
    dmasked_ptr,
    dnorm_sq_ptr,
    w_ptr,
    pi_ptr,
    seed_ptr,
    kappa_ptr,
    tau_ptr,
    dpi_ptr,
    G,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    g = tl.arange(0, BLOCK)
    i = tl.arange(0, 4 * BLOCK)
    inside = g < G - first
    inside_w = i < 4 * (G - first)

    W = load(w_ptr + 4 * first, i, inside_w)
    d = load(dmasked_ptr + 4 * first, i, inside_w)
    p0, p1, p2, p3, p4, p5 = _sample(
        pi_ptr, seed_ptr, kappa_ptr, tau_ptr, first, g, inside, G, APPROXIMATE
    )
    m0, m1, m2, m3 = p0 + p1 + p2, p0 + p3 + p4, p1 + p3 + p5, p2 + p4 + p5
    # d W + 2 dnorm_sq W^2 m: only W and d W are moved to the layout of groups.
    square = 2.0 * tl.load(dnorm_sq_ptr) * W * W
    even, odd = tl.split(tl.reshape(d * W, [BLOCK, 2, 2]))
    a, c = tl.split(even)
    b, e = tl.split(odd)
    even, odd = tl.split(tl.reshape(square, [BLOCK, 2, 2]))
    sa, sc = tl.split(even)
    sb, se = tl.split(odd)
    a += sa * m0
    b += sb * m1
    c += sc * m2
    e += se * m3

    mean = m0 * a + m1 * b + (m2 * c + m3 * e)
    scale = tl.load(kappa_ptr) / tl.load(tau_ptr)
    plane = dpi_ptr + first
    G = first * 0 + G  # int64: five planes may pass 2^31
    store(plane, g, scale * p0 * (a + b - mean), inside)
    store(plane + G, g, scale * p1 * (a + c - mean), inside)
    store(plane + 2 * G, g, scale * p2 * (a + e - mean), inside)
    store(plane + 3 * G, g, scale * p3 * (b + c - mean), inside)
    store(plane + 4 * G, g, scale * p4 * (b + e - mean), inside)
    store(plane + 5 * G, g, scale * p5 * (c + e - mean), inside)


@triton.jit
def sum_partials(partial_ptr, out_ptr, S, BLOCK_S: tl.constexpr):
    """out = the sum of partial (S,) float32, in the order that S and BLOCK_S decide."""
    total = tl.zeros([BLOCK_S], tl.float32)
    first = 0
    while first < S:
        s = first + tl.arange(0, BLOCK_S)
        total += load(partial_ptr, s, s < S)
        first += BLOCK_S
    tl.store(out_ptr, tl.sum(total, axis=0))


@triton.jit
def draw_integers(seed_ptr, first_ptr, n_ptr, G, BLOCK: tl.constexpr):
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(first_ptr) + g
    n0, n1, n2, n3, n4, n5 = _integers(tl.load(seed_ptr), number & 0xFFFFFFFF, number >> 32)
    store(n_ptr, g, n0, g < G)
    store(n_ptr + G, g, n1, g < G)
    store(n_ptr + 2 * G, g, n2, g < G)
    store(n_ptr + 3 * G, g, n3, g < G)
    store(n_ptr + 4 * G, g, n4, g < G)
    store(n_ptr + 5 * G, g, n5, g < G)


def _approximate(tensor: torch.Tensor) -> bool:
    # The interpreter and AMD's devices do not take PTX.
    return tensor.is_cuda and torch.version.hip is None


def forward(
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (O, I) and logits (6, O, I / 4), contiguous -> masked (O, I), norm_sq."""
    G = weight.numel() // 4
    masked = torch.empty_like(weight)
    norm_sq = torch.zeros((), dtype=torch.float32, device=weight.device)
    if G:
        S = triton.cdiv(G, BLOCK)
        partial = torch.empty(S, dtype=torch.float32, device=weight.device)
        gumbel_two_four_forward[(S,)](
            w_ptr=weight,
            pi_ptr=logits,
            seed_ptr=seed,
            kappa_ptr=kappa,
            tau_ptr=tau,
            masked_ptr=masked,
            partial_ptr=partial,
            G=G,
            APPROXIMATE=_approximate(weight),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        sum_partials[(1,)](
            partial_ptr=partial, out_ptr=norm_sq, S=S, BLOCK_S=BLOCK_S, num_warps=SUM_WARPS
        )
    return masked, norm_sq


def backward(
    dmasked: torch.Tensor,
    dnorm_sq: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
) -> torch.Tensor:
    """The gradient of `forward`: dlogits (6, O, I / 4)."""
    G = weight.numel() // 4
    dlogits = torch.empty_like(logits)
    if G:
        gumbel_two_four_backward[(triton.cdiv(G, BLOCK),)](
            dmasked_ptr=dmasked,
            dnorm_sq_ptr=dnorm_sq,
            w_ptr=weight,
            pi_ptr=logits,
            seed_ptr=seed,
            kappa_ptr=kappa,
            tau_ptr=tau,
            dpi_ptr=dlogits,
            G=G,
            APPROXIMATE=_approximate(weight),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return dlogits


def noise(seed: torch.Tensor, groups: int, first: int = 0) -> torch.Tensor:
    """The integers of groups first, first + 1, ... as the kernels draw them: (6, groups) int32."""
    n = torch.empty((6, groups), dtype=torch.int32, device=seed.device)
    draw_integers[(triton.cdiv(groups, BLOCK),)](
        seed_ptr=seed,
        first_ptr=torch.full_like(seed, first),
        n_ptr=n,
        G=groups,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return n
