"""Masked model to stock model: merge, fold, shrink, write, and prove the logits equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from maskprune import ops
from maskprune.hf.adapters import adapted_layers, merged_weight, require_mergeable
from maskprune.hf.families import FAMILIES, stock_model
from maskprune.hf.pruned_config import target_config, zero_tensors
from maskprune.hf.shape import Shape
from maskprune.structured.cuts import Cut, layer_cuts, pruned_shape
from maskprune.structured.masks import Masks, require_same_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def final_shape(masks: Masks) -> Shape:
    """The uniform shape that `masks` leave.

    Raises:
        ValueError: masks that are not uniform, hold NaN or keep nothing.
    """
    return pruned_shape(masks.head.detach(), masks.ffn.detach(), masks.shape, masks.head_unit)


def apply_cut(weight: torch.Tensor, cut: Cut) -> torch.Tensor:
    """`weight` cut (and folded, with one rounding) along `cut.dim`."""
    keep = cut.keep.to(weight.device)
    if weight.dim() == 1:
        return ops.gather_rows(weight, keep)
    turned = weight if (cut.dim == 0) == (cut.scale is None) else weight.T.contiguous()
    if cut.scale is None:
        out = ops.gather_rows(turned, keep)
    else:
        out = ops.fold_columns(turned, cut.scale.to(weight.device), keep)
    return out if turned is weight else out.T.contiguous()


def cuts_by_name(masks: Masks, model_type: str | None = None) -> dict[str, Cut]:
    """The cut of every tensor that pruning touches, by its name in the result.

    model_type: the class of the result, where it is not the family of the masks.
    """
    family, heads = FAMILIES[masks.family], masks.query_heads()
    result = FAMILIES[model_type or masks.family]
    unfuse = result if family.fused and not result.fused else None
    cuts = {}
    for layer in range(masks.shape.layers):
        head = None if heads is None else heads[layer].cpu()
        ffn = masks.ffn[layer].detach().cpu()
        stem = f"{family.layers}.{layer}."
        of_layer = layer_cuts(family, masks.shape, masks.head_unit, head, ffn, unfuse)
        for name, cut in of_layer.items():
            source = None if cut.source is None else stem + cut.source
            cuts[stem + name] = replace(cut, source=source)
    return cuts


def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The stock state dict with adapters merged, tensor by tensor.

    Merged weights are float32 (float64 in a float64 model), so that they are rounded only once,
    after the fold; others keep their dtype.

    Raises:
        ValueError: adapters that cannot be merged exactly.
    """
    require_mergeable(model)
    base = stock_model(model)
    adapted = adapted_layers(base)
    for name, tensor in base.state_dict().items():
        if name.startswith("maskprune.") or ".lora_" in name:
            continue
        parent, _, leaf = name.rpartition(".")
        owner = parent.removesuffix(".base_layer")
        if owner in adapted and leaf == "weight":
            tensor = merged_weight(adapted[owner], tensor)
        stock_name = f"{owner}.{leaf}" if owner in adapted else name
        # A layer that was compiled on its own has this in the middle of its name.
        yield stock_name.replace("_orig_mod.", ""), tensor


def export(model: nn.Module, masks: Masks, *, arch_fallback: str = "mistral") -> PreTrainedModel:
    """A new stock transformers model with the masks folded in and the pruned units removed.

    Exact: head masks go into the columns of W_O, FFN masks into the columns of W_down. The given
    model is left as it was. Merged weights are folded in float32 (float64 in a float64 model) and
    rounded once.

    Args:
        model: the masked model, or the PEFT model around it (its active adapters, plain LoRA, are
            merged), compiled or not.
        masks: uniform masks; pruned units are exactly 0.
        arch_fallback: see `pruned_class`.

    Raises:
        ValueError: masks that are not uniform or are of another model, a shape that no stock
            class takes, or adapters that cannot be merged exactly.

    Source: MaskPrune (arXiv 2502.14008), section 3.2, with the fold corrected (docs/method.md).
    """
    from transformers import AutoModelForCausalLM

    base = stock_model(model)
    require_same_model(masks, base.config, "the model")
    config = target_config(base.config, final_shape(masks), arch_fallback)
    dtype = base.dtype
    small = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cuts: dict[str, dict[str, Cut]] = defaultdict(dict)
    for name, cut in cuts_by_name(masks, config.model_type).items():
        cuts[cut.source or name][name] = cut
    weights = {}
    for source, tensor in merged_weights(model):
        tensor = tensor.detach()
        pieces = {name: apply_cut(tensor, cut) for name, cut in cuts.get(source, {}).items()}
        for name, piece in (pieces or {source: tensor}).items():
            weights[name] = piece.to(dtype) if piece.is_floating_point() else piece
    own = small.state_dict()
    weights |= {name: torch.zeros_like(own[name]) for name in zero_tensors(base.config, config)}
    missing, unexpected = small.load_state_dict(weights, strict=False)
    tied = set(getattr(small, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"export lost tensors: missing {missing}, unexpected {unexpected}")
    # Position tables: `from_config` computes GPT-J's in `dtype`, `from_pretrained` does not.
    own = dict(small.named_buffers())
    for name, table in base.named_buffers():
        if name in own and own[name].shape == table.shape:
            own[name].copy_(table)
    small.tie_weights()
    small.generation_config = base.generation_config
    small.config.architectures = [type(small).__name__]
    return small.to(base.device).eval()
