"""Rows of agreement and of speed, the same for every engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.engines.environments import ENVIRONMENTS
from benchmarks.engines.models import Described

PREFILL, DECODE, ROUNDS = 128, 32, 5
# The dense model stands in a race twice, to show the noise.
AGAIN = "dense again"
Row = dict[str, Any]


def agreement(engine: str, name: str, facts: Described, answer: Mapping[str, Any]) -> Row:
    """The row of a checkpoint that an engine was given: its answer, `done` or `error`."""
    row = _versions(engine) | {"what": "agreement", "model": name}
    row |= {k: facts.get(k) for k in ("family", "head_unit", "class", "shape")}
    if "error" in answer:
        return row | {"loads": False, "error": answer["error"]}
    return row | {"loads": True, "compared": "every log-probability, float32"} | answer["done"]


def race_task(kind: str, paths: Mapping[str, str], threads: int) -> Row:
    """The task of timing these models against each other, `dense` among them."""
    asked = {"paths": {**paths, AGAIN: paths["dense"]}, "threads": threads}
    asked |= {"prefill": PREFILL, "decode": DECODE, "rounds": ROUNDS}
    return {"task": "race", "name": kind, "arguments": asked}


def speed_rows(
    engine: str,
    kind: str,
    described: Mapping[str, Described],
    sizes: Mapping[str, int],
    speeds: Mapping[str, Mapping[str, list[float]]],
    threads: int,
) -> list[Row]:
    """A row for every model of a race, from its tokens a second by model, regime and round.

    Args:
        sizes: bytes of each model, as the engine holds it.
    """
    rows = []
    for name, size in sizes.items():
        row = _versions(engine) | {"what": "speed", "model": name, "type": kind, "rounds": ROUNDS}
        row |= {"shape": described[name]["shape"], "bytes": size}
        row |= {"clock": "CPU time of one thread" if threads == 1 else "wall"}
        for what in ("prefill", "decode"):
            row[f"{what}_tokens_s"] = float(f"{statistics.median(speeds[name][what]):.4g}")
            row[f"{what}_against_dense"] = _ratio(speeds[name][what], speeds["dense"][what])
            row[f"{what}_noise"] = abs(
                round(_ratio(speeds[AGAIN][what], speeds["dense"][what]) - 1, 3)
            )
        rows.append(row)
    return rows


def _versions(engine: str) -> Row:
    return {"engine": engine, "packages": " ".join(ENVIRONMENTS[engine].packages)}


def _ratio(one: list[float], other: list[float]) -> float:
    """Median of the rounds' ratios: what slows a whole round cancels."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)
