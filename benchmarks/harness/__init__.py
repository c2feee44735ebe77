"""Interleaved timing, the machine line, and result rows: what every benchmark here shares.

    threads = fix_threads(args.threads)
    rows = measure("fold_columns", {"reference": f, "cpp": g}, check=same_as(expected, rtol=1e-6),
                   sizes={"O": 4096, "I": 11008}, bytes_moved=..., device="cpu", seed=0)
    write_rows(args.rows, rows)

A provider whose output the check refuses is not timed and has no row.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness.arguments import Parser
from benchmarks.harness.machine import environment, joules_per_call, sync
from benchmarks.harness.rows import read_rows, show, write_rows
from benchmarks.harness.timing import Times, interleaved, noise, ratio

__all__ = [
    "NOISE_LIMIT",
    "Parser",
    "Times",
    "copy_bandwidth",
    "environment",
    "fix_threads",
    "interleaved",
    "joules_per_call",
    "measure",
    "noise",
    "pytest_row",
    "ratio",
    "read_rows",
    "same_as",
    "show",
    "sync",
    "write_rows",
]
NOISE_LIMIT = 0.03
Check = Callable[[str, Any], None]


def fix_threads(count: int | None = None) -> int:
    """Set torch's threads to `count`, by default the cores this process may use; return it."""
    count = count or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def same_as(expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> Check:
    """A check for `measure`: the output (tensor or nest of them) is `expected` within tolerance."""

    def check(name: str, output: Any) -> None:
        torch.testing.assert_close(
            output, expected, rtol=rtol, atol=atol, equal_nan=True, check_device=False
        )

    return check


def measure(
    op: str,
    providers: Mapping[str, Callable[[], Any]],
    *,
    check: Check,
    sizes: Mapping[str, Any],
    bytes_moved: float | None = None,
    flops: float | None = None,
    device: str = "cpu",
    seed: int = 0,
    **timing: Any,
) -> list[dict[str, Any]]:
    """Check every provider's output, time those that pass, and return one row for each.

    check: called with (name, output of one call); raises AssertionError to refuse. A refused
    provider is reported on stderr and gets no row. bytes_moved, flops: of one call.
    """
    passed = {}
    for name, call in providers.items():
        if before := timing.get("before"):
            before()
        try:
            check(name, call())
            passed[name] = call
        except AssertionError as refusal:
            print(f"{op}: {name} is wrong, no row: {str(refusal).strip()}", file=sys.stderr)
    if not passed:
        return []
    rows = []
    for name, times in interleaved(passed, device=device, seed=seed, **timing).items():
        row = {"op": op, "provider": name, **sizes, **times.row(), "checked": True}
        seconds = times.quantile(0.5) / 1e3
        row |= {"gb_s": round(bytes_moved / seconds / 1e9, 3)} if bytes_moved else {}
        row |= {"tflop_s": round(flops / seconds / 1e12, 4)} if flops else {}
        rows.append(row | environment(device, seed))
    return rows


def pytest_row(
    benchmark: Any, op: str, provider: str, call: Callable[[], Any], *, check: Check, **sizes: Any
) -> dict[str, Any] | None:
    """The same row from pytest-benchmark's fixture: check, let it time `call`, return the row.

    Where timing is disabled (`--benchmark-disable`, xdist), only checks and returns None.
    """
    check(provider, call())
    benchmark(call)
    if benchmark.disabled:
        return None
    times = Times(tuple(1e3 * s for s in benchmark.stats.stats.sorted_data))
    row = {"op": op, "provider": provider, **sizes, **times.row(), "checked": True}
    benchmark.extra_info.update(row)
    return row | environment("cpu", 0)


def copy_bandwidth(device: str = "cpu", size: int = 1 << 28, rounds: int = 9) -> float:
    """GB/s of a copy of `size` bytes, read and write both counted: the roof of a plot."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device=device, rounds=rounds)
    return round(2 * size / times["copy"].quantile(0.5) / 1e6, 2)
