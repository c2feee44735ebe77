"""Where a prefill spends its time: each kind of module by itself, dense beside uniform."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.harness import NOISE_LIMIT, Times, ratio, show, sync
from benchmarks.harness.timing import uncollected
from benchmarks.uniform.regimes import prefill
from benchmarks.uniform.shapes import cost_of, named_config
from benchmarks.uniform.sweep import AGAIN, Plan, base_of, built, load_dense, stamp, too_large
from benchmarks.uniform.variants import widths_of
from benchmarks.uniform.verdicts import is_noisy, runs

Row = Mapping[str, Any]
PARTS = {
    "q_proj": "attention projections",
    "k_proj": "attention projections",
    "v_proj": "attention projections",
    "o_proj": "attention projections",
    "gate_proj": "FFN projections",
    "up_proj": "FFN projections",
    "down_proj": "FFN projections",
    "act_fn": "activation",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "lm_head": "output matrix",
}
CHECKED_SHARE = 0.1
OP, TOTAL = "latency_profile", "total"
REST = "scores, rope, SwiGLU product, residuals, Python"


@uncollected()
@torch.no_grad()
def breakdown(
    models: Mapping[str, nn.Module], batch: int, length: int, rounds: int
) -> dict[str, dict[str, Times]]:
    """For each model, the times of one prefill by part, and `total`.

    The models take turns, so drift hits all alike. Parts are timed by hooks, which cost a few
    microseconds a module and on a GPU a synchronisation: no other number of this benchmark is
    taken with them.
    """
    spent: dict[str, float] = defaultdict(float)
    once = {id(model): model for model in models.values()}.values()
    hooks = [hook for model in once for hook in _hooks(model, spent)]
    runners = {name: prefill(model, batch, length, 0) for name, model in models.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    try:
        for done in range(rounds + 2):
            for name, runner in runners.items():
                spent.clear()
                start = time.perf_counter()
                runner.call()
                sync(models[name].device.type)
                total = time.perf_counter() - start
                if done >= 2:
                    rest = total - sum(spent.values())
                    samples[name].append({**spent, REST: rest, TOTAL: total})
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: {part: Times(tuple(1e3 * s[part] for s in taken)) for part in taken[0]}
        for name, taken in samples.items()
    }


def profile(
    plan: Plan, variants: tuple[str, ...] = ("dense", "uniform")
) -> Iterator[dict[str, Any]]:
    """The rows of a plan's prefill (first batch, longest length): one a variant and part.

    share: of the same model's total. noise: how far dense and uniform, each run twice, differ
    from themselves, in total and in any part of at least a tenth of it.
    """
    batch, length = plan.batches[0], max(plan.lengths)
    for name in plan.models:
        config = named_config(name)
        dense: nn.Module | None = None
        for sparsity in plan.sparsities:
            base = base_of(plan, name, sparsity)
            widths = widths_of(config, sparsity, plan.multiple_of, plan.seed)
            chosen = {v: widths[v] for v in dict.fromkeys(("dense", *variants))}
            costs = {v: cost_of(config, w) for v, w in chosen.items()}
            if reason := too_large(plan, list(costs.values())):
                yield {"op": OP, "provider": "dense", **base, "skipped": reason} | stamp(plan)
                continue
            dense = load_dense(name, plan) if dense is None else dense
            made = {v: built(plan, base["model"], dense, v, w) for v, w in chosen.items()}
            models = {v: model for v, (model, _) in made.items()}
            models |= {v + AGAIN: models[v] for v in ("dense", "uniform") if v in models}
            times = breakdown(models, batch, length, plan.rounds)
            ideals = {v: costs["dense"].prefill_flops(batch, length) for v in made}
            ideals = {v: f / costs[v].prefill_flops(batch, length) for v, f in ideals.items()}
            where = base | {"regime": "prefill", "mode": "eager", "batch": batch, "length": length}
            facts = {v: where | of | {"ideal": round(ideals[v], 4)} for v, (_, of) in made.items()}
            yield from (row | stamp(plan) for row in _rows(times, facts))


def _rows(
    times: Mapping[str, Mapping[str, Times]], facts: Mapping[str, Row]
) -> Iterator[dict[str, Any]]:
    """A row of each variant and part, the largest part of dense first, the total last."""
    medians = {v: {p: t.quantile(0.5) for p, t in parts.items()} for v, parts in times.items()}
    order = sorted(times["dense"], key=lambda part: (part == TOTAL, -medians["dense"][part]))
    noise = max(
        abs(ratio([times[v][part]], [times[v + AGAIN][part]]) - 1)
        for v in facts
        if v + AGAIN in times
        for part in order
        if medians[v][part] >= CHECKED_SHARE * medians[v][TOTAL]
    )
    for variant, fields in facts.items():
        for part in order:
            row = {"op": OP, "provider": variant, "part": part, **fields}
            row |= times[variant][part].row()
            row |= {"share": round(medians[variant][part] / medians[variant][TOTAL], 4)}
            yield row | {"noise": round(noise, 4), "noisy": noise > NOISE_LIMIT}


def by_part(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, dict[str, Row]]]:
    """Profile rows by case (model, dtype, sparsity, batch, length), then part, then variant.

    Of several runs of a case the newest free of noise counts, or the newest where none is.
    """
    taken = (row for row in rows if row["op"] == OP and not row.get("skipped"))
    by_case: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = {}
    keys = ("model", "dtype", "sparsity", "batch", "length")
    for case, sittings in runs(taken, keys, ("part", "provider")).items():
        best = ([s for s in sittings if not is_noisy(s)] or sittings)[-1]
        for (part, variant), row in best.items():
            by_case.setdefault(case, {}).setdefault(part, {})[variant] = row
    return by_case


def report(rows: Sequence[Row]) -> str:
    """Profile rows as tables: the parts of every variant beside those of dense."""
    texts = [f"skipped {r['model']}: {r['skipped']}" for r in rows if r.get("skipped")]
    for (model, dtype, sparsity, batch, length), parts in by_part(rows).items():
        lines = []
        for part, by_variant in parts.items():
            dense = by_variant["dense"]
            line = {"part": part, "dense ms": dense["median_ms"], "share": dense["share"]}
            for variant, row in by_variant.items():
                if variant != "dense":
                    line[f"{variant} ms"] = row["median_ms"]
                    if not row["noisy"]:
                        line[f"{variant} speedup"] = dense["median_ms"] / row["median_ms"]
            lines.append(line)
        totals = parts[TOTAL].values()
        ideals = ", ".join(f"{r['provider']} {r['ideal']:.3g}" for r in totals)
        apart = f"dense against itself {dense['noise']:.1%}"
        apart += ": too noisy for ratios" if dense["noisy"] else ""
        head = (
            f"{model} {dtype}, prefill {batch} x {length}, sparsity {sparsity:g}, ideal: {ideals}"
        )
        texts.append(f"{head} ({apart})\n{show(lines, lines[0])}")
    return "\n\n".join(texts)


def _hooks(model: nn.Module, spent: dict[str, float]) -> list[Any]:
    """Hooks that add each named module's seconds to its part of `spent`."""
    device, hooks = model.device.type, []
    starts: dict[int, float] = {}

    def begin(module: nn.Module, args: Any) -> None:
        sync(device)
        starts[id(module)] = time.perf_counter()

    for name, module in model.named_modules():
        if part := PARTS.get(name.rsplit(".", 1)[-1]):

            def end(module: nn.Module, args: Any, output: Any, part: str = part) -> None:
                sync(device)
                spent[part] += time.perf_counter() - starts[id(module)]

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    return hooks
