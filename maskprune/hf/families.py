"""Where heads and FFN units live in each model family: one table, no subclasses.

Letters: L layers, H query heads, G KV heads, q = H / G query heads per KV head, F FFN width,
d hidden size, d_h head size.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _takes_all(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """One row of the table: module names, config fields, and what the config class accepts.

    Attributes:
        qkv: query, key and value projections, or the one that holds them as rows [q | k | v].
        gate_up: gate and up projections; one name is a plain FFN's first projection, or, where
            `fused`, both as rows [gate | up].
        head_norms: norms with a weight for each query head and each KV head, (heads, d_h).
        mixer: what takes the attention's place in some layers: its name and its linears.
        tail: what the decoder runs after its last block, in order; a variant may lack some.
        softcap, logit_scale, logit_divisor: config fields of what happens to the head's output,
            see `head.Head`.
        transposed: weights are (in, out), GPT-2's Conv1D.
        no_heads: why heads cannot be pruned, or None where they can.
        on_disk: pairs of name prefixes (in a checkpoint, in the model), where the two differ.
        heads_divide_hidden: transformers >= 5.4 refuses other head counts than those that divide
            the hidden size.
        refuses: says of a config why that variant is not supported, or None.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    head_norms: tuple[str, ...] = ()
    mixer: tuple[str, tuple[str, ...]] | None = None
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
    on_disk: tuple[tuple[str, str], ...] = ()
    heads_divide_hidden: bool = False
    refuses: Callable[[PreTrainedConfig], str | None] = _takes_all

    @property
    def prunes_heads(self) -> bool:
        """Whether removing heads from every layer leaves a stock, exact model."""
        return self.no_heads is None

    @property
    def gated(self) -> bool:
        """Whether the FFN is act(gate) * up, not act(first)."""
        return self.fused or len(self.gate_up) == 2

    @property
    def fused_qkv(self) -> bool:
        """Whether one projection holds queries, keys and values."""
        return len(self.qkv) == 1

    def stock_names(self, name: str) -> list[str]:
        """What the model may call the tensor that a checkpoint calls `name`."""
        return [
            stock + name.removeprefix(disk) for disk, stock in self.on_disk if name.startswith(disk)
        ]


_NO_HEAD_SIZE = "the config has no head size, so the head count cannot change"
_FIXED_OUTPUT = "the attention output is fixed to the hidden size, so the head count cannot change"
_WHOLE_NORM = "the q and k norms span all heads, so removing one changes the others"
_gpt = partial(
    Family,
    layers="transformer.h",
    attention="attn",
    gate_up=("c_fc",),
    down="c_proj",
    activation="gelu_tanh",
    tail=("ln_f",),
    heads_field="n_head",
    width_field="n_inner",
    no_heads=_NO_HEAD_SIZE,
)
_gemma = partial(Family, activation="gelu_tanh", heads_divide_hidden=True)
_SOFTCAP = "final_logit_softcapping"


def _refuses_longrope(config: PreTrainedConfig) -> str | None:
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return (
            "with longrope (Phi-3's 128k variants): transformers derives its rope table from "
            "hidden_size / heads; use a 4k variant"
        )
    return None


def _refuses_qk_layernorm(config: PreTrainedConfig) -> str | None:
    if getattr(config, "qk_layernorm", False):
        return "with qk_layernorm: transformers derives its norms' size from hidden_size / heads"
    return None


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", heads_divide_hidden=True),
        Family("mistral"),
        Family("ministral3"),
        Family("qwen2"),
        Family("qwen3"),
        Family("smollm3"),
        Family("granite", logit_divisor="logits_scaling"),
        Family("cohere", head_norms=("q_norm", "k_norm"), logit_scale="logit_scale"),
        Family("cohere2", logit_scale="logit_scale"),
        Family("seed_oss"),
        Family("exaone4"),
        Family("ernie4_5"),
        Family("hunyuan_v1_dense"),
        Family("olmo"),
        Family("cwm", heads_divide_hidden=True),
        _gemma("gemma"),
        _gemma("gemma2", softcap=_SOFTCAP),
        _gemma("gemma3_text", softcap=_SOFTCAP),
        _gemma(
            "gemma3",
            layers="model.language_model.layers",
            on_disk=(
                ("language_model.model.", "model.language_model."),
                ("language_model.lm_head.", "lm_head."),
                ("vision_tower.", "model.vision_tower."),
                ("vision_tower.vision_model.", "model.vision_tower."),
                ("multi_modal_projector.", "model.multi_modal_projector."),
            ),
        ),
        _gemma("vaultgemma", softcap=_SOFTCAP),
        Family(
            "phi3",
            qkv=("qkv_proj",),
            gate_up=("gate_up_proj",),
            fused=True,
            refuses=_refuses_longrope,
        ),
        Family("glm4", gate_up=("gate_up_proj",), fused=True),
        Family(
            "phi",
            o="dense",
            gate_up=("fc1",),
            down="fc2",
            activation="gelu_tanh",
            tail=("final_layernorm",),
            refuses=_refuses_qk_layernorm,
        ),
        Family("starcoder2", gate_up=("c_fc",), down="c_proj", activation="gelu_tanh"),
        Family("nemotron", gate_up=("up_proj",), activation="relu2"),
        Family("arcee", gate_up=("up_proj",), activation="relu2", heads_divide_hidden=True),
        Family("apertus", gate_up=("up_proj",), activation="xielu"),
        Family("jais2", gate_up=("up_proj",), activation="relu2", heads_divide_hidden=True),
        Family("nanochat", gate_up=("fc1",), down="fc2", activation="relu2", softcap=_SOFTCAP),
        Family("olmo2", no_heads=_WHOLE_NORM),
        Family("olmo3", no_heads=_WHOLE_NORM),
        Family(
            "qwen3_5_text",
            mixer=(
                "linear_attn",
                ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            ),
            no_heads="most layers have linear attention, which has no KV heads",
        ),
        Family("stablelm", no_heads=_FIXED_OUTPUT),
        Family("helium", no_heads=_FIXED_OUTPUT),
        _gpt("gpt2", qkv=("c_attn",), o="c_proj", transposed=True),
        _gpt("gpt_bigcode", qkv=("c_attn",), o="c_proj"),
        _gpt("gptj", o="out_proj", gate_up=("fc_in",), down="fc_out"),
        _gpt(
            "gpt_neo",
            attention="attn.attention",
            o="out_proj",
            heads_field="num_heads",
            width_field="intermediate_size",
        ),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            qkv=("query_key_value",),
            o="dense",
            gate_up=("dense_h_to_4h",),
            down="dense_4h_to_h",
            activation="gelu",
            tail=("final_layer_norm",),
            no_heads=_NO_HEAD_SIZE,
            on_disk=(("embed_out.", "lm_head."),),
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
            no_heads=_NO_HEAD_SIZE,
        ),
    )
}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a transformers config that describes the language model; usually all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def family_of(config: PreTrainedConfig) -> Family:
    """The table row of a transformers config.

    Raises:
        ValueError: the family is not in the table, or a variant of it is not prunable; says why,
            and which family is nearest.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        why = _why_unsupported(config)
        near = _nearest(config)
        raise ValueError(
            f"model family {model_type!r} is not supported"
            + (f": {why}" if why else "")
            + (f"; nearest is {near}" if near else f"; expected one of {', '.join(FAMILIES)}")
        )
    family = FAMILIES[model_type]
    if why := family.refuses(config):
        raise ValueError(f"model family {model_type!r} is not supported {why}")
    return family


def _why_unsupported(config: PreTrainedConfig) -> str | None:
    """What in a config of an unknown family keeps its heads or FFN units from being uniform."""
    text = text_config(config)

    def has(*names: str) -> bool:
        return any(getattr(text, name, None) for name in names)

    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if has("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        return "its FFN is a mixture of experts, whose units depend on the router"
    if has("kv_lora_rank"):
        return "its attention (MLA) keeps keys and values in a latent that all heads share"
    if has("state_size", "ssm_cfg", "mamba_d_state", "mamba_n_heads", "ssm_state_size") or any(
        "attention" not in kind or "linear" in kind for kind in kinds
    ):
        return "it has state-space, recurrent or convolution layers, not attention and FFN alone"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, not a causal language model"
    if text is not config or has("vision_config", "audio_config"):
        return "it is multimodal"
    return None


def _nearest(config: PreTrainedConfig) -> str | None:
    """The family of the table that is nearest to one that is not in it."""
    text = getattr(text_config(config), "model_type", None)
    if text != getattr(config, "model_type", None) and text in FAMILIES:
        return f"its language model saved alone, a {text}"
    stem = str(text).removesuffix("_text").removesuffix("_moe")
    if stem in FAMILIES:
        return f"{stem}, its dense form"
    close = difflib.get_close_matches(stem, FAMILIES, n=1, cutoff=0.75)
    return close[0] if close else None


def family_matrix() -> str:
    """The README's table: families by `model_type`, those with the same answer in one row."""
    groups: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        answer = f"stay: {family.no_heads}" if family.no_heads else "KV groups or query heads"
        groups.setdefault(answer, []).append(f"`{name}`")
    lines = ["| families (`model_type`) | heads | FFN, 2:4 |", "| --- | --- | --- |"]
    lines += [f"| {', '.join(names)} | {answer} | yes |" for answer, names in groups.items()]
    return "\n".join(lines)


def head_dim(config: PreTrainedConfig) -> int:
    """Size d_h of one head, whether the config names it or not."""
    config = text_config(config)
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_heads(config: PreTrainedConfig) -> int:
    """KV heads G of a layer; the query heads where the config does not name them."""
    config = text_config(config)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def ffn_width(config: PreTrainedConfig) -> int:
    """FFN width F (GPT-2 leaves `n_inner` empty for 4 d)."""
    text = text_config(config)
    width = getattr(text, family_of(config).width_field, None)
    return int(width if width is not None else 4 * text.hidden_size)


def get_submodule(module: nn.Module, path: str) -> nn.Module:
    """`module.get_submodule(path)`, and the module itself for an empty path."""
    return module.get_submodule(path) if path else module


def stock_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without the wrappers of PEFT and torch.compile."""
    while True:
        if compiled := getattr(model, "_orig_mod", None):
            model = compiled
        elif unwrap := getattr(model, "get_base_model", None):
            model = unwrap()
        else:
            return cast("PreTrainedModel", model)


def require_causal_lm(model: nn.Module) -> PreTrainedModel:
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


def decoder_of(model: nn.Module) -> nn.Module:
    """The module of a stock model that runs the blocks and what follows them, all but the head."""
    base = stock_model(model)
    return get_submodule(base, family_of(base.config).layers.rpartition(".")[0])


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The L transformer blocks of a stock model, also inside a PEFT wrapper."""
    base = stock_model(model)
    return list(get_submodule(base, family_of(base.config).layers).children())


def linear_names(layer: nn.Module, family: Family) -> list[str]:
    """The linears of one block, in the order in which a forward runs them."""
    mixer, inside = family.attention, (*family.qkv, family.o)
    if family.mixer and hasattr(layer, family.mixer[0]):
        mixer, inside = family.mixer
    ffn = f"{family.ffn}." if family.ffn else ""
    return [
        *(f"{mixer}.{name}" for name in inside),
        *(f"{ffn}{name}" for name in (*family.gate_up, family.down)),
    ]


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


if __name__ == "__main__":
    print(family_matrix())
