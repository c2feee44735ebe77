"""The config of the pruned checkpoint: which stock class takes the new shape, decided up front."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from maskprune.choices import ARCH_FALLBACKS, require_choice
from maskprune.files import JsonObject
from maskprune.hf.families import FAMILIES, family_of, text_config
from maskprune.hf.shape import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Classes that compute the same function once heads are pruned, and their settings; the first that
# takes the shape is chosen. Which engines read a head size other than hidden / heads in which
# class: maskprune/hf/engines.py.
_TWINS: dict[str, dict[str, JsonObject]] = {
    # The Mistral class takes its default window of 4096 where none is named.
    "llama": {"mistral": {"sliding_window": None}},
    "qwen2": {
        "llama": {"attention_bias": True, "mlp_bias": False},
        "seed_oss": {"attention_bias": True, "mlp_bias": False, "residual_dropout": 0.0},
    },
    "phi3": {"mistral": {}},
}

_SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings "
    "rope_parameters attention_dropout attention_bias mlp_bias sliding_window dtype"
).split()


def pruned_class(
    config: PreTrainedConfig, heads: int, arch_fallback: str = "mistral"
) -> str | None:
    """The model type of a stock class that takes `heads` query heads a layer; None: there is none.

    Args:
        config: transformers config of the model as it is.
        heads: query heads of a layer after pruning.
        arch_fallback: `mistral` chooses the class that most engines run, which for some families
            is another one; `divisor` and `error` stay in the class of the original.
    """
    native: str = config.model_type
    if heads == text_config(config).num_attention_heads:
        return native
    if not family_of(config).prunes_heads:
        return None
    if arch_fallback == "mistral":
        for twin in _TWINS.get(native, {}):
            if _same_function(config, twin) and _takes(config, twin, heads):
                return twin
        if native in ("qwen2", "phi3"):
            return None
    return native if _takes(config, native, heads) else None


def takes_heads(config: PreTrainedConfig, heads: int, arch_fallback: str = "mistral") -> bool:
    """Whether a stock class loads this model with `heads` query heads a layer."""
    return pruned_class(config, heads, arch_fallback) is not None


def why_heads_stay(config: PreTrainedConfig, arch_fallback: str = "mistral") -> str | None:
    """Why no head of this model can be pruned, or None where some can."""
    family = family_of(config)
    if not family.prunes_heads:
        return family.no_heads
    counts = range(1, text_config(config).num_attention_heads)
    if any(takes_heads(config, heads, arch_fallback) for heads in counts):
        return None
    if config.model_type == "qwen2":
        why = "some of its layers attend through a sliding window"
    elif config.model_type == "phi3":
        why = "it rotates a part of each head only"
    else:
        why = "no smaller head count divides its hidden size"
    return f"{why}, which no class that engines run with fewer heads can express"


def _takes(config: PreTrainedConfig, model_type: str, heads: int) -> bool:
    divides = text_config(config).hidden_size % heads == 0
    return divides or not FAMILIES[model_type].heads_divide_hidden


def _same_function(config: PreTrainedConfig, twin: str) -> bool:
    """Whether the class `twin` computes what `config` does."""
    if config.model_type == "llama":
        return not (config.attention_bias or config.mlp_bias)
    if config.model_type == "qwen2":
        return set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", 1.0)) == 1.0


def target_config(
    config: PreTrainedConfig, shape: Shape, arch_fallback: str = "mistral"
) -> PreTrainedConfig:
    """The stock config of `config` cut to `shape`, of the class that `pruned_class` names.

    Args:
        config: transformers config of the model as it is; left as it was.
        shape: the uniform shape to come.
        arch_fallback: see `pruned_class`.

    Raises:
        ValueError: no allowed stock class takes the shape.
    """
    require_choice("arch_fallback", arch_fallback, ARCH_FALLBACKS)
    family, text = family_of(config), text_config(config)
    chosen = pruned_class(config, shape.heads, arch_fallback)
    if chosen is None:
        counts = range(1, text.num_attention_heads + 1)
        legal = [h for h in counts if takes_heads(config, h, arch_fallback)]
        other = takes_heads(config, shape.heads)
        raise ValueError(
            f"the {family.model_type} config class refuses {shape.heads} heads at hidden size "
            f"{text.hidden_size}; choose from {legal}"
            + (", or use --arch-fallback mistral" if other else "")
        )
    small = copy.deepcopy(config)
    if family.prunes_heads:
        if chosen != config.model_type:
            small = _as_class(config, chosen)
        cut = text_config(small)
        cut.num_attention_heads = shape.heads
        cut.num_key_value_heads = shape.kv_heads
        # Without it the class derives the head size from the pruned head count.
        cut.head_dim = shape.head_dim
    setattr(text_config(small), family_of(small).width_field, shape.ffn)
    return small


def zero_tensors(config: PreTrainedConfig, small: PreTrainedConfig) -> list[str]:
    """Names of the tensors that the class of `small` has beyond that of `config`; all are 0."""
    if (config.model_type, small.model_type) != ("qwen2", "llama"):
        return []
    return [f"model.layers.{i}.self_attn.o_proj.bias" for i in range(small.num_hidden_layers)]


def _as_class(config: PreTrainedConfig, model_type: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    fields, kind = config.to_dict(), CONFIG_MAPPING[model_type]
    default = kind()
    known = {n: fields[n] for n in _SHARED_FIELDS if n in fields and hasattr(default, n)}
    return kind(**(known | _TWINS[config.model_type][model_type]))
