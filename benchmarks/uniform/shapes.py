"""Models by name, and what a set of layer widths costs: parameters, FLOPs, bytes.

Letters: d hidden size, V vocabulary, L layers, h query heads, g KV heads, F FFN width, d_h head
size, B batch, T length, c tokens already in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig

# hidden, FFN, layers, heads, KV heads, head size, vocabulary, tied embeddings, rope theta
_NAMED = {
    "tiny": (256, 768, 4, 8, 8, 32, 1024, True, 1e4),
    "wide-1024": (1024, 2816, 4, 16, 16, 64, 8192, True, 1e4),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True, 5e5),
    "llama-7b": (4096, 11008, 32, 32, 32, 128, 32000, False, 1e4),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False, 5e5),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 128, 32000, False, 1e4),
}
DEMO = "smollm2-135m"
NAMES = (*_NAMED, DEMO)


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> Any:
    """A Llama config of these dimensions."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        **more,
    )


@dataclass(frozen=True)
class Widths:
    """Query heads, KV heads and FFN width of every layer: all alike in a uniform model."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    head_dim: int

    @property
    def distinct_layers(self) -> int:
        """How many different layer shapes there are: 1 in a uniform model."""
        return len(set(zip(self.heads, self.kv_heads, self.ffn, strict=True)))


@dataclass(frozen=True)
class Cost:
    """What one model costs; exact counts of the formulas in each method's first line."""

    hidden: int
    vocab: int
    tied: bool
    widths: Widths

    @property
    def layer_parameters(self) -> int:
        """Sum over layers of d d_h (2 h + 2 g) + 3 d F."""
        w = self.widths
        attention = w.head_dim * (2 * sum(w.heads) + 2 * sum(w.kv_heads))
        return self.hidden * (attention + 3 * sum(w.ffn))

    @property
    def parameters(self) -> int:
        """Layers, 2 L + 1 norms of d, and V d once if tied, else twice."""
        norms = (2 * len(self.widths.ffn) + 1) * self.hidden
        return self.layer_parameters + norms + (1 if self.tied else 2) * self.vocab * self.hidden

    def attention_flops(self, batch: int, length: int) -> int:
        """B sum over layers of 4 h d_h T (T + 1) / 2: Q K^T and P V below the diagonal."""
        w = self.widths
        return batch * 2 * sum(w.heads) * w.head_dim * length * (length + 1)

    def prefill_flops(self, batch: int, length: int) -> int:
        """2 B T layer_parameters + attention + 2 B d V: logits of the last token only."""
        linear = 2 * batch * length * self.layer_parameters
        return linear + self.attention_flops(batch, length) + 2 * batch * self.hidden * self.vocab

    def train_flops(self, batch: int, length: int) -> int:
        """4 B T (layer_parameters + d V) + 3 attention: forward, and gradients to activations.

        LoRA's own work and the frozen weights' gradients are not in it: the one is small, the
        other is not done.
        """
        linear = 4 * batch * length * (self.layer_parameters + self.hidden * self.vocab)
        return linear + 3 * self.attention_flops(batch, length)

    def kv_bytes(self, batch: int, length: int, itemsize: int) -> int:
        """2 B T d_h sum over layers of g."""
        return 2 * batch * length * sum(self.widths.kv_heads) * self.widths.head_dim * itemsize

    def decode_bytes(self, batch: int, context: int, itemsize: int) -> int:
        """Every layer weight, norm and the V d output matrix once, and c + 1 tokens of KV."""
        norms = (2 * len(self.widths.ffn) + 1) * self.hidden
        weights = self.layer_parameters + norms + self.vocab * self.hidden
        return weights * itemsize + self.kv_bytes(batch, context + 1, itemsize)


def cost_of(config: Any, widths: Widths) -> Cost:
    """The cost of `config`'s model with its layers cut to `widths`."""
    return Cost(config.hidden_size, config.vocab_size, bool(config.tie_word_embeddings), widths)


def named_config(name: str) -> Any:
    """The transformers config of a named shape or of a local checkpoint folder.

    Raises:
        ValueError: neither a known name nor a folder with a config.json.
    """
    if name in _NAMED:
        d, ffn, layers, heads, kv, d_h, vocab, tied, theta = _NAMED[name]
        return LlamaConfig(
            hidden_size=d,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=d_h,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    folder = weights_folder(name)
    if folder is None:
        raise ValueError(
            f"model {name!r} is neither a known shape nor a folder with a config.json; "
            f"expected one of {', '.join(NAMES)}, or a path"
        )
    return AutoConfig.from_pretrained(folder)


def weights_folder(name: str) -> Path | None:
    """Where the real weights of `name` lie; None for a shape with random weights."""
    if name == DEMO:
        from maskprune.hf.demo_model import demo_model_dir

        return Path(demo_model_dir())
    return Path(name) if (Path(name) / "config.json").is_file() else None
