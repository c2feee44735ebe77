"""out = x, each head multiplied by its mask, and its gradients: the masked input of o_proj."""

from __future__ import annotations

import torch

from maskprune.ops.backend import DTYPE_CODES, FLOATS, Backend, choose, compiled
from maskprune.ops.register import Context, Inputs, register
from maskprune.ops.rows import as_rows


def scale_heads(x: torch.Tensor, mask: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """out[..., h * d_h + i] = x[..., h * d_h + i] * mask[h], with d_h = x.shape[-1] / H

    The product is float32 (float64 for float64 inputs), rounded once to the dtype of `x`. The
    unfused form `x * mask.to(dtype)` rounds the mask too: equal in float32, within three
    roundings, 3 * 2^-8 of the value, in bfloat16.

    Gradients, rounded once each: dx = dout * mask, dmask[h] = sum over rows and i of dout * x -
    the product without the mask, so a head with mask 0 can come back. Backward saves only `x`
    and `mask`. No atomics: the same inputs on the same device give the same bits, whatever the
    thread count.

    Args:
        x: (..., H * d_h) float32, bfloat16 or float16; float64 by the reference. Any strides.
        mask: (H,) float32, on the same device; float64 with float64 inputs.
        backend: "auto", "reference", "cpp" or "triton"; `auto` leaves float64 to the reference.

    Returns:
        (..., H * d_h), contiguous, the dtype of `x`.

    Raises:
        ValueError: H does not divide the last axis, two devices, or an unknown backend.
        TypeError: dtypes that do not agree, or that an explicit backend does not take.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskPrune, arXiv 2502.14008, section 3.1 (the head mask of MHA).
    """
    if x.dim() == 0 or mask.dim() != 1 or not mask.numel() or x.shape[-1] % mask.numel():
        raise ValueError(
            f"scale_heads: x is {tuple(x.shape)}, mask {tuple(mask.shape)}; expected "
            "(..., H * d_h) and (H,) with H >= 1; pass one mask value for each query head"
        )
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not x.is_floating_point() or mask.dtype != wanted:
        raise TypeError(
            f"scale_heads: x is {x.dtype}, mask {mask.dtype}; expected a floating x and a "
            f"{wanted} mask; convert with .to()"
        )
    if x.device != mask.device:
        raise ValueError(
            f"scale_heads: x is on {x.device}, mask on {mask.device}; move them to one device"
        )
    out: torch.Tensor = torch.ops.maskprune.scale_heads(x, mask, backend)
    return out


def reference(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The definition, differentiable by autograd."""
    heads = x.to(mask.dtype).unflatten(-1, (mask.numel(), -1))
    return (heads * mask[:, None]).flatten(-2).to(x.dtype)


def reference_backward(
    dout: torch.Tensor, x: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `reference`: dx, dmask."""
    product = dout.to(mask.dtype) * x.to(mask.dtype)
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    dm = product.reshape(rows, mask.numel(), x.shape[-1] // mask.numel()).sum((0, 2))
    return reference(dout, mask), dm


def cpp_forward(x: torch.Tensor, mask: torch.Tensor, isa: str = "auto") -> torch.Tensor:
    """The compiled forward; `isa` forces "avx512", "avx2" or "portable"."""
    rows, m = as_rows(x, x.shape[-1]), mask.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    compiled().scale_heads_forward(
        rows.data_ptr(),
        rows.stride(0),
        m.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        m.numel(),
        x.shape[-1] // m.numel(),
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        isa,
    )
    return out


def cpp_backward(
    dout: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, isa: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compiled gradients: dx, dmask."""
    d, rows, m = as_rows(dout, x.shape[-1]), as_rows(x, x.shape[-1]), mask.contiguous()
    dx, dmask = torch.empty(x.shape, dtype=x.dtype), torch.empty(mask.shape, dtype=mask.dtype)
    compiled().scale_heads_backward(
        d.data_ptr(),
        d.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        m.data_ptr(),
        dx.data_ptr(),
        dmask.data_ptr(),
        rows.shape[0],
        m.numel(),
        x.shape[-1] // m.numel(),
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        isa,
    )
    return dx, dmask


def _forward(x: torch.Tensor, mask: torch.Tensor, backend: str) -> torch.Tensor:
    match choose("scale_heads", backend, x, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_forward(x, mask)
        case Backend.TRITON:
            from maskprune.kernels.scale_heads import forward

            return forward(as_rows(x, x.shape[-1]), mask.contiguous()).view(x.shape)
    return reference(x, mask).contiguous()


def _backward(
    dout: torch.Tensor, x: torch.Tensor, mask: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    match choose("scale_heads", backend, x, dtypes=FLOATS):
        case Backend.CPP:
            return cpp_backward(dout, x, mask)
        case Backend.TRITON:
            from maskprune.kernels.scale_heads import backward

            d, rows = as_rows(dout, x.shape[-1]), as_rows(x, x.shape[-1])
            dx, dmask = backward(d, rows, mask.contiguous())
            return dx.view(x.shape), dmask
    dx, dmask = reference_backward(dout, x, mask)
    return dx.contiguous(), dmask


def _save(ctx: Context, inputs: Inputs, output: torch.Tensor) -> None:
    x, mask, ctx.backend = inputs
    ctx.save_for_backward(x, mask)


def _gradients(ctx: Context, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dmask = torch.ops.maskprune.scale_heads_backward(dout, *ctx.saved_tensors, ctx.backend)
    return dx, dmask, None


register(
    "scale_heads(Tensor x, Tensor mask, str backend) -> Tensor",
    _forward,
    lambda x, mask, backend: x.new_empty(x.shape),
    gradients=_gradients,
    save=_save,
)
register(
    "scale_heads_backward(Tensor dout, Tensor x, Tensor mask, str backend) -> (Tensor, Tensor)",
    _backward,
    lambda dout, x, mask, backend: (x.new_empty(x.shape), mask.new_empty(mask.shape)),
)
