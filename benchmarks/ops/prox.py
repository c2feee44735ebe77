"""The least-s proximal step: against per-layer loops and batched sorts, in eager torch.

    python -m benchmarks.ops.prox --rows benchmarks/results/prox.jsonl

Every provider leaves the same masks and returns the same sums; a provider that does not is reported
and has no row. Masks are restored before each call, untimed. On CUDA `least_s_prox_` and the
batched sort are also timed as captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Parser, fix_threads, measure, show, write_rows
from maskprune import ops
from maskprune.ops.backend import extension
from maskprune.ops.least_s_prox import cpp

# FFN masks of 7B, 70B and 405B models, and the head masks of the first.
SIZES = ((32, 11008), (80, 28672), (126, 53248), (32, 32))
KINDS = ("uniform", "ones", "half pruned")
COLUMNS = ("R", "N", "kind", "provider", "threads", "median_ms", "p10_ms", "p90_ms", "speedup")
SUM_RTOL = 1e-4
Sums = tuple[torch.Tensor, torch.Tensor]


def masks_of(kind: str, R: int, N: int, device: str, seed: int) -> torch.Tensor:
    """Masks as training meets them: spread, untouched, or with half of them near zero."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(R, N, generator=g)
    if kind == "ones":
        u = torch.ones(R, N)
    elif kind == "half pruned":
        u = torch.where(torch.rand(R, N, generator=g) < 0.5, 1e-3 * u, 0.8 + 0.2 * u)
    return u.to(device)


def topk_loop(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor) -> Sums:
    """What a training script does: topk and scatter, layer by layer."""
    k, sum_sq, next_sq = int(s.ceil().item()), [], []
    for m in mask:
        values, index = torch.topk(m, k + 1, largest=False)
        small = values[:k] * shrink
        m.scatter_(0, index[:k], small)
        sum_sq.append(small.square().sum())
        next_sq.append(values[k].square())
    return torch.stack(sum_sq), torch.stack(next_sq)


def batched_topk(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor) -> Sums:
    """All layers at once by topk; k still comes to the host."""
    k = int(s.ceil().item())
    values, index = torch.topk(mask, k + 1, dim=1, largest=False)
    small = values[:, :k] * shrink
    mask.scatter_(1, index[:, :k], small)
    return small.square().sum(1), values[:, k].square()


def batched_sort(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor) -> Sums:
    """All layers at once by a stable sort: exact ties, k stays on the device."""
    values, index = mask.sort(dim=1, stable=True)
    rank = torch.arange(mask.shape[1], device=mask.device)
    k = s.ceil()
    new = torch.where(rank < k, values * shrink, values)
    mask.scatter_(1, index, new)
    sum_sq = torch.where(rank < k, new, 0.0).square().sum(1)
    return sum_sq, torch.where(rank == k, new, 0.0).square().sum(1)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def rows_of(
    kind: str, R: int, N: int, device: str, seed: int, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """One row per provider at one size."""
    start = masks_of(kind, R, N, device, seed)
    mask = start.clone()
    s, shrink = torch.tensor(0.4 * N, device=device), torch.tensor(0.9, device=device)
    expected = start.clone()
    sums = ops.least_s_prox_(expected, s, shrink, backend="reference")

    calls: dict[str, Callable[[], Any]] = {
        "least_s_prox_": lambda: ops.least_s_prox_(mask, s, shrink),
        "torch.topk per layer": lambda: topk_loop(mask, s, shrink),
        "torch.topk batched": lambda: batched_topk(mask, s, shrink),
        "torch.sort batched": lambda: batched_sort(mask, s, shrink),
    }
    if device == "cpu" and extension() is not None:
        for isa in ("avx512", "avx2", "portable"):
            try:
                cpp(mask[:1], s, shrink, isa)
            except ValueError:
                continue
            calls[f"cpp {isa}"] = lambda isa=isa: cpp(mask, s, shrink, isa)
    if compiled:
        fused = torch.compile(batched_sort)
        calls["torch.compile of the sort"] = lambda: fused(mask, s, shrink)
    if device == "cuda":
        for name in ("least_s_prox_", "torch.sort batched"):
            calls[f"{name} in a graph"] = captured(calls[name])

    def check(name: str, output: Sums) -> None:
        for got, want in zip(output, sums, strict=True):
            torch.testing.assert_close(got, want, rtol=SUM_RTOL, atol=0)
        # topk breaks ties in any order: of equal masks the same number shrinks, not the same ones.
        if "topk" in name:
            assert torch.equal(mask.sort(1).values, expected.sort(1).values), "masks differ"
        else:
            assert torch.equal(mask, expected), "masks differ"

    rows = measure(
        "least_s_prox_",
        calls,
        check=check,
        sizes={"R": R, "N": N, "kind": kind},
        bytes_moved=8.0 * R * N,
        device=device,
        seed=seed,
        rounds=rounds,
        before=lambda: mask.copy_(start),
    )
    base = {row["provider"]: row["median_ms"] for row in rows}
    for row in rows:
        row["speedup"] = round(base["torch.sort batched"] / row["median_ms"], 2)
    return rows


def main() -> None:
    """Measure every size and kind; print the table; add rows to --rows."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--sizes", nargs="+", default=[f"{R}x{N}" for R, N in SIZES])
    parser.add_argument("--compile", action="store_true", help="torch.compile of the sort as well")
    args = parser.parse_args()
    fix_threads(args.threads)
    rows = []
    for size in args.sizes:
        R, N = map(int, size.split("x"))
        for kind in args.kinds:
            rows += rows_of(kind, R, N, args.device, args.seed, args.rounds, args.compile)
    print(show(rows, COLUMNS))
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
