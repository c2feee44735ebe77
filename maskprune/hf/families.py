"""Where heads and FFN units live in each model family: one table, no subclasses.

Letters: L layers, H query heads, G KV heads, q = H / G query heads per KV head, F FFN width,
d hidden size, d_h head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """One row of the table: module names, config fields, and what the config class accepts.

    `qkv` holds the names of the query, key and value projections, or one name where they are
    fused into rows [q | k | v]; `gate_up` likewise the gate and up projections, or the single
    first projection of a plain FFN. `transposed`: weights are (in, out), GPT-2's Conv1D. `tail`:
    what the decoder runs after its last block, in order; a variant may lack some. `softcap`,
    `logit_scale`, `logit_divisor`: config fields of what happens to the head's output, see
    `head.Head`.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "silu"
    tail: tuple[str, ...] = ("norm",)
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    heads_field: str = "num_attention_heads"
    width_field: str = "intermediate_size"
    transposed: bool = False
    fused: bool = False
    no_heads: str | None = None

    @property
    def prunes_heads(self) -> bool:
        """Whether removing heads from every layer leaves a stock, exact model."""
        return self.no_heads is None

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate) * up, not act(first)."""
        return self.fused or len(self.gate_up) == 2


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("seed_oss"),
        Family(
            "gemma2",
            activation="gelu_tanh",
            softcap="final_logit_softcapping",
        ),
        Family(
            "gemma3_text",
            activation="gelu_tanh",
            softcap="final_logit_softcapping",
        ),
        Family("phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",), fused=True),
        Family(
            "olmo2",
            no_heads="its q and k norms span all heads, so removing one changes the others",
        ),
        Family(
            "gpt2",
            layers="transformer.h",
            attention="attn",
            qkv=("c_attn",),
            o="c_proj",
            gate_up=("c_fc",),
            down="c_proj",
            activation="gelu_tanh",
            tail=("ln_f",),
            heads_field="n_head",
            width_field="n_inner",
            transposed=True,
            no_heads="its config has no head size, so the head count cannot change",
        ),
        Family(
            "opt",
            layers="model.decoder.layers",
            ffn="",
            o="out_proj",
            gate_up=("fc1",),
            down="fc2",
            activation="relu",
            tail=("final_layer_norm", "project_out"),
            width_field="ffn_dim",
            no_heads="its config has no head size, so the head count cannot change",
        ),
    )
}


def family_of(config: Any) -> Family:
    """The table row of a transformers config.

    Raises:
        ValueError: the family is not in the table, or a variant of it is not prunable.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model family {model_type!r} is not supported; expected one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    scaling = getattr(config, "rope_parameters", None) or {}
    if model_type == "phi3" and scaling.get("rope_type") == "longrope":
        raise ValueError(
            "Phi-3 with longrope (the 128k variants) is not supported: transformers derives its "
            "rope table from hidden_size / heads; use a 4k variant"
        )
    return FAMILIES[model_type]


def head_dim(config: Any) -> int:
    """Size d_h of one head, whether the config names it or not."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_heads(config: Any) -> int:
    """KV heads G of a layer; equal to the query heads where the config does not tell."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def ffn_width(config: Any) -> int:
    """FFN width F (GPT-2 leaves `n_inner` empty for 4 d)."""
    width = getattr(config, family_of(config).width_field, None)
    return int(width if width is not None else 4 * config.hidden_size)


def get_submodule(module: nn.Module, path: str) -> nn.Module:
    """`module.get_submodule(path)`, and the module itself for an empty path."""
    return module.get_submodule(path) if path else module


def stock_model(model: Any) -> Any:
    """The transformers model itself, inside wrappers of PEFT and torch.compile or not."""
    while True:
        if (inner := getattr(model, "_orig_mod", None)) is None:
            if not hasattr(model, "get_base_model"):
                return model
            inner = model.get_base_model()
        model = inner


def require_causal_lm(model: Any) -> Any:
    """`stock_model(model)`, if that is a causal LM of a family in the table.

    Raises:
        TypeError: it is something else, such as a model without its head.
        ValueError: the family is not in the table, or a variant of it is not prunable.
    """
    base = stock_model(model)
    what = base.__name__ if isinstance(base, type) else type(base).__name__
    expected = "expected a transformers causal LM, as AutoModelForCausalLM.from_pretrained loads it"
    if not isinstance(base, nn.Module) or not hasattr(getattr(base, "config", None), "model_type"):
        raise TypeError(f"the model is {what}; {expected}")
    family = family_of(base.config)
    try:
        get_submodule(base, family.layers)
    except AttributeError:
        raise TypeError(f"the model is {what}, without {family.layers}; {expected}") from None
    return base


def decoder_of(model: Any) -> nn.Module:
    """The module of a stock model that runs the blocks and what follows them, all but the head."""
    base = stock_model(model)
    return get_submodule(base, family_of(base.config).layers.rpartition(".")[0])


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The L transformer blocks of a stock model, also inside a PEFT wrapper."""
    base = stock_model(model)
    return list(get_submodule(base, family_of(base.config).layers).children())


def attention_output(layer: nn.Module, family: Family) -> nn.Module:
    """W_O of one block: its input is the concatenated heads, (..., H * d_h)."""
    return layer.get_submodule(output_names(family)[0])


def ffn_output(layer: nn.Module, family: Family) -> nn.Module:
    """W_down of one block: its input is the FFN activation, (..., F)."""
    return layer.get_submodule(output_names(family)[1])


def output_names(family: Family) -> tuple[str, ...]:
    """How the names of W_O and W_down end, as PEFT's patterns take them."""
    ffn = f"{family.ffn}.{family.down}" if family.ffn else family.down
    return (f"{family.attention}.{family.o}", ffn)
