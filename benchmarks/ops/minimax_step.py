"""The whole minimax step, clamp to duals: one call or launch against its definition in torch.

    python -m benchmarks.ops.minimax_step --rows benchmarks/results/minimax_step.jsonl

Every provider leaves the same masks and scalars; one that does not is reported and has no row.
Masks and state are restored before each call, untimed. On CUDA both are also timed as captured
graphs.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Parser, fix_threads, measure, show, write_rows
from benchmarks.ops.prox import captured, masks_of
from benchmarks.uniform.shapes import llama
from maskprune import ops
from maskprune.ops.minimax_step import INDEX
from maskprune.structured.budget import Budget
from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax

# Hidden size, layers, query heads, KV heads, FFN width; pruned by groups.
MODELS = {
    "SmolLM2-135M": (576, 30, 9, 3, 1536),
    "7B": (4096, 32, 32, 32, 11008),
    "70B": (8192, 80, 64, 8, 28672),
}
COLUMNS = (
    *("model", "head", "ffn", "provider", "threads", "median_ms", "p10_ms", "p90_ms", "speedup"),
)
# One exp, a few divisions and sums in float32, as in tests/ops/test_minimax_step.py.
RTOL, ATOL = 5e-6, 1e-6


def solver_of(model: str, device: str, seed: int) -> Minimax:
    """A solver in the middle of its ramp, on masks half of which are near zero."""
    config = llama(*MODELS[model])
    budget = Budget(config, sparsity=0.5)
    masks = Masks(budget.shape, budget.head_unit, config.model_type).to(device)
    solver = Minimax(masks, budget, total_steps=1000, interval=1)
    for mask in (masks.head, masks.ffn):
        mask.data = masks_of("half pruned", *mask.shape, device, seed)
    middle = {"step": 100, "y": 1.2, "z": 0.3, "r_head": 0.2, "r_ffn": 0.3}
    middle |= {"s_head": 0.2 * budget.head_units, "s_ffn": 0.3 * budget.ffn_units}
    for name, value in middle.items():
        solver.state[INDEX[name]] = value
    return solver


def rows_of(model: str, device: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """One row per provider at the sizes of one model."""
    solver = solver_of(model, device, seed)
    changed = [solver.masks.head.detach(), solver.masks.ffn.detach(), solver.state]
    start = [x.clone() for x in changed]
    expected = [x.clone() for x in changed]
    ops.minimax_step_(*expected, solver.table, solver.rates, backend="reference")

    def step(backend: str) -> None:
        ops.minimax_step_(*changed, solver.table, solver.rates, backend=backend)

    def restore() -> None:
        for x, was in zip(changed, start, strict=True):
            x.copy_(was)

    def check(name: str, output: None) -> None:
        for x, want in zip(changed, expected, strict=True):
            torch.testing.assert_close(x, want, rtol=RTOL, atol=ATOL)

    calls = {"minimax_step_": lambda: step("auto"), "reference": lambda: step("reference")}
    if device.startswith("cuda"):
        calls |= {f"{name} in a graph": captured(call) for name, call in calls.items()}
    head, ffn = changed[:2]
    rows = measure(
        "minimax_step_",
        calls,
        check=check,
        sizes={
            "model": model,
            "head": "x".join(map(str, head.shape)),
            "ffn": "x".join(map(str, ffn.shape)),
        },
        bytes_moved=8.0 * (head.numel() + ffn.numel()),
        device=device,
        seed=seed,
        rounds=rounds,
        before=restore,
    )
    base = {row["provider"]: row["median_ms"] for row in rows}
    return [row | {"speedup": round(base["reference"] / row["median_ms"], 2)} for row in rows]


def main() -> None:
    """Measure every model; print the table; add rows to --rows."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    fix_threads(args.threads)
    rows = []
    for model in args.models:
        rows += rows_of(model, args.device, args.seed, args.rounds)
    print(show(rows, COLUMNS))
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
