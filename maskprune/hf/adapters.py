"""Which PEFT adapters are plain LoRA, W + scaling * B A: what both exports can merge exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from maskprune.files import JsonObject
from maskprune.hf.families import stock_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import Linear


# PEFT options that change the merge, each with the values that leave it off.
_PLAIN: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
}
_DO = "merge it with peft first (merge_and_unload, then save_pretrained)"


def unmergeable(config: JsonObject) -> str | None:
    """Why an adapter of this config is not plain LoRA; None where it is.

    Args:
        config: what adapter_config.json holds, or `to_dict()` of a PEFT config.
    """
    kind = getattr(config["peft_type"], "value", config["peft_type"])
    used = [key for key, plain in _PLAIN.items() if key in config and config[key] not in plain]
    if kind == "LORA" and not used:
        return None
    what = kind if kind != "LORA" else ", ".join(f"{key}={config[key]!r}" for key in used)
    return f"is not plain LoRA ({what}); {_DO}"


def adapted_layers(base: nn.Module) -> dict[str, Linear]:
    """PEFT's layers in a stock model that add to a weight, by the name of the layer."""
    return {
        name: module
        for name, module in base.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


def require_mergeable(model: nn.Module) -> None:
    """Refuse a model whose adapters cannot be merged exactly into stock weights.

    Args:
        model: a transformers model or the PEFT model around it.

    Raises:
        ValueError: an adapter that is not plain LoRA, or one on weights that another name shares.
    """
    base = stock_model(model)
    for name, config in (getattr(model, "peft_config", None) or _configs(base)).items():
        # Biases that are trained in place are in the weights already.
        given = config.to_dict() | {"bias": "none"}
        if reason := unmergeable(given):
            raise ValueError(f"adapter {name!r} {reason}")
    layers = adapted_layers(base)
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name.replace(".base_layer", ""))
    for name, layer in layers.items():
        if getattr(layer, "lora_variant", None):
            variant = type(next(iter(layer.lora_variant.values()))).__name__
            raise ValueError(f"the adapter on {name} is not plain LoRA ({variant}); {_DO}")
        shared = names.get(id(layer.base_layer.weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"an adapter is on {name}, whose weight the model ties to another "
                f"({', '.join(shared)}), so that it cannot be merged into one of them; leave "
                f"{name.rpartition('.')[2]} out of the adapter's target modules"
            )
        if layer.merged and layer.disable_adapters:
            raise ValueError(
                f"the adapter on {name} is merged and disabled; call unmerge_adapter() first"
            )


def _configs(base: nn.Module) -> dict[str, PeftConfig]:
    # Adapters can also be inside a stock model, without PEFT's wrapper.
    return getattr(base, "peft_config", None) or {}


def merged_weight(layer: Linear, weight: torch.Tensor) -> torch.Tensor:
    """The weight with the active adapters merged, in float32; float64 stays float64."""
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # PEFT's forward adds nothing to a layer that has merged some of its adapters.
    if layer.disable_adapters or layer.merged:
        return merged
    for adapter in layer.active_adapters:
        if adapter in layer.r:
            merged = merged + layer.get_delta_weight(adapter).to(merged.dtype)
    return merged
