"""Masked model to stock model: merge, fold, shrink, write, and prove the logits equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskprune import ops
from maskprune.cuts import Cut, Shape, layer_cuts, pruned_shape
from maskprune.families import FAMILIES, family_of, stock_model
from maskprune.masks import Masks
from maskprune.stock import write_stock_files
from maskprune.target import target_config

# Share of the largest logit that rounding may move; half precision rounds weights and activations.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart on the same tokens."""

    largest: float
    largest_logit: float
    top1_agreement: float

    @property
    def relative(self) -> float:
        """Largest absolute difference over the largest absolute logit."""
        return self.largest / self.largest_logit if self.largest_logit else self.largest


def final_shape(masks: Masks) -> Shape:
    """The uniform shape that `masks` leave; refuses masks that are not uniform, NaN or empty."""
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


def cuts_by_name(masks: Masks) -> dict[str, Cut]:
    """The cut of every tensor of the stock state dict that pruning touches."""
    family, heads = FAMILIES[masks.family], masks.query_heads()
    cuts = {}
    for layer in range(masks.shape.layers):
        head = None if heads is None else heads[layer].cpu()
        ffn = masks.ffn[layer].detach().cpu()
        for name, cut in layer_cuts(family, masks.shape, masks.head_unit, head, ffn).items():
            cuts[f"{family.layers}.{layer}.{name}"] = cut
    return cuts


def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The stock state dict with adapters merged in float32, tensor by tensor.

    A merged weight comes in float32, to be rounded once, after the fold; others as they are.
    """
    base = stock_model(model)
    adapted = {
        name: module
        for name, module in base.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    for name, tensor in base.state_dict().items():
        if name.startswith("maskprune.") or ".lora_" in name:
            continue
        parent, _, leaf = name.rpartition(".")
        owner = parent.removesuffix(".base_layer")
        if owner in adapted and leaf == "weight":
            tensor = tensor.float()
            for adapter in adapted[owner].active_adapters:
                tensor = tensor + adapted[owner].get_delta_weight(adapter).float()
        yield (f"{owner}.{leaf}" if owner in adapted else name), tensor


def export(model: nn.Module, masks: Masks, *, arch_fallback: str = "mistral") -> Any:
    """A new stock transformers model with the masks folded in and the pruned units gone.

    Exact: head masks go into the columns of W_O, FFN masks into the columns of W_down. The given
    model is left as it was. Merged weights are folded in float32 and rounded once.

    Args:
        model: the masked model, or the PEFT model around it (its active adapters are merged).
        masks: uniform masks; pruned units are exactly 0.
        arch_fallback: see `target_config`.

    Raises:
        ValueError: masks that are not uniform, or a shape that no stock class takes.

    Source: MaskPrune (arXiv 2502.14008), section 3.2, with the fold mended (docs/method.md).
    """
    from transformers import AutoModelForCausalLM

    base = stock_model(model)
    family_of(base.config)
    config = target_config(base.config, final_shape(masks), arch_fallback)
    dtype = base.dtype
    small = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cuts = cuts_by_name(masks)
    weights = {}
    for name, tensor in merged_weights(model):
        tensor = tensor.detach()
        if name in cuts:
            tensor = apply_cut(tensor, cuts[name])
        weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    missing, unexpected = small.load_state_dict(weights, strict=False)
    tied = set(getattr(small, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"export lost tensors: missing {missing}, unexpected {unexpected}")
    small.tie_weights()
    small.generation_config = base.generation_config
    small.config.architectures = [type(small).__name__]
    return small.to(base.device).eval()


@torch.no_grad()
def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """float64 logits of a model on `input_ids` (B, T), in eval mode."""
    training = model.training
    model.eval()
    logits: torch.Tensor = model(input_ids=input_ids).logits.double()
    model.train(training)
    return logits


def difference_of(x: torch.Tensor, y: torch.Tensor) -> Difference:
    """How far logits `y` are from `x`."""
    y = y.to(x.device)
    return Difference(
        largest=float((x - y).abs().max()),
        largest_logit=float(x.abs().max()),
        top1_agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
    )


def compare_logits(a: nn.Module, b: nn.Module, input_ids: torch.Tensor) -> Difference:
    """The largest difference of two models' logits on `input_ids` (B, T), in eval mode."""
    return difference_of(logits_of(a, input_ids), logits_of(b, input_ids))


def require_equal(difference: Difference, dtype: torch.dtype) -> None:
    """Refuse an export whose logits are not the masked model's.

    Raises:
        RuntimeError: they are further apart than rounding in `dtype` explains.
    """
    if not difference.relative <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the exported logits differ from the masked model's by {difference.largest:.2e} of "
            f"{difference.largest_logit:.1f}; expected at most {TOLERANCE[dtype]} of the largest; "
            "nothing was written; please report this with the settings"
        )


def save_stock(
    small: Any,
    out: Path,
    *,
    source: Path | None = None,
    tokenizer: Any = None,
    model_card: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write `small` into the folder `out` as a checkpoint that transformers 4 and 5 load."""
    small.save_pretrained(out, max_shard_size=max_shard_size)
    write_stock_files(
        out,
        small.config,
        source=source,
        tokenizer=tokenizer,
        generation_config=small.generation_config,
        model_card=model_card,
    )
