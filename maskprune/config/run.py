"""Settings that runs share: the shape that is asked for, how long to train, on what, where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from maskprune.choices import (
    LEAST_STEPS,
    require_choices,
    require_least,
    require_positive,
)

T = TypeVar("T")


def setting(default: T, text: str) -> T:
    """A field of a settings class: its default, and what `--help` says of it."""
    return field(default=default, metadata={"help": text})


def require_whole_micro_batches(batch_size: int, gradient_accumulation: int) -> None:
    """Refuse a batch that its micro-batches do not fill.

    Raises:
        ValueError: they do not.
    """
    if batch_size % gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation {gradient_accumulation} does not divide batch_size {batch_size}"
        )


@dataclass(frozen=True)
class BudgetConfig:
    """The shape that is asked for; `Budget` checks the values."""

    sparsity: float | None = setting(
        None, "Share of the attention and FFN weights to remove, like 0.2."
    )
    head_sparsity: float | None = setting(
        None, "With --ffn-sparsity, fixes the split by hand: share of head units to remove."
    )
    ffn_sparsity: float | None = setting(None, "Share of the FFN units to remove, by hand.")
    head_unit: str = setting(
        "kv_group", "kv_group (a KV head with its query heads) or query_head (of every group)."
    )
    multiple_of: int | None = setting(
        None, "FFN widths are multiples of it; 256, 64 below 4096, 8 below 512."
    )
    arch_fallback: str = setting(
        "mistral", "mistral: the class that most engines run; divisor, error: the original's."
    )
    targets: str | None = setting(
        None, "Of vllm,llama.cpp,openvino,ct2,ort,mlx,sglang,awq128,fp8,tp=4."
    )


@dataclass(frozen=True)
class RunConfig:
    """How long a run trains, on what, where, and how often it saves."""

    steps: int | None = setting(None, "Optimizer steps; or give --epochs.")
    epochs: float | None = setting(
        None, "Passes over the data; where neither is given 7 to prune, 1 to learn 2:4 masks."
    )
    batch_size: int = setting(16, "Sequences per step, over all devices.")
    gradient_accumulation: int = setting(1, "Micro-batches per step, each batch_size / this.")
    seq_len: int = setting(512, "Tokens per sequence.")
    max_tokens: int | None = setting(10_240_000, "Read at most this many tokens of the data.")
    gradient_checkpointing: bool = setting(False, "Trade time for memory.")
    dtype: str = setting(
        "auto", "auto (float32 weights on CPU, as stored on GPU), float32, bfloat16 or float16."
    )
    autocast: str = setting(
        "auto", "Compute type: auto (bfloat16 where measured faster), bfloat16 or none."
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    shard: str = setting(
        "auto",
        "Under torchrun: none, every process holds the whole model; full, each its part of the "
        "blocks (FSDP2); auto, full where the plan says that a GPU cannot hold the whole model.",
    )
    optimizer_bits: int = setting(32, "Bits of AdamW's two moments: 32, or 8 with torchao.")
    seed: int = setting(0, "Of the data order and all that is random; CPU runs repeat bit for bit.")
    save_steps: int = setting(100, "Steps between checkpoints: the most that a killed run loses.")
    logging_steps: int = setting(10, "Steps between rows of the trace.")

    def __post_init__(self) -> None:
        require_choices(self, autocast=("auto", "bfloat16", "none"), shard=("auto", "none", "full"))
        require_least(
            self,
            steps=LEAST_STEPS,
            batch_size=1,
            gradient_accumulation=1,
            seq_len=8,
            max_tokens=1,
            seed=0,
            save_steps=1,
            logging_steps=1,
        )
        require_positive(self, "epochs")
        if self.optimizer_bits not in (8, 32):
            raise ValueError(f"optimizer_bits is {self.optimizer_bits}; expected 8 or 32")
        require_whole_micro_batches(self.batch_size, self.gradient_accumulation)
