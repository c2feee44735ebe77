"""FFNs that compute the units that stay and no others, while the masks rest at 0 and 1.

Under its mask an FFN multiplies by 0 what it has computed for every pruned unit. Here the frozen
weights of each FFN are put in another order, the units that stay first, so that the student takes
views of them and nothing is copied. The teacher computes with all of them. Adapters, masks and
what a checkpoint holds keep their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from maskprune import ops
from maskprune.hf.families import FAMILIES, get_submodule, layers_of
from maskprune.structured.masks import Masks


def compute_kept_units(model: nn.Module, masks: Masks) -> Callable[[], None]:
    """Make every FFN of a masked model, where its structure is known, skip its pruned units.

    With masks off the model computes as before, but for the order in which W_down adds up. FFNs
    without a gate, and those whose weights are trained, stored otherwise than as a plain linear,
    or have hooks, stay under their mask.

    Args:
        model: a stock model under its masks, or the PEFT model around it; its adapters' weights
            keep their order and may be trained.
        masks: of the model; each FFN mask 0 or 1.

    Returns:
        A function that puts back order and forwards; values are restored to the bit.

    Raises:
        ValueError: an FFN mask that is neither 0 nor 1.
    """
    m = masks.ffn.detach()
    if not bool(((m == 0) | (m == 1)).all()):
        raise ValueError("FFN masks are not all 0 or 1, so pruned units still count in the sum")
    family = FAMILIES[masks.family]
    undo: list[Callable[[], None]] = []
    for index, layer in enumerate(layers_of(model) if family.gated else []):
        mlp: Any = get_submodule(layer, family.ffn)
        first = [getattr(mlp, name) for name in family.gate_up]
        down = getattr(mlp, family.down)
        if not all(_can_reorder(linear) for linear in (*first, down)):
            continue
        kept, gone = (m[index] != 0).nonzero()[:, 0], (m[index] == 0).nonzero()[:, 0]
        order = torch.cat([kept, gone])
        width = len(order)
        rows = torch.cat([order, width + order]) if family.fused else order
        changes = [(linear, rows, 0) for linear in first] + [(down, order, 1)]
        for linear, places, dim in changes:
            _reorder(linear, places, dim)
        before = vars(mlp).get("forward")
        whole = before or partial(type(mlp).forward, mlp)
        mlp.forward = partial(_forward, mlp, masks, family.model_type, kept, whole)
        undo.append(partial(_restore, mlp, before, changes))

    def put_back() -> None:
        while undo:
            undo.pop()()

    return put_back


def _base(linear: Any) -> Any:
    return getattr(linear, "base_layer", linear)


def _can_reorder(linear: Any) -> bool:
    base = _base(linear)
    watched = base._forward_hooks or base._forward_pre_hooks or linear._forward_hooks
    return type(base) is nn.Linear and not base.weight.requires_grad and not watched


@torch.no_grad()
def _reorder(linear: Any, order: torch.Tensor, dim: int) -> None:
    base = _base(linear)
    base.weight.copy_(base.weight.index_select(dim, order))
    if dim == 0 and base.bias is not None:
        base.bias.copy_(base.bias.index_select(0, order))


def _restore(mlp: Any, before: Any, changes: list[tuple[Any, torch.Tensor, int]]) -> None:
    if before is None:
        del mlp.forward
    else:
        mlp.forward = before
    for linear, order, dim in changes:
        _reorder(linear, order.argsort(), dim)


def _forward(
    mlp: Any,
    masks: Masks,
    model_type: str,
    kept: torch.Tensor,
    whole: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    if not masks.enabled:
        return whole(x)
    family, n = FAMILIES[model_type], len(kept)
    names = family.gate_up
    if family.fused:
        linear = getattr(mlp, names[0])
        width = masks.shape.ffn
        gate = _linear(linear, x, slice(0, n), kept)
        up = _linear(linear, x, slice(width, width + n), width + kept)
    else:
        gate, up = (_linear(getattr(mlp, name), x, slice(0, n), kept) for name in names)
    if x.is_cuda:
        ones = torch.ones(n, device=x.device, dtype=torch.promote_types(gate.dtype, torch.float32))
        h = ops.masked_swiglu(gate, up, ones, activation=family.activation)
    else:
        activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
        h = activation(gate) * up
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
