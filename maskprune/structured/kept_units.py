"""FFNs that compute the units that stay and no others, while the masks rest at 0 and 1.

Under its mask an FFN multiplies by 0 what it has computed for every pruned unit. Here the frozen
weights of each FFN are put in another order, the units that stay first, so that the student takes
views of them, without a copy (weights mapped from a file get memory of their own). The teacher
computes with all of them. Adapters, masks and what a checkpoint holds keep their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from maskprune import ops
from maskprune.hf.families import FAMILIES, get_submodule, layers_of
from maskprune.structured.fused_ffn import activation_of, is_activation
from maskprune.structured.masks import Masks, is_of_masks


def compute_kept_units(model: nn.Module, masks: Masks) -> Callable[[], None]:
    """Make every FFN of a masked model, where its structure is known, skip its pruned units.

    With masks off the model computes as before, but for the order in which W_down adds up. An FFN
    stays under its mask where it has no gate, ends in dropout, or has a projection whose weight is
    trained, shared with another layer or stored otherwise than as a plain linear's, that has
    hooks, or whose adapters are not plain LoRA, unmerged and without dropout.

    Args:
        model: a stock model under its masks, or the PEFT model around it; its adapters' weights
            keep their order and may be trained.
        masks: of the model; each FFN mask 0 or 1.

    Returns:
        A function that puts back order and forwards, values to the bit; `masks.detach()` calls it
        first. Until then the weights of these FFNs must not be exported or saved.

    Raises:
        ValueError: an FFN mask that is neither 0 nor 1.
    """
    m = masks.ffn.detach()
    if not bool(((m == 0) | (m == 1)).all()):
        raise ValueError("FFN masks are not all 0 or 1, so pruned units still count in the sum")
    family = FAMILIES[masks.family]
    put_back = PutBack()
    undo = put_back.steps
    ffns: list[tuple[int, Any, list[Any], Any]] = []
    for index, layer in enumerate(layers_of(model) if family.gated else []):
        mlp: Any = get_submodule(layer, family.ffn)
        first = [getattr(mlp, name) for name in family.gate_up]
        ffns.append((index, mlp, first, getattr(mlp, family.down)))
    uses = Counter(_base(p).weight.data_ptr() for *_, first, down in ffns for p in (*first, down))
    masks._undo.insert(0, put_back)
    try:
        for index, mlp, first, down in ffns:
            linears = (*first, down)
            shared = any(uses[_base(linear).weight.data_ptr()] > 1 for linear in linears)
            dropout = getattr(mlp, "residual_dropout", 0)
            if shared or dropout or not all(map(_can_reorder, linears)):
                continue
            kept, gone = (m[index] != 0).nonzero()[:, 0], (m[index] == 0).nonzero()[:, 0]
            order = torch.cat([kept, gone])
            rows = torch.cat([order, len(order) + order]) if family.fused else order
            for linear in first:
                _reorder(linear, rows, 0, undo)
            _reorder(down, order, 1, undo)
            _replace_forward(mlp, masks, kept, undo)
    except BaseException:
        put_back()
        raise
    return put_back


class PutBack:
    """Takes the changes back, last first; a class, so that a masked model is copied and pickled
    with its own."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []

    def __call__(self) -> None:
        while self.steps:
            self.steps[-1]()
            self.steps.pop()


def _base(linear: Any) -> Any:
    return getattr(linear, "base_layer", linear)


def _can_reorder(linear: Any) -> bool:
    base = _base(linear)
    if type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    for module in {linear, base}:
        hooks = [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
            *module._backward_pre_hooks.values(),
        ]
        if not all(map(is_of_masks, hooks)):
            return False
    if base is linear:
        return True
    dropouts = linear.lora_dropout.values()
    plain = not linear.merged and not getattr(linear, "lora_variant", None)
    return plain and all(isinstance(dropout, nn.Identity) for dropout in dropouts)


def _reorder(linear: Any, order: torch.Tensor, dim: int, undo: list[Callable[[], None]]) -> None:
    """Put a linear's rows (dim 0) or columns in another order; `undo` gets the way back."""
    base = _base(linear)
    tensors = [base.weight] if dim or base.bias is None else [base.weight, base.bias]
    for tensor in tensors:
        before = tensor.detach().clone()
        # Until the tensor is in its new order, an interrupt may come before the copy or after it.
        undo.append(partial(_copy, tensor, before))
        _copy(tensor, before.index_select(dim, order))
        undo[-1] = partial(_put, tensor, dim, order.argsort())


@torch.no_grad()
def _copy(tensor: torch.Tensor, values: torch.Tensor) -> None:
    tensor.copy_(values)


@torch.no_grad()
def _put(tensor: torch.Tensor, dim: int, order: torch.Tensor) -> None:
    tensor.copy_(tensor.index_select(dim, order))


def _replace_forward(
    mlp: Any, masks: Masks, kept: torch.Tensor, undo: list[Callable[[], None]]
) -> None:
    before = vars(mlp).get("forward")
    whole = before or partial(type(mlp).forward, mlp)
    fused = is_activation(mlp, FAMILIES[masks.family].activation)
    undo.append(
        partial(delattr, mlp, "forward")
        if before is None
        else partial(setattr, mlp, "forward", before)
    )
    mlp.forward = partial(_forward, mlp, masks, kept, whole, fused)


def _forward(
    mlp: Any,
    masks: Masks,
    kept: torch.Tensor,
    whole: Callable[[torch.Tensor], torch.Tensor],
    fused: bool,
    x: torch.Tensor,
) -> torch.Tensor:
    if not masks.enabled:
        return whole(x)
    family, n = FAMILIES[masks.family], len(kept)
    names = family.gate_up
    if family.fused:
        linear = getattr(mlp, names[0])
        width = masks.shape.ffn
        gate = _linear(linear, x, slice(0, n), kept)
        up = _linear(linear, x, slice(width, width + n), width + kept)
    else:
        gate, up = (_linear(getattr(mlp, name), x, slice(0, n), kept) for name in names)
    if fused and x.is_cuda:
        ones = torch.ones(n, device=x.device, dtype=torch.promote_types(gate.dtype, torch.float32))
        h = ops.masked_swiglu(gate, up, ones, activation=family.activation)
    else:
        h = activation_of(mlp)(gate) * up
    return _linear(getattr(mlp, family.down), h, None, kept)


def _linear(linear: Any, x: torch.Tensor, rows: slice | None, units: torch.Tensor) -> torch.Tensor:
    """A linear with its adapters on the units that stay: rows of the weight, or its columns.

    Args:
        rows: where the units are in the reordered weight; None: its first columns.
        units: where they are in the adapter's.
    """
    base = _base(linear)
    if rows is not None:
        bias = None if base.bias is None else base.bias[rows]
        y = functional.linear(x, base.weight[rows], bias)
    else:
        y = functional.linear(x, base.weight[:, : len(units)], base.bias)
    if base is linear or linear.disable_adapters:
        return y
    dtype = y.dtype
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        a, b = linear.lora_A[name].weight, linear.lora_B[name].weight
        if rows is None:
            a = a.index_select(1, units)
        else:
            b = b.index_select(0, units)
        low = functional.linear(x.to(a.dtype), a)
        y = y + functional.linear(low, b) * linear.scaling[name]
    return y.to(dtype)
