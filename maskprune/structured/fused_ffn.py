"""The FFN of a stock model with its activation, product and mask as one operation.

`down_proj(act(gate_proj(x)) * up_proj(x) * mask)` keeps one (tokens, F) tensor less than the hook
that scales down_proj's input, and reads and writes memory once where the stock code does it three
times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from maskprune import ops
from maskprune.ops.masked_swiglu import reference

MaskGetter = Callable[[], torch.Tensor | None]


def fuse_ffn(mlp: nn.Module, activation: str, mask_getter: MaskGetter) -> Callable[[], None]:
    """Make one gated FFN compute down_proj(act(gate) * up * mask) with `ops.masked_swiglu`.

    Only this instance's forward changes. Its projections are looked up at every call, so PEFT
    adapters around them, added before or after, take part; down_proj is called as a module, so
    its hooks still run.

    Args:
        mlp: a transformers FFN with gate_proj and up_proj, or gate_up_proj; and down_proj.
        activation: "silu" or "gelu_tanh", what the FFN computes.
        mask_getter: returns the mask (F,) of this call, or None for the stock forward.

    Returns:
        A function that restores the stock forward.

    Raises:
        ValueError: an FFN of another structure or activation.
        RuntimeError: something else has replaced this instance's forward.
    """
    if reason := unfusable(mlp, activation):
        if "forward" in vars(mlp):
            raise RuntimeError(f"fuse_ffn: {reason}; use the hook: attach_masks(fused=False)")
        raise ValueError(f"fuse_ffn: {reason}; use the hook: attach_masks(fused=False)")
    # A partial over the module, not a closure: copy.deepcopy then binds the copy's own module.
    mlp.forward = partial(_forward, mlp, activation, mask_getter)
    return partial(delattr, mlp, "forward")


def unfusable(mlp: nn.Module, activation: str) -> str | None:
    """Why `fuse_ffn` would refuse this FFN; None if it would not."""
    name = type(mlp).__name__
    if "forward" in vars(mlp):
        return f"the forward of this {name} has been replaced already"
    gated = hasattr(mlp, "gate_up_proj") or (hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"))
    if not (gated and hasattr(mlp, "down_proj") and callable(activation_of(mlp))):
        return f"{name} is not a gated FFN with gate_proj, up_proj, down_proj and act_fn"
    if getattr(mlp, "residual_dropout", 0):
        return f"this {name} ends in dropout, which the operation does not do"
    if not is_activation(mlp, activation):
        return f"the activation of this {name}, {activation_of(mlp)}, is not {activation}"
    return None


def activation_of(mlp: nn.Module) -> Any:
    """The activation of a transformers FFN; None where it has none of the usual names."""
    return getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))


def is_activation(mlp: nn.Module, activation: str) -> bool:
    """Whether this FFN computes what `ops.masked_swiglu` calls `activation`."""
    probe = torch.linspace(-4.0, 4.0, 33)
    ones = torch.ones_like(probe)
    expected = reference(probe, ones, ones, activation)
    return torch.allclose(activation_of(mlp)(probe), expected, atol=1e-6)


def _forward(mlp: Any, activation: str, mask_getter: MaskGetter, x: torch.Tensor) -> torch.Tensor:
    mask = mask_getter()
    if mask is None:
        return type(mlp).forward(mlp, x)
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    mask = mask.to(torch.promote_types(mask.dtype, gate.dtype))
    return mlp.down_proj(ops.masked_swiglu(gate, up, mask, activation=activation))
