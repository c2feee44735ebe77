"""The dimensions of a model that pruning changes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from maskprune.hf.families import family_of, ffn_width, head_dim, kv_heads, text_config


@dataclass(frozen=True)
class Shape:
    """The dimensions that pruning changes, the same in every layer.

    `heads` counts query heads, `ffn` is the FFN width.
    """

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


def shape_of(config: PreTrainedConfig) -> Shape:
    """The dimensions of a transformers config of a known family.

    Raises:
        ValueError: an unknown family, or sizes that no model can have.
    """
    family_of(config)
    text = text_config(config)
    counts = {
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
    }
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"the config's {name} is {count!r}; expected a whole number above 0")
    shape = Shape(
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        ffn=ffn_width(config),
    )
    if min(shape.kv_heads, shape.head_dim, shape.ffn) < 1 or shape.heads % shape.kv_heads:
        raise ValueError(
            f"the config says {shape}; expected sizes above 0, and heads that the KV heads divide"
        )
    return shape


def require_positions(config: PreTrainedConfig, seq_len: int) -> None:
    """Refuse sequences that are longer than the positions that a model has.

    Raises:
        ValueError: `seq_len` is below 2 or too large.
    """
    positions = getattr(text_config(config), "max_position_embeddings", None)
    if seq_len < 2 or (positions and seq_len > positions):
        raise ValueError(
            f"seq_len is {seq_len}; expected 2 up to the model's {positions or 'any'} positions"
        )


def require_ranks(config: PreTrainedConfig, **ranks: int) -> None:
    """Refuse ranks of adapters above the full rank of a model's narrowest linears.

    Raises:
        ValueError: names the one that is too large.
    """
    most = max(128, text_config(config).hidden_size)
    for name, rank in ranks.items():
        if rank > most:
            raise ValueError(f"{name} is {rank}; expected at most {most}, the full rank")
