"""Everything that only a GPU can show, in one resumable command: tests, kernels, a real run.

    python -m benchmarks.gpu            (or `make gpu`)

Runs what is not done yet until --seconds are over, then says what is left; repeat it until it
says that all is done. It needs no network and installs nothing: the extension is built in place
from what travels with the checkout. Done steps are noted under --state, result rows go to
benchmarks/results/, each with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")

# The paper's settings (arXiv 2502.14008, section 4.1), on the model at hand.
PAPER = (
    "--warm-start none --mask-optimizer adam --lora-targets q_proj,v_proj --alpha 0.04 "
    "--lm-weight 0 --interval 10 --no-compensate --batch-size 16 --seq-len 512 "
    "--learning-rate 1e-3 --mask-lr 1e-2 --save-steps 200"
).split()

# Folders of runs that the time limit cut off; the next call resumes them.
IN_PROGRESS = {"prune": "paper.run", "sparsify": "two_four.run"}


def steps(
    model: str | None, text: str | None, paper_steps: int, state: Path
) -> dict[str, list[str]]:
    """Every step by name, cheapest first; the pruning run only where a model and text are given."""
    python = sys.executable
    plan = {
        "build": [python, "setup.py", "-q", "build_ext", "--inplace"],
        "tests": [python, "-m", "pytest", "-q", "-x", "tests", "-m", "gpu or not demo"],
        "prox": [python, "-m", "benchmarks.ops.prox", "--device", "cuda"],
        "minimax_step": [python, "-m", "benchmarks.ops.minimax_step", "--device", "cuda"],
        "masked_forward": [
            python,
            "-m",
            "benchmarks.ops.masked_forward",
            "ops",
            "--device",
            "cuda",
        ],
        "two_four": [python, "-m", "benchmarks.ops.two_four", "--device", "cuda"],
        "masked_training": [
            python,
            "-m",
            "benchmarks.ops.masked_forward",
            "train",
            "--device",
            "cuda",
        ],
        "latency": [python, "benchmarks/latency.py", "--device", "cuda"],
    }
    measured = ("prox", "minimax_step", "masked_forward", "two_four", "masked_training", "latency")
    for name in measured:
        plan[name] += ["--rows", str(RESULTS / f"{name}.jsonl"), "--overwrite"]
    if model and text:
        out = state / "paper"
        plan["prune"] = [
            python, "-m", "maskprune.cli", "prune", model, "-o", str(out), "--data", text,
            "--sparsity", "0.2", "--steps", str(paper_steps), *PAPER,
        ]  # fmt: skip
        plan["sparsify"] = [
            python, "-m", "maskprune.cli", "sparsify", model, "-o", str(state / "two_four"),
            "--data", text, "--steps", "2000", "--batch-size", "16", "--seq-len", "512",
            "--save-steps", "200",
        ]  # fmt: skip
        for made in ("paper", "two_four"):
            plan[f"check_{made}"] = [python, "-m", "maskprune.cli", "check", str(state / made)]
            plan[f"eval_{made}"] = [
                python, "-m", "maskprune.cli", "eval", str(state / made), "--ppl", text,
                "--seq-len", "512", "--limit", "40",
                "--json", str(RESULTS / f"{made}_run_eval.json"),
            ]  # fmt: skip
    return plan


def run(name: str, command: list[str], seconds: float, state: Path) -> int | None:
    """Run one step; its exit code, or None where the time ran out. Output goes to a log too."""
    if name in IN_PROGRESS and (state / IN_PROGRESS[name]).exists():
        command = [*command, "--resume"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (state / f"{name}.log").open("a") as log:
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            return started.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=560.0, help="stop in time for this limit")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--model", help="checkpoint folder of the model to prune")
    parser.add_argument("--text", help="training text of the pruning run")
    parser.add_argument("--paper-steps", type=int, default=8750)
    parser.add_argument("--only", nargs="+", help="these steps alone")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here; run this on a GPU machine", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    args.state.mkdir(parents=True, exist_ok=True)
    note = args.state / "done.json"
    done: dict[str, int] = json.loads(note.read_text()) if note.is_file() else {}
    plan = steps(args.model, args.text, args.paper_steps, args.state)
    for name, command in plan.items():
        if name in done or (args.only and name not in args.only):
            continue
        left = deadline - time.monotonic()
        if left < 20:
            break
        print(f"{name}: {' '.join(command)}", flush=True)
        code = run(name, command, left, args.state)
        if code is None:
            print(f"{name}: out of time; repeat the command to continue")
            break
        print((args.state / f"{name}.log").read_text()[-1500:])
        done[name] = code
        note.write_text(json.dumps(done))
    missing = [name for name in plan if name not in done]
    failed = [name for name, code in done.items() if code]
    print(f"done: {sorted(done)}; failed: {failed}; left: {missing or 'nothing, all is done'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
