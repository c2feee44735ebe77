"""masked = W * m, m a Gumbel-softmax sample of the 2:4 mask, its norm, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch

from maskprune.ops.backend import DTYPE_CODES, FLOATS, Backend, choose, compiled
from maskprune.ops.register import Context, Inputs, register

# Which two of four consecutive inputs each candidate keeps: 1100, 1010, 1001, 0110, 0101, 0011.
SLOTS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
UNIFORM_BITS = 21


def gumbel_two_four(
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: int | torch.Tensor,
    kappa: float | torch.Tensor,
    tau: float | torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """masked = W * m, m[o, 4j + s] = sum of p[k, o, j] over the candidates k that keep slot s

    p = softmax over k of (kappa * pi + g) / tau, with g = -log(-log u) drawn anew for each of the
    six candidates of each group of four consecutive inputs; the four entries of m sum to 2. All
    arithmetic is float32 (float64 for float64 inputs), with one rounding to the dtype of W.

    Noise: Philox 4x32-10 with key = the low and high 32 bits of `seed` and counter = the low and
    high 32 bits of the group's number o * (I / 4) + j, then 0, 0. Of its words a, b, c, d come six
    21-bit integers n: the high 21 bits of each, then the low 11 bits of a before the low 10 of b,
    and c before d alike; u = (n + 1/2) / 2^21, exact in float32. Every backend, thread count and
    instruction set draws the same integers. Give each forward a seed of its own.

    Gradient, of the logits alone: with d = dmasked + 2 * dnorm_sq * (W * m) and t_k = the sum of
    d * W over the two slots of k, dpi_k = kappa / tau * p_k * (t_k - sum over j of p_j * t_j).
    Backward draws the noise again and keeps nothing but the inputs; it cannot be differentiated
    in turn.

    Error of g, absolute: 6e-7 in float32 on the CPU; 5e-6 on CUDA, whose approximate logarithm
    (2^-22 by its specification) is replaced by its series where u > 15/16 and it would lose u. It
    reaches the softmax divided by tau, as does the rounding of kappa * pi + g, 1e-6 at size 16.
    The same inputs on the same device give the same bits (C++: whatever the thread count).

    Args:
        weight: W (O, I) float32, bfloat16 or float16, I divisible by 4, frozen; float64 by the
            reference. One that is not contiguous is copied.
        logits: pi (6, O, I / 4) float32 (float64 with float64 weights), one plane per candidate in
            the order 1100, 1010, 1001, 0110, 0101, 0011; made contiguous if it is not.
        seed: int, or 0-dim int64 tensor; either has the 64 bits of int64.
        kappa, tau: floats, or 0-dim tensors of the dtype of `logits`, whose values are not checked:
            the caller ensures kappa >= 0 and tau >= 2^-100.
        backend: "auto", "reference", "cpp" or "triton"; `auto` leaves float64 to the reference.

    Tensors are on one device. The host never waits for a CUDA device. There a number is first
    written to a tensor, by its own kernel launch: in a loop over layers, pass tensors.

    Returns:
        masked: (O, I), contiguous, the dtype of W.
        norm_sq: 0-dim, the dtype of `logits`: the sum of (W * m)^2, before the rounding.

    Raises:
        ValueError: a weight that requires grad, shapes that do not agree, a number kappa < 0 or
            tau < 2^-100, two devices, or an unknown backend.
        TypeError: dtypes that do not agree, or that an explicit backend does not take.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskLLM, arXiv 2409.17481, section 3.2 (the differentiable sampling of masks; the
    candidates' order is that of its code) and 3.3 (the norm of the kept weights).
    """
    if weight.requires_grad:
        raise ValueError(
            "gumbel_two_four: weight requires grad; expected a frozen weight, since only the "
            "logits get a gradient; pass weight.detach()"
        )
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(
            f"gumbel_two_four: weight is {tuple(weight.shape)}; expected (O, I) with I divisible "
            "by 4; leave other layers dense"
        )
    planes = (6, weight.shape[0], weight.shape[1] // 4)
    if logits.shape != planes:
        raise ValueError(
            f"gumbel_two_four: logits is {tuple(logits.shape)}; expected {planes} for a "
            f"weight of {tuple(weight.shape)}: one plane per candidate"
        )
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if not weight.is_floating_point() or logits.dtype != wanted:
        raise TypeError(
            f"gumbel_two_four: weight is {weight.dtype}, logits {logits.dtype}; expected a "
            f"floating weight and {wanted} logits; convert with .to()"
        )
    if weight.device != logits.device:
        raise ValueError(
            f"gumbel_two_four: weight is on {weight.device}, logits on {logits.device}; move them "
            "to one device"
        )
    # Below, (kappa * pi + g) / tau soon leaves the range of float32.
    if not isinstance(tau, torch.Tensor) and not 2.0**-100 <= tau < math.inf:
        raise ValueError(
            f"gumbel_two_four: tau is {tau}; expected tau >= 2^-100, finite; for a hard "
            "mask take the argmax over planes"
        )
    if not isinstance(kappa, torch.Tensor) and not 0 <= kappa < math.inf:
        raise ValueError(f"gumbel_two_four: kappa is {kappa}; expected kappa >= 0, finite")
    if not isinstance(seed, torch.Tensor) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"gumbel_two_four: seed is {seed}; expected the 64 bits of int64")
    masked, norm_sq = torch.ops.maskprune.gumbel_two_four(
        weight,
        logits,
        _scalar("seed", seed, torch.int64, logits.device),
        _scalar("kappa", kappa, wanted, logits.device),
        _scalar("tau", tau, wanted, logits.device),
        backend,
    )
    return masked, norm_sq


def _scalar(
    name: str, value: float | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The value as a 0-dim tensor on the device, without a copy that waits for the device."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.dim() or value.dtype != dtype:
        raise TypeError(
            f"gumbel_two_four: {name} is {value.dtype} of shape {tuple(value.shape)}; expected a "
            f"number or a 0-dim {dtype} tensor; convert with .to()"
        )
    if value.device != device:
        raise ValueError(
            f"gumbel_two_four: {name} is on {value.device}, logits on {device}; move it there"
        )
    return value


def noise(seed: torch.Tensor, groups: int, first: int = 0) -> torch.Tensor:
    """The 21-bit integers n of groups first, first + 1, ...: (6, groups) int64."""
    g = torch.arange(first, first + groups, device=seed.device)
    a, b, c, d = philox((_low(g), _high(g), 0 * g, 0 * g), (_low(seed), _high(seed)))
    high = [word >> 11 for word in (a, b, c, d)]
    return torch.stack([*high, _leftover(a, b), _leftover(c, d)])


def philox(
    words: Sequence[torch.Tensor], key: Sequence[torch.Tensor], rounds: int = 10
) -> tuple[torch.Tensor, ...]:
    """Philox 4x32 of four counter and two key words, each a 32-bit number held in int64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, section 3.3.
    """
    (c0, c1, c2, c3), (k0, k1) = words, key
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = _low(k0 + 0x9E3779B9), _low(k1 + 0xBB67AE85)
    return c0, c1, c2, c3


def _low(x: torch.Tensor) -> torch.Tensor:
    return x & 0xFFFFFFFF


def _high(x: torch.Tensor) -> torch.Tensor:
    return (x >> 32) & 0xFFFFFFFF


def _multiply(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and low 32 bits of factor * x, in halves: int64 has no room for the product."""
    small = factor * (x & 0xFFFF)
    large = factor * (x >> 16) + (small >> 16)
    return large >> 16, (large & 0xFFFF) << 16 | small & 0xFFFF


def _leftover(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x & 0x7FF) << 10 | y & 0x3FF


def soft_choice(
    logits: torch.Tensor, seed: torch.Tensor, kappa: torch.Tensor, tau: torch.Tensor
) -> torch.Tensor:
    """p (6, O, I / 4): the definition's Gumbel-softmax sample, which sums to 1 over planes."""
    n = noise(seed, logits[0].numel()).view(logits.shape)
    u = (n.to(logits.dtype) + 0.5) * 2.0**-UNIFORM_BITS
    g = -torch.log(-torch.log(u))
    return torch.softmax((kappa * logits + g) / tau, 0)


def soft_mask(p: torch.Tensor) -> torch.Tensor:
    """m (O, I) = p @ candidates."""
    slots = [reduce(add, (p[k] for k, pair in enumerate(SLOTS) if s in pair)) for s in range(4)]
    return torch.stack(slots, -1).flatten(-2)


def reference(
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, differentiable by autograd in the logits."""
    product = weight.to(logits.dtype) * soft_mask(soft_choice(logits, seed, kappa, tau))
    norm_sq = product.square().sum(dtype=torch.float64).to(logits.dtype)
    return product.to(weight.dtype), norm_sq


def reference_backward(
    dmasked: torch.Tensor,
    dnorm_sq: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
) -> torch.Tensor:
    """The gradient of `reference`: dlogits."""
    p, W = soft_choice(logits, seed, kappa, tau), weight.to(logits.dtype)
    d = dmasked.to(logits.dtype) + 2 * dnorm_sq * (W * soft_mask(p))
    dm = (d * W).unflatten(-1, (-1, 4)) if d.numel() else d.new_empty((*logits.shape[1:], 4))
    t = torch.stack([dm[..., a] + dm[..., b] for a, b in SLOTS])
    return kappa / tau * p * (t - (p * t).sum(0))


def cpp_forward(
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
    isa: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compiled forward; `isa` forces "avx512", "avx2" or "portable"."""
    W, pi = weight.contiguous(), logits.contiguous()
    masked, norm_sq = torch.empty(W.shape, dtype=W.dtype), torch.empty((), dtype=pi.dtype)
    compiled().gumbel_two_four_forward(
        W.data_ptr(),
        pi.data_ptr(),
        masked.data_ptr(),
        norm_sq.data_ptr(),
        W.numel() // 4,
        seed.item(),
        kappa.item(),
        tau.item(),
        DTYPE_CODES[W.dtype],
        torch.get_num_threads(),
        isa,
    )
    return masked, norm_sq


def cpp_backward(
    dmasked: torch.Tensor,
    dnorm_sq: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
    isa: str = "auto",
) -> torch.Tensor:
    """The compiled gradient: dlogits."""
    d, W, pi = dmasked.contiguous(), weight.contiguous(), logits.contiguous()
    dlogits = torch.empty(pi.shape, dtype=pi.dtype)
    compiled().gumbel_two_four_backward(
        d.data_ptr(),
        dnorm_sq.item(),
        W.data_ptr(),
        pi.data_ptr(),
        dlogits.data_ptr(),
        W.numel() // 4,
        seed.item(),
        kappa.item(),
        tau.item(),
        DTYPE_CODES[W.dtype],
        torch.get_num_threads(),
        isa,
    )
    return dlogits


def cpp_noise(seed: torch.Tensor, groups: int, first: int = 0, isa: str = "auto") -> torch.Tensor:
    """`noise` as the compiled forward draws it, int32."""
    n = torch.empty((6, groups), dtype=torch.int32)
    compiled().gumbel_two_four_noise(seed.item(), first, groups, n.data_ptr(), isa)
    return n


def _forward(
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    match choose("gumbel_two_four", backend, weight, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_forward(weight, logits, seed, kappa, tau)
        case Backend.TRITON:
            from maskprune.kernels.gumbel_two_four import forward

            return forward(weight.contiguous(), logits.contiguous(), seed, kappa, tau)
    masked, norm_sq = reference(weight, logits, seed, kappa, tau)
    return masked.contiguous(), norm_sq


def _backward(
    dmasked: torch.Tensor,
    dnorm_sq: torch.Tensor,
    weight: torch.Tensor,
    logits: torch.Tensor,
    seed: torch.Tensor,
    kappa: torch.Tensor,
    tau: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    match choose("gumbel_two_four", backend, weight, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_backward(dmasked, dnorm_sq, weight, logits, seed, kappa, tau)
        case Backend.TRITON:
            from maskprune.kernels.gumbel_two_four import backward

            d, W = dmasked.contiguous(), weight.contiguous()
            return backward(d, dnorm_sq, W, logits.contiguous(), seed, kappa, tau)
    return reference_backward(dmasked, dnorm_sq, weight, logits, seed, kappa, tau).contiguous()


def _save(ctx: Context, inputs: Inputs, output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(
    ctx: Context, dmasked: torch.Tensor, dnorm_sq: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    dlogits = torch.ops.maskprune.gumbel_two_four_backward(
        dmasked, dnorm_sq, *ctx.saved_tensors, ctx.backend
    )
    return None, dlogits, None, None, None, None


def _no_second_gradients(ctx: Context, ddlogits: torch.Tensor) -> None:
    raise RuntimeError(
        "gumbel_two_four: asked for the gradient of its gradient; expected one backward; take the "
        "first gradient without create_graph"
    )


_INPUTS = "Tensor weight, Tensor logits, Tensor seed, Tensor kappa, Tensor tau, str backend"
register(
    f"gumbel_two_four({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    lambda weight, logits, *_: (weight.new_empty(weight.shape), logits.new_empty(())),
    gradients=_gradients,
    save=_save,
)
register(
    f"gumbel_two_four_backward(Tensor dmasked, Tensor dnorm_sq, {_INPUTS}) -> Tensor",
    _backward,
    lambda dmasked, dnorm_sq, weight, logits, *_: logits.new_empty(logits.shape),
    gradients=_no_second_gradients,
)
