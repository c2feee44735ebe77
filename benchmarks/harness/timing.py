"""Calls timed in turn, so that what slows the machine slows all alike; and their ratios."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.machine import sync


@dataclass(frozen=True)
class Times:
    """Milliseconds per call of one provider, sample by sample, in the order they were taken."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Linear interpolation between the two nearest samples."""
        ordered = sorted(self.samples)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def row(self) -> dict[str, Any]:
        """The measured fields of a result row."""
        values = {"median_ms": 0.5, "p10_ms": 0.1, "p90_ms": 0.9}
        row: dict[str, Any] = {k: float(f"{self.quantile(q):.5g}") for k, q in values.items()}
        return row | {"samples": len(self.samples)}


def ratio(slow: Sequence[Times], fast: Sequence[Times]) -> float:
    """Median over rounds of (mean of the slow samples of a round / mean of its fast ones).

    For times that `interleaved` took together: what slows a whole round, or many in a row, cancels
    within each, where a ratio of medians takes it for a difference.
    """
    means = (
        [statistics.fmean(r) for r in zip(*(t.samples for t in s), strict=True)]
        for s in (slow, fast)
    )
    return statistics.median(a / b for a, b in zip(*means, strict=True))


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage is collected now, and not again until the end."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def interleaved(
    providers: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    warmup: int = 3,
    rounds: int = 20,
    min_sample_ms: float = 2.0,
    max_seconds: float = float("inf"),
    before: Callable[[], Any] | None = None,
    seed: int = 0,
) -> dict[str, Times]:
    """Time the providers in turn, in a new random order each round, so drift hits all alike.

    One sample is the mean of as many calls as last `min_sample_ms`; with `before` (untimed: it
    restores an input or flushes a cache) it is one call. `max_seconds` ends the rounds early,
    but never before the fifth. No garbage is collected meanwhile.
    """
    if not providers or rounds < 1:
        raise ValueError(f"interleaved: {len(providers)} providers, {rounds} rounds; need 1 each")
    repeats = {}
    for name, call in providers.items():
        for _ in range(max(warmup, 1)):
            if before:
                before()
            sync(device)
            start = time.perf_counter()
            call()
            sync(device)
        once_ms = max((time.perf_counter() - start) * 1e3, 1e-4)
        repeats[name] = 1 if before else max(1, round(min_sample_ms / once_ms))
    order, shuffler = list(providers), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + max_seconds
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        order = mixed(order, providers, shuffler)
        for name in order:
            call, repeat = providers[name], repeats[name]
            if before:
                before()
            sync(device)
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            sync(device)
            samples[name].append((time.perf_counter() - start) * 1e3 / repeat)
    return {name: Times(tuple(values)) for name, values in samples.items()}


def mixed(
    order: Sequence[str], providers: Mapping[str, Callable[[], Any]], shuffler: random.Random
) -> list[str]:
    """A random order in which no call follows itself, where there is one.

    A call right after itself finds its weights in the caches, which would favour what is timed
    more than once. `order` is that of the round before.
    """
    for _ in range(100):
        new = shuffler.sample(list(order), len(order))
        line = [order[-1], *new]
        if all(providers[a] is not providers[b] for a, b in zip(line, line[1:], strict=False)):
            break
    return new


def noise(call: Callable[[], Any], **timing: Any) -> float:
    """|ratio - 1| of one callable timed against itself, interleaved."""
    times = interleaved({"a": call, "b": call}, **timing)
    return abs(ratio([times["a"]], [times["b"]]) - 1)
