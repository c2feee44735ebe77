"""About how long a plan takes here, from two speeds measured first: arithmetic and memory."""

from __future__ import annotations

import torch

from benchmarks.harness import copy_bandwidth, interleaved
from benchmarks.uniform.shapes import Cost, cost_of, named_config
from benchmarks.uniform.sweep import Plan, groups, work
from benchmarks.uniform.variants import widths_of

# Seconds of eager Python that one layer costs a call, and of compiling one graph.
PYTHON = 4e-4
COMPILE = 4.0


def speeds(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of 128 tokens with a matrix, and bytes/s of a copy."""
    x = torch.randn(128, 1024, device=device).to(dtype)
    w = torch.randn(1024, 2816, device=device).to(dtype)
    times = interleaved({"product": lambda: x @ w}, device=device, rounds=9)
    flops = 2 * 128 * 1024 * 2816 / times["product"].quantile(0.5) * 1e3
    return flops, 1e9 * copy_bandwidth(device, size=1 << 27, rounds=3)


def call_seconds(
    plan: Plan, case: tuple[str, str, int, int], cost: Cost, speed: tuple[float, float]
) -> float:
    """One call of one model: arithmetic and memory, whichever is slower, and Python."""
    regime, _, batch, length = case
    size, layers = plan.dtype.itemsize, len(cost.widths.ffn)
    flops = cost.prefill_flops(batch, 1 if regime == "decode" else length)
    flops = work(regime, cost, batch, length, size) if regime == "train" else flops
    read = cost.decode_bytes(batch, length if regime == "decode" else 0, size)
    return max(flops / speed[0], read / speed[1]) + PYTHON * layers * (1 + 3 * (regime == "train"))


def seconds(plan: Plan, speed: tuple[float, float]) -> float:
    """The whole plan: models built and checked, and every case's warm-up and rounds.

    A case that the self-check finds noisy takes up to three times its rounds: not counted.
    """
    total = 0.0
    for name in plan.models:
        config = named_config(name)
        for sparsity in plan.sparsities:
            widths = widths_of(config, sparsity, plan.multiple_of, plan.seed)
            costs = {v: cost_of(config, w) for v, w in widths.items()}
            for group in groups(plan, costs):
                held = sum(costs[v].parameters for v in group) * plan.dtype.itemsize
                # Written once and read a few times when cut, compared, stacked and saved.
                total += held * (20 if plan.structure else 10) / speed[1] + 0.3 * len(group)
                total += sum(_case(plan, case, costs, group, speed) for case in plan.cases())
    return total


def _case(
    plan: Plan,
    case: tuple[str, str, int, int],
    costs: dict[str, Cost],
    group: list[str],
    speed: tuple[float, float],
) -> float:
    compiled = case[1] in ("compile", "regional")
    names = [v for v in group if not compiled or v in plan.compiled_variants]
    calls = {v: call_seconds(plan, case, costs[v], speed) for v in names}
    once = sum(calls.values()) + sum(calls[v] for v in ("dense", "uniform") if v in calls)
    rounds, limit = plan.limits(case[0])
    start = 4 * once
    if compiled:
        start += COMPILE * sum(costs[v].widths.distinct_layers for v in names)
    return start + min(rounds * once, max(limit, 5 * once))
