"""Build the variants of each model, time them against each other, and yield the result rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.harness import NOISE_LIMIT, Times, environment, interleaved, joules_per_call, ratio
from benchmarks.harness.memory import peak_mib
from benchmarks.uniform.regimes import Runner, cache_difference, nothing, prepare
from benchmarks.uniform.shapes import Cost, Widths, cost_of, named_config, weights_folder
from benchmarks.uniform.structure import structure_row
from benchmarks.uniform.variants import TOLERANCE, cut, difference, draw_masks, widths_of

AGAIN = " again"


@dataclass(frozen=True)
class Plan:
    """What to measure; one case is a model, sparsity, regime, mode, batch and length."""

    models: Sequence[str]
    sparsities: Sequence[float] = (0.2, 0.25, 0.5)
    variants: Sequence[str] = ("dense", "uniform")
    regimes: Sequence[str] = ("prefill", "decode")
    modes: Sequence[str] = ("eager",)
    batches: Sequence[int] = (1,)
    lengths: Sequence[int] = (256,)
    decode_batches: Sequence[int] = (1,)
    contexts: Sequence[int] = (256,)
    multiple_of: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    rounds: int = 9
    seconds: float = 5.0
    # A training step allocates and frees what it keeps for the backward pass: its times scatter
    # more, so that nine samples often fail the self-check where thirty pass it.
    train_rounds: int = 30
    train_seconds: float = 60.0
    structure: bool = True
    load: bool = True
    # Compiling takes minutes, running milliseconds: in compiled modes these stand for all.
    compiled_variants: Sequence[str] = field(default=("dense", "uniform", "compresso"))

    def limits(self, regime: str) -> tuple[int, float]:
        """Rounds of a case, and the seconds after which no more begin."""
        if regime == "train":
            return self.train_rounds, self.train_seconds
        return self.rounds, self.seconds

    def cases(self) -> list[tuple[str, str, int, int]]:
        """(regime, mode, batch, length), the training step last: it leaves the heap larger.

        Prefill takes every batch and length; a training step the first batch and every length;
        decode has batches and contexts of its own.
        """
        sizes = {
            "prefill": product(self.batches, self.lengths),
            "decode": product(self.decode_batches, self.contexts),
            "train": product(self.batches[:1], self.lengths),
        }
        return [
            (regime, mode, batch, length)
            for regime, pairs in sizes.items()
            if regime in self.regimes
            for (batch, length), mode in product(list(pairs), self.modes)
            if not (regime == "train" and mode != "eager")
        ]


def free_bytes(device: str) -> int:
    """Memory free for this process: of the GPU, or what Linux calls available."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def needed_bytes(plan: Plan, costs: Sequence[Cost]) -> int:
    """Weights of every model held at once, and the largest case's KV caches or activations.

    Embeddings are shared. Structure stacks one model's layers beside it. A training step keeps
    about 34 d + 6 F values a token and layer, and its logits three times in float32.
    """
    size = plan.dtype.itemsize
    weights = costs[0].parameters + sum(c.layer_parameters for c in costs[1:])
    total = weights * size
    extra = max(c.layer_parameters for c in costs) * size if plan.structure else 0
    for regime, _, batch, length in plan.cases():
        kv = sum(c.kv_bytes(batch, length + 1, size) for c in costs)
        c = costs[0]
        live = batch * length * size * (8 * c.hidden + 4 * max(c.widths.ffn))
        if regime == "train":
            live = (
                batch * length * size * (34 * c.hidden * len(c.widths.ffn) + 6 * sum(c.widths.ffn))
            )
            live += 12 * batch * length * c.vocab
        extra = max(extra, kv if regime == "decode" else live)
    return total + extra


def too_large(plan: Plan, costs: Sequence[Cost]) -> str | None:
    """Why these models do not fit the device together; None where they do."""
    need, free = needed_bytes(plan, costs), free_bytes(plan.device)
    if need <= free:
        return None
    return f"too large: needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free on {plan.device}"


def load_dense(name: str, plan: Plan) -> nn.Module:
    """The dense model, real weights where there are any, frozen and in eval mode."""
    torch.manual_seed(plan.seed)
    if folder := weights_folder(name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=plan.dtype).to(plan.device)
    else:
        with torch.device(plan.device):
            model = AutoModelForCausalLM.from_config(named_config(name), dtype=plan.dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def groups(plan: Plan, costs: dict[str, Cost]) -> list[list[str]]:
    """Variants to hold at once: all; else dense with one other at a time; none fit: no group."""
    names = [name for name in plan.variants if name != "dense"]
    pairs = [["dense", name] for name in names]
    for way in ([["dense", *names]], pairs):
        if fitting := [g for g in way if not too_large(plan, [costs[n] for n in g])]:
            return fitting
    return []


def sweep(plan: Plan) -> Iterator[dict[str, Any]]:
    """The rows of a plan, as they come: `structure` of each variant, `latency` of each case."""
    for name in plan.models:
        config = named_config(name)
        dense: nn.Module | None = None
        for sparsity in plan.sparsities:
            widths = widths_of(config, sparsity, plan.multiple_of, plan.seed)
            costs = {variant: cost_of(config, w) for variant, w in widths.items()}
            base = base_of(plan, name, sparsity)
            fitting = groups(plan, costs)
            if not fitting:
                reason = too_large(plan, [costs["dense"], costs["uniform"]])
                row = {"op": "latency", "provider": "dense", **base, "skipped": reason}
                yield row | stamp(plan)
                continue
            dense = load_dense(name, plan) if dense is None else dense
            for group in fitting:
                yield from _group(plan, base, dense, {v: widths[v] for v in group}, costs)
                gc.collect()


def stamp(plan: Plan) -> dict[str, Any]:
    """The machine line of this plan's device."""
    return environment(plan.device, plan.seed)


def built(
    plan: Plan, label: str, dense: nn.Module, variant: str, widths: Widths
) -> tuple[nn.Module, dict[str, Any]]:
    """One variant, and what its rows say of it.

    Raises:
        RuntimeError: its logits, with a cache or without, are not those of the masked model.
    """
    masks = draw_masks(dense.config, widths, plan.seed)
    model = dense if variant == "dense" else cut(dense, widths, masks)
    apart, limit = difference(model, dense, masks), TOLERANCE[plan.dtype]
    cached = cache_difference(model)
    if not (apart <= limit and cached <= limit):
        raise RuntimeError(
            f"{label} {variant}: logits {apart:.2g} off the masked model, {cached:.2g} "
            f"off with a cache; expected at most {limit:g}; nothing was measured"
        )
    cost = cost_of(dense.config, widths)
    return model, {
        "model_class": type(model).__name__,
        "heads": _one_or_all(widths.heads),
        "kv_heads": _one_or_all(widths.kv_heads),
        "ffn": _one_or_all(widths.ffn),
        "parameters": cost.parameters,
        "layer_parameters": cost.layer_parameters,
        "apart": apart,
        "cache_apart": cached,
        "checked": True,
    }


def base_of(plan: Plan, name: str, sparsity: float) -> dict[str, Any]:
    """The fields that say which model a row is about."""
    label = name.rstrip("/").rsplit("/", 1)[-1]
    base = {"model": label, "sparsity": sparsity, "dtype": str(plan.dtype)[6:]}
    return base | {"weights": "real" if weights_folder(name) else "random"}


@torch.no_grad()
def _group(
    plan: Plan, base: dict[str, Any], dense: nn.Module, widths: dict[str, Widths], costs: Any
) -> Iterator[dict[str, Any]]:
    models, facts = {}, {}
    for variant, w in widths.items():
        models[variant], facts[variant] = built(plan, base["model"], dense, variant, w)
        if plan.structure:
            load = plan.load and plan.device == "cpu" and costs[variant].parameters < 5e8
            yield {
                "op": "structure",
                "provider": variant,
                **base,
                **facts[variant],
                **structure_row(models[variant], w, load),
                **stamp(plan),
            }
    for case in plan.cases():
        yield from _case(plan, base, models, facts, costs, case)


def _one_or_all(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _case(
    plan: Plan, base: Any, models: Any, facts: Any, costs: Any, case: tuple[str, str, int, int]
) -> Iterator[dict[str, Any]]:
    regime, mode, batch, length = case
    where = {"regime": regime, "mode": mode, "batch": batch, "length": length}
    runners: dict[str, Runner] = {}
    memory: dict[str, float | None] = {}
    for variant, model in models.items():
        if mode in ("compile", "regional") and variant not in plan.compiled_variants:
            continue
        tag = f"{variant}_{regime}_{batch}_{length}".replace("-", "_")
        try:
            runner = prepare(model, regime, mode, batch, length, tag=tag, seed=plan.seed)
            runner.before()
            memory[variant] = peak_mib(runner.call, plan.device)
            runners[variant] = runner
        except (RuntimeError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            yield {
                "op": "latency",
                "provider": variant,
                **base,
                **where,
                "skipped": reason,
            } | stamp(plan)
    if "dense" not in runners:
        for runner in runners.values():
            runner.after()
        return
    times, speedups, noise = timed(plan, runners, *plan.limits(regime))
    size, count = plan.dtype.itemsize, batch * (1 if regime == "decode" else length)
    for variant, runner in runners.items():
        cost, dense_cost, ms = costs[variant], costs["dense"], times[variant].quantile(0.5)
        ideal = work(regime, dense_cost, batch, length, size) / work(
            regime, cost, batch, length, size
        )
        row = {"op": "latency", "provider": variant, **base, **where, **facts[variant]}
        row |= times[variant].row() | {"tokens_s": float(f"{count / ms * 1e3:.5g}")}
        row |= {"speedup": round(speedups[variant], 4), "ratio": "rounds"}
        row |= {"ideal": round(ideal, 4), "gain_share": None}
        if ideal > 1.001:
            row["gain_share"] = round((speedups[variant] - 1) / (ideal - 1), 4)
        row |= {"noise": round(noise, 4), "noisy": noise > NOISE_LIMIT}
        row["peak_mib"] = None if memory[variant] is None else round(memory[variant], 2)
        row["kv_bytes"] = cost.kv_bytes(batch, length, size)
        row["flops"] = {"prefill": cost.prefill_flops, "train": cost.train_flops}.get(
            regime, lambda *_: None
        )(batch, length)
        row["bytes"] = cost.decode_bytes(batch, length, size) if regime == "decode" else None
        row |= {"compile_s": runner.compile_s, "graphs": runner.graphs}
        row["joules"] = joules_per_call(lambda r=runner: (r.before(), r.call()), plan.device)
        yield row | stamp(plan)
    for runner in runners.values():
        runner.after()


def work(regime: str, cost: Cost, batch: int, length: int, size: int) -> int:
    """What the ideal line counts: bytes of a decode step, FLOPs of a prefill or training step."""
    if regime == "decode":
        return cost.decode_bytes(batch, length, size)
    return (
        cost.train_flops(batch, length) if regime == "train" else cost.prefill_flops(batch, length)
    )


def timed(
    plan: Plan, runners: dict[str, Runner], rounds: int, seconds: float
) -> tuple[dict[str, Times], dict[str, float], float]:
    """Times of all runners, their speed-ups over dense, and the noise.

    Every variant is timed twice a round; the noise is how far any is from itself, by the same
    ratio that gives the speed-ups. Noise above the limit gets as many rounds again, at most twice;
    every sample counts.
    """
    calls = {name: runner.call for name, runner in runners.items()}
    calls |= {name + AGAIN: call for name, call in calls.items()}

    def before() -> None:
        for runner in runners.values():
            runner.before()

    samples: dict[str, tuple[float, ...]] = dict.fromkeys(calls, ())
    for turn in range(3):
        more = interleaved(
            calls,
            device=plan.device,
            warmup=2,
            rounds=rounds,
            max_seconds=seconds,
            before=None if all(r.before is nothing for r in runners.values()) else before,
            seed=plan.seed + turn,
        )
        samples = {name: taken + more[name].samples for name, taken in samples.items()}
        times = {name: Times(taken) for name, taken in samples.items()}
        noise = max(abs(ratio([times[name]], [times[name + AGAIN]]) - 1) for name in runners)
        if noise <= NOISE_LIMIT:
            break
    of = {name: [times[name], times[name + AGAIN]] for name in runners}
    speedups = {
        name: ratio(of["dense"], taken) if name != "dense" else 1.0 for name, taken in of.items()
    }
    pooled = {n: Times(sum((t.samples for t in taken), ())) for n, taken in of.items()}
    return pooled, speedups, noise
