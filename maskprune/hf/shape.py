"""The dimensions of a model that pruning changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskprune.hf.families import family_of, ffn_width, head_dim, kv_heads, text_config


@dataclass(frozen=True)
class Shape:
    """The dimensions that pruning changes, of every layer alike."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads, {self.kv_heads} KV heads, "
            f"head size {self.head_dim}, FFN {self.ffn}"
        )


def shape_of(config: Any) -> Shape:
    """The dimensions of a transformers config of a known family."""
    family_of(config)
    return Shape(
        layers=int(text_config(config).num_hidden_layers),
        heads=int(text_config(config).num_attention_heads),
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        ffn=ffn_width(config),
    )
