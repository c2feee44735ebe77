"""The shapes that meet a budget, their cost, and what engines do with them; from a config alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from maskprune.hf.engines import ALIASES, ENGINES, engine_name, verdict
from maskprune.hf.families import text_config
from maskprune.hf.pruned_config import target_config, why_heads_stay
from maskprune.hf.shape import Shape, shape_of
from maskprune.structured.budget import Budget, Split, layer_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


TARGETS = (*ENGINES, *ALIASES, "awq128", "gptq128", "fp8", "tp=N")


@dataclass(frozen=True)
class Cost:
    """Size, memory and compute of a stock config; bytes at the config's dtype."""

    shape: Shape
    model_type: str
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    tp_sizes: list[int]


def cost(config: PreTrainedConfig) -> Cost:
    """Cost of a stock config; builds the model on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    dtype = getattr(config, "dtype", None) or torch.float32
    size = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    # Two a weight that multiplies a token: the blocks' matrices and the LM head, not the embedding.
    text = text_config(config)
    through = shape.layers * layer_weights(config, shape) + text.vocab_size * text.hidden_size
    return Cost(
        shape=shape,
        model_type=config.model_type,
        parameters=parameters,
        bytes=parameters * size,
        kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * size,
        flops_per_token=2 * through,
        tp_sizes=tp_sizes(shape),
    )


def tp_sizes(shape: Shape, largest: int = 64) -> list[int]:
    """Tensor-parallel sizes that split heads, KV heads and FFN evenly (KV heads may repeat)."""
    return [
        n
        for n in range(1, largest + 1)
        if shape.heads % n == 0
        and shape.ffn % n == 0
        and (shape.kv_heads % n == 0 or n % shape.kv_heads == 0)
    ]


def lint(shape: Shape, targets: str | None, before: Shape | None = None) -> list[str]:
    """What is misaligned for `targets`, a comma-separated list of TARGETS.

    A note says so where the dense model (`before`) was misaligned already.

    Raises:
        ValueError: an unknown target.
    """
    names = [t.strip() for t in (targets or "").split(",") if t.strip()]
    tp = 1
    for name in names:
        if name.startswith("tp="):
            if not name[3:].isdigit() or int(name[3:]) < 1:
                raise ValueError(f"target {name!r}; expected tp=N with N at least 1, like tp=4")
            tp = int(name[3:])
        elif name not in TARGETS:
            raise ValueError(f"target {name!r} is unknown; expected one of {', '.join(TARGETS)}")
    rules: list[tuple[str, str, Callable[[Shape], int], int]] = []

    def rule(target: str, what: str, value: Callable[[Shape], int], multiple: int) -> None:
        rules.append((target, what, value, multiple))

    def width(s: Shape) -> int:
        return s.ffn

    def attended(s: Shape) -> int:
        return s.heads * s.head_dim

    if tp > 1:
        rule(f"tp={tp}", "query heads", lambda s: s.heads, tp)
        rule(f"tp={tp}", "FFN width", width, tp)
        rule(f"tp={tp}", "KV heads", lambda s: s.kv_heads if s.kv_heads > tp else tp, tp)
    if "vllm" in names:
        rule("vllm", "head size", lambda s: s.head_dim, 8)
    if "gguf" in names or "llama.cpp" in names:
        rule("gguf K-quants", "FFN width", width, 256)
        rule("gguf K-quants", "heads x head size", attended, 256)
    for name in ("awq128", "gptq128", "fp8"):
        if name in names:
            rule(name, "FFN width", width, 128 * tp)
            rule(name, "heads x head size", attended, 128 * tp)
    notes = []
    for target, what, value, multiple in rules:
        if value(shape) % multiple:
            note = f"{target}: {what} {value(shape)} is not a multiple of {multiple}"
            if before is not None and value(before) % multiple:
                note += f" (nor was the dense model's {value(before)})"
            notes.append(note)
    return notes


def engine_notes(config: PreTrainedConfig, targets: str | None) -> list[str]:
    """What each engine among `targets` does with a checkpoint of `config`, one line each."""
    names = [engine_name(target.strip()) for target in (targets or "").split(",")]
    verdicts = [verdict(config, name) for name in dict.fromkeys(names) if name]
    return [str(one) for one in verdicts if one]


@dataclass(frozen=True)
class Plan:
    """The dense cost, and for each legal shape its split, cost, class and notes on the targets."""

    dense: Cost
    budget: Budget
    choices: list[tuple[Split, Cost, str, list[str]]]


def plan(config: PreTrainedConfig, budget: Budget, targets: str | None = None) -> Plan:
    """Every shape that training may end in, with what it costs."""
    before = shape_of(config)
    choices = []
    for split in budget.splits:
        shape = budget.shape_after(split)
        small = target_config(config, shape, budget.arch_fallback)
        why = f"{small.model_type}: "
        if small.model_type == config.model_type:
            why += "the class of the original takes the shape"
        else:
            why += (
                f"computes the same logits, and more engines run {shape.heads} heads of "
                f"{shape.head_dim} at hidden size {text_config(config).hidden_size} in it than "
                f"in {config.model_type}"
            )
        notes = [f"misaligned for {note}" for note in lint(shape, targets, before)]
        choices.append((split, cost(small), why, notes + engine_notes(small, targets)))
    return Plan(cost(config), budget, choices)


def render(made: Plan) -> str:
    """The plan as text for a terminal."""
    columns = [("dense", made.dense)]
    columns += [(f"choice {i + 1}", c) for i, (_, c, _, _) in enumerate(made.choices)]
    rows: list[tuple[str, Callable[[Cost], str]]] = [
        ("query heads", lambda c: str(c.shape.heads)),
        ("KV heads", lambda c: str(c.shape.kv_heads)),
        ("FFN width", lambda c: str(c.shape.ffn)),
        ("parameters", lambda c: f"{c.parameters:,}"),
        ("weights, MB", lambda c: f"{c.bytes / 1e6:,.1f}"),
        ("KV bytes/token", lambda c: f"{c.kv_bytes_per_token:,}"),
        ("MFLOP/token", lambda c: f"{c.flops_per_token / 1e6:,.1f}"),
        ("TP sizes", lambda c: ",".join(map(str, c.tp_sizes[:6]))),
        ("config class", lambda c: c.model_type),
    ]
    cells = [["", *(name for name, _ in columns)]]
    cells += [[label, *(show(c) for _, c in columns)] for label, show in rows]
    gone = ["sparsity", "0", *(f"{1 - split.R:.4f}" for split, _, _, _ in made.choices)]
    cells.insert(1, gone)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    budget = made.budget
    if why := why_heads_stay(budget.config, budget.arch_fallback):
        lines.append(f"Heads stay: {why}.")
    if len(made.choices) > 1:
        lines.append("Training learns which of these shapes it ends in; all meet the budget.")
    for number, (_, _, why, notes) in enumerate(made.choices, 1):
        lines.append(f"choice {number}: {why}")
        lines += [f"  {note}" for note in notes]
    return "\n".join(lines)
