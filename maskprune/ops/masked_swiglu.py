"""out = act(gate) * up * mask, and its gradients: the masked input of a gated FFN's down_proj."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from maskprune.ops.backend import DTYPE_CODES, FLOATS, Backend, choose, compiled
from maskprune.ops.register import Context, Inputs, register
from maskprune.ops.rows import as_rows

ACTIVATIONS = ("silu", "gelu_tanh")


def masked_swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """out[..., j] = act(gate[..., j]) * up[..., j] * mask[j]

    All arithmetic is float32 (float64 for float64 inputs), in this order, with one rounding to
    the dtype of `gate` at the end. The unfused form `(act(gate) * up) * mask.to(dtype)` rounds
    after every step and rounds the mask too: in float32 the two agree to a few ulp (to the bit
    for the reference), in bfloat16 to five roundings, 5 * 2^-8 of the value, and this form is the
    nearer to the exact result.

    Gradients, rounded once each: dgate = dout * mask * up * act'(gate), dup = dout * mask *
    act(gate), dmask[j] = sum over rows of dout * act(gate) * up - the product without the mask,
    so a unit with mask 0 can come back. Backward saves only `gate`, `up` and `mask`. No
    atomics: the same inputs on the same device give the same bits, whatever the thread count.

    Args:
        gate, up: (..., F) float32, bfloat16 or float16; float64 by the reference. Any strides.
        mask: (F,) float32, on the same device; float64 with float64 inputs.
        activation: "silu", or "gelu_tanh" (Gemma).
        backend: "auto", "reference", "cpp" or "triton"; `auto` leaves float64 to the reference.

    Returns:
        (..., F), contiguous, the dtype of `gate`.

    Raises:
        ValueError: shapes that do not agree, an unknown activation or backend.
        TypeError: dtypes that do not agree, or that an explicit backend does not take.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskPrune, arXiv 2502.14008, section 3.1 (the printed FFN forward).
    """
    if gate.dim() == 0 or gate.shape != up.shape or mask.shape != gate.shape[-1:]:
        raise ValueError(
            f"masked_swiglu: gate is {tuple(gate.shape)}, up {tuple(up.shape)}, mask "
            f"{tuple(mask.shape)}; expected (..., F), (..., F), (F,)"
        )
    wanted = torch.float64 if gate.dtype == torch.float64 else torch.float32
    if not gate.is_floating_point() or gate.dtype != up.dtype or mask.dtype != wanted:
        raise TypeError(
            f"masked_swiglu: gate is {gate.dtype}, up {up.dtype}, mask {mask.dtype}; expected one "
            f"floating dtype for gate and up, and a {wanted} mask; convert with .to()"
        )
    if gate.device != up.device or gate.device != mask.device:
        raise ValueError(
            f"masked_swiglu: gate is on {gate.device}, up on {up.device}, mask on {mask.device}; "
            "move them to one device"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"masked_swiglu: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    out: torch.Tensor = torch.ops.maskprune.masked_swiglu(gate, up, mask, activation, backend)
    return out


def reference(
    gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, activation: str = "silu"
) -> torch.Tensor:
    """The definition, differentiable by autograd."""
    g, u = gate.to(mask.dtype), up.to(mask.dtype)
    f = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    return (f * u * mask).to(gate.dtype)


def reference_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `reference`: dgate, dup, dmask."""
    d, g, u = dout.to(mask.dtype), gate.to(mask.dtype), up.to(mask.dtype)
    if activation == "silu":
        f, dg = F.silu(g), torch.ops.aten.silu_backward(d * mask * u, g)
    else:
        f = F.gelu(g, approximate="tanh")
        dg = torch.ops.aten.gelu_backward(d * mask * u, g, approximate="tanh")
    dm = (d * (f * u)).reshape(-1, mask.numel()).sum(0) if d.numel() else torch.zeros_like(mask)
    return dg.to(gate.dtype), (d * mask * f).to(gate.dtype), dm


def cpp_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor,
    activation: str = "silu",
    isa: str = "auto",
) -> torch.Tensor:
    """The compiled forward; `isa` forces "avx512", "avx2" or "portable"."""
    g, u, m = as_rows(gate, mask.numel()), as_rows(up, mask.numel()), mask.contiguous()
    out = torch.empty(gate.shape, dtype=gate.dtype)
    compiled().masked_swiglu_forward(
        g.data_ptr(),
        g.stride(0),
        u.data_ptr(),
        u.stride(0),
        m.data_ptr(),
        out.data_ptr(),
        *g.shape,
        DTYPE_CODES[gate.dtype],
        activation,
        torch.get_num_threads(),
        isa,
    )
    return out


def cpp_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor,
    activation: str = "silu",
    isa: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The compiled gradients: dgate, dup, dmask."""
    d, g, u = (as_rows(x, mask.numel()) for x in (dout, gate, up))
    m = mask.contiguous()
    dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
    dmask = torch.empty(mask.shape, dtype=mask.dtype)
    compiled().masked_swiglu_backward(
        d.data_ptr(),
        d.stride(0),
        g.data_ptr(),
        g.stride(0),
        u.data_ptr(),
        u.stride(0),
        m.data_ptr(),
        dgate.data_ptr(),
        dup.data_ptr(),
        dmask.data_ptr(),
        *g.shape,
        DTYPE_CODES[gate.dtype],
        activation,
        torch.get_num_threads(),
        isa,
    )
    return dgate, dup, dmask


def _forward(
    gate: torch.Tensor, up: torch.Tensor, mask: torch.Tensor, activation: str, backend: str
) -> torch.Tensor:
    match choose("masked_swiglu", backend, gate, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_forward(gate, up, mask, activation)
        case Backend.TRITON:
            from maskprune.kernels.masked_swiglu import forward

            g, u = (as_rows(x, mask.numel()) for x in (gate, up))
            return forward(g, u, mask.contiguous(), activation).view(gate.shape)
    return reference(gate, up, mask, activation).contiguous()


def _backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    mask: torch.Tensor,
    activation: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    match choose("masked_swiglu", backend, gate, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_backward(dout, gate, up, mask, activation)
        case Backend.TRITON:
            from maskprune.kernels.masked_swiglu import backward

            d, g, u = (as_rows(x, mask.numel()) for x in (dout, gate, up))
            dgate, dup, dmask = backward(d, g, u, mask.contiguous(), activation)
            return dgate.view(gate.shape), dup.view(up.shape), dmask
    dgate, dup, dmask = reference_backward(dout, gate, up, mask, activation)
    return dgate.contiguous(), dup.contiguous(), dmask


def _save(ctx: Context, inputs: Inputs, output: torch.Tensor) -> None:
    gate, up, mask, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up, mask)


def _gradients(ctx: Context, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.maskprune.masked_swiglu_backward(
        dout, *ctx.saved_tensors, ctx.activation, ctx.backend
    )
    return (*grads, None, None)


_INPUTS = "Tensor gate, Tensor up, Tensor mask, str activation, str backend"
register(
    f"masked_swiglu({_INPUTS}) -> Tensor",
    _forward,
    lambda gate, up, mask, activation, backend: gate.new_empty(gate.shape),
    gradients=_gradients,
    save=_save,
)
register(
    f"masked_swiglu_backward(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, gate, up, mask, *_: tuple(x.new_empty(x.shape) for x in (gate, up, mask)),
)
