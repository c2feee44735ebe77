"""Every operation on the CPU in two checkouts of maskprune, taking turns: does a change cost time?

    python -m benchmarks.ops.compare ../before . --rows benchmarks/results/compare.jsonl

Both need their extension built in place (`python setup.py build_ext --inplace`). One thread. A row
has the ratio of the second checkout's median time to the first's: above 1 is slower.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What a row finds, in which it may differ from an older one that it replaces.
FOUND = ("ratio", "low", "high", "ms", "rounds")
COLUMNS = ("op", "case", "ratio", "low", "high", "ms")


def cases() -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by operation and case; inputs are made once."""
    import torch
    from transformers import LlamaConfig

    import maskprune as mp
    from maskprune import ops

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(dtype)

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    budget = mp.Budget(config, sparsity=0.2)
    trained = mp.Masks(budget.shape, "kv_group", "llama")
    solver = mp.Minimax(trained, budget, 1_000_000)

    def step() -> None:
        # Written to as by an optimizer; a solver refuses masks that nothing trains.
        for mask in trained.parameters():
            mask.mul_(1.0)
        solver.step()

    masks, ones = random(32, 11008), torch.ones(32, 11008)
    s, decay = torch.tensor(2000.5), torch.tensor(0.9)
    found: dict[tuple[str, str], Callable[[], object]] = {
        ("least_s_prox_", "32 x 11008"): lambda: ops.least_s_prox_(masks.clone(), s, decay),
        ("least_s_prox_", "32 x 11008, all 1"): lambda: ops.least_s_prox_(ones.clone(), s, decay),
        ("Minimax.step", "7B"): step,
    }
    for dtype in (torch.float32, torch.bfloat16):
        case = str(dtype).removeprefix("torch.")
        tensors = random(512, 1536, dtype=dtype), random(512, 1536, dtype=dtype)
        calls = _of_weights(*tensors, random(1536, 1536, dtype=dtype), random(1536))
        found |= {(op, case): run for op, run in calls.items()}
    return found


def _of_weights(
    x: torch.Tensor, up: torch.Tensor, W: torch.Tensor, mask: torch.Tensor
) -> dict[str, Callable[[], object]]:
    import torch

    from maskprune import ops

    heads, index = mask[:24], (mask > 0.3).nonzero()[:, 0]
    logits = W.float().view(4, 1536, 384).repeat(2, 1, 1)[:6]
    seed, kappa, tau = torch.tensor(7), torch.tensor(100.0), torch.tensor(2.0)
    return {
        "scale_heads": lambda: ops.scale_heads(x, heads, backend="cpp"),
        "masked_swiglu": lambda: ops.masked_swiglu(x, up, mask, backend="cpp"),
        "fold_columns": lambda: ops.fold_columns(W, mask, index),
        "gather_rows": lambda: ops.gather_rows(W, index),
        "gumbel_two_four": lambda: ops.gumbel_two_four(W, logits, seed, kappa, tau),
    }


def measure(seconds: float) -> dict[str, float]:
    """Median seconds of a call, by 'operation | case'."""
    import torch

    torch.set_num_threads(1)
    medians = {}
    with torch.no_grad():
        for (op, case), run in cases().items():
            run()
            times: list[float] = []
            until = time.perf_counter() + seconds
            while time.perf_counter() < until or len(times) < 5:
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            medians[f"{op} | {case}"] = statistics.median(times)
    return medians


def main(given: list[str] | None = None) -> int:
    from benchmarks.harness import Parser, environment, show, write_rows
    from benchmarks.harness.rows import MEASURED

    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT")
    parser.add_argument("--each", type=float, default=0.15, help="seconds a case and a round")
    args = parser.parse_args(given)
    rounds = []
    for number in range(args.rounds):
        pair = {}
        for place in sorted((0, 1), reverse=number % 2 == 1):
            checkout = str(args.checkouts[place].resolve())
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(args.each)],
                env=os.environ | {"PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            )
            pair[place] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(pair)
    common = environment("cpu", 0) | {"threads": 1}
    rows = []
    for key in rounds[0][0]:
        ratios = sorted(pair[1][key] / pair[0][key] for pair in rounds)
        op, case = key.split(" | ")
        quarter = len(ratios) // 4
        rows.append(
            common
            | {
                "op": op,
                "case": case,
                "ratio": round(statistics.median(ratios), 3),
                "low": round(ratios[quarter], 3),
                "high": round(ratios[-1 - quarter], 3),
                "ms": round(1e3 * statistics.median(pair[1][key] for pair in rounds), 4),
                "rounds": args.rounds,
            }
        )
    print(show(rows, COLUMNS))
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite, ignore=(*MEASURED, *FOUND))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        # In a process of its own, which sees one checkout and nothing of the other's.
        print(json.dumps(measure(float(sys.argv[2]))))
        sys.exit(0)
    sys.exit(main())
