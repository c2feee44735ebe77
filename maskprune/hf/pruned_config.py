"""The config of the pruned checkpoint: which stock class takes the new shape, decided up front."""

from __future__ import annotations

import copy
from typing import Any

from maskprune.hf.families import family_of, text_config
from maskprune.hf.shape import Shape

ARCH_FALLBACKS = ("mistral", "divisor", "error")

# What the Mistral class shares with Llama; its own sliding_window defaults to 4096, so it is
# always written as None.
_MISTRAL_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings "
    "rope_parameters attention_dropout dtype"
).split()


def takes_heads(config: Any, heads: int, arch_fallback: str = "mistral") -> bool:
    """Whether a stock config class loads this model with `heads` query heads a layer.

    transformers >= 5.4 refuses a Llama or Gemma config whose hidden size the head count does not
    divide, head size given or not; the Mistral class takes any count with bit-identical logits.
    """
    family, text = family_of(config), text_config(config)
    if heads == text.num_attention_heads or not family.heads_divide_hidden:
        return True
    return text.hidden_size % heads == 0 or (
        arch_fallback == "mistral" and can_become_mistral(config)
    )


def can_become_mistral(config: Any) -> bool:
    """Whether the Mistral class computes the same function: Llama without biases."""
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return family_of(config).twin == "mistral" and not biased


def target_config(config: Any, shape: Shape, arch_fallback: str = "mistral") -> Any:
    """The stock config of `config` cut to `shape`; a Mistral config where Llama's refuses it.

    Args:
        config: transformers config of the model as it is; left as it was.
        shape: the uniform shape to come.
        arch_fallback: `mistral` (go through the Mistral class where needed), `divisor` or `error`
            (stay in the native class).

    Raises:
        ValueError: no allowed stock class takes the shape.
    """
    if arch_fallback not in ARCH_FALLBACKS:
        raise ValueError(
            f"arch_fallback is {arch_fallback!r}; expected one of {', '.join(ARCH_FALLBACKS)}"
        )
    family, text = family_of(config), text_config(config)
    if not takes_heads(config, shape.heads, arch_fallback):
        legal = [h for h in range(1, text.num_attention_heads + 1) if not text.hidden_size % h]
        raise ValueError(
            f"the {family.model_type} config class refuses {shape.heads} heads at hidden size "
            f"{text.hidden_size}; choose from {legal}"
            + (", or use --arch-fallback mistral" if can_become_mistral(config) else "")
        )
    small = copy.deepcopy(config)
    if family.prunes_heads:
        native = not family.heads_divide_hidden or text.hidden_size % shape.heads == 0
        if not native and shape.heads != text.num_attention_heads:
            small = _as_mistral(config)
        cut = text_config(small)
        cut.num_attention_heads = shape.heads
        cut.num_key_value_heads = shape.kv_heads
        # Without it the class derives the head size from the pruned head count.
        cut.head_dim = shape.head_dim
    setattr(text_config(small), family_of(small).width_field, shape.ffn)
    return small


def _as_mistral(config: Any) -> Any:
    from transformers import MistralConfig

    fields = config.to_dict()
    mistral = MistralConfig(
        **{name: fields[name] for name in _MISTRAL_FIELDS if name in fields}, sliding_window=None
    )
    mistral.architectures = ["MistralForCausalLM"]
    return mistral
