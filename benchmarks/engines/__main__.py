"""Pruned checkpoints in the engines that people use: loads, agrees, how fast; see docs/engines.md.

    python -m benchmarks.engines llama.cpp          (or `make engines ENGINES=llama.cpp`)

Each engine runs in an environment of its own, made on first use in maskprune's cache. Parts:
`small`, a random model of every family for each head unit; `demo`, the demo model dense, pruned,
uniform and heterogeneous, with its speeds; `quality`, llama.cpp's quantised files of the demo's
trained checkpoint beside those of the dense model. Where an engine does something else than
maskprune/hf/engines.py says, or a part fails, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engines import llama_cpp, vllm_cpu
from benchmarks.engines.environments import ready
from benchmarks.engines.models import EVERY_FAMILY, load_config, write_demo, write_small
from benchmarks.engines.scripted import Scripted
from benchmarks.harness import environment
from benchmarks.harness.rows import MEASURED, write_rows
from maskprune.hf.engines import verdict

PARTS = ("small", "demo", "quality")
ENGINES: dict[str, Any] = {
    "llama.cpp": llama_cpp,
    "vllm": vllm_cpu,
    # Its exporter sends what it does to its makers, but for continuous integration.
    "openvino": Scripted("openvino", settings={"CI": "true"}),
    **{name: Scripted(name) for name in ("ct2", "ort", "mlx")},
}
QUALITY = {"llama.cpp": llama_cpp.quality}
# Half-precision tables of GELU alone make 1e-2; another function makes whole units.
LARGEST_DIFFERENCE, SAME_TOKENS = 0.05, 0.97
WINDOWS, WINDOW = 12, 512
# What of a row is a finding: two rows equal in all else are of one case.
FOUND = (
    *MEASURED, "python", "torch", "maskprune", "triton", "transformers", "packages", "loads",
    "error", "same_tokens", "tokens", "logprob_difference", "compared", "expected", "known",
    "runs_as", "bytes", "ppl", "ppl_tokens", "cpu", "class", "shape",
    *(f"{p}_{f}" for p in ("prefill", "decode") for f in ("tokens_s", "against_dense", "noise")),
)  # fmt: skip
Row = dict[str, Any]


def agrees(row: Row) -> bool:
    """Whether an engine ran a model and computed what transformers does."""
    return bool(
        row["loads"]
        and row.get("logprob_difference", 0.0) <= LARGEST_DIFFERENCE
        and row.get("same_tokens", 1) >= SAME_TOKENS * row.get("tokens", 1)
    )


def contradiction(row: Row) -> str | None:
    """How a row of agreement contradicts what the table promises, or None."""
    ran, name = agrees(row), f"{row['engine']}: {row['model']}"
    said = row.get("error") or (
        f"{row.get('same_tokens')} of {row.get('tokens')} tokens, log-probabilities within "
        f"{row.get('logprob_difference', 0.0):.2g}"
    )
    if row["expected"] in ("loads", "slower") and not ran:
        return f"{name} is promised and does not run: {said}"
    if row["expected"] == "refused" and ran:
        return f"{name} is said to be refused and runs: {said}"
    if row["expected"] == "unknown":
        return f"{name} has no line in maskprune/hf/engines.py: {said}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the engines asked for; 0 if all is as promised."""
    parser = argparse.ArgumentParser(prog="benchmarks.engines", description=__doc__)
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], help="by default all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["small", "demo"])
    parser.add_argument("--families", nargs="+", choices=EVERY_FAMILY, default=list(EVERY_FAMILY))
    parser.add_argument("--pruned", type=Path, help="a trained checkpoint of the demo model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument("--work", type=Path, default=Path("build/engines"), help="scratch folder")
    parser.add_argument("--environments", type=Path, help="folder of the engines' environments")
    parser.add_argument("--rows", type=Path, help="JSON lines file the rows are added to")
    parser.add_argument("--overwrite", action="store_true", help="replace rows of equal cases")
    args = parser.parse_args(argv)
    if args.pruned is None and Path("demo-out", "config.json").is_file():
        args.pruned = Path("demo-out")
    if "quality" in args.parts and args.pruned is None:
        parser.error("quality needs a trained checkpoint: run `make demo`, or give --pruned DIR")
    torch.set_num_threads(args.threads)
    started, failures = time.monotonic(), []
    rows: list[Row] = []

    def keep(made: Iterable[Row]) -> None:
        for row in made:
            if row["what"] == "agreement":
                row = judged(row, described)
                if wrong := contradiction(row):
                    failures.append(wrong)
            row |= environment("cpu", 0) | {"threads": args.threads}
            print(line(row), flush=True)
            rows.extend(write_rows(args.rows, [row], overwrite=args.overwrite, ignore=FOUND)
                        if args.rows else [row])  # fmt: skip

    pythons = {}
    for name in args.engines or ENGINES:
        try:
            pythons[name] = ready(name, args.environments)
        except RuntimeError as error:
            failures.append(f"{name}: could not be installed: {error}")
    described: dict[str, Any] = {}
    begun = time.monotonic()
    steps: dict[str, Callable[[str], Iterable[Row]]] = {}
    if "small" in args.parts and pythons:
        made = write_small(args.work / "models", args.families, tuple(pythons))
        described |= made
        steps["small"] = lambda name: ENGINES[name].small(
            pythons[name], made, args.work, args.threads
        )
    if {"demo", "quality"} & set(args.parts) and pythons:
        demo = write_demo(args.work / "models", args.pruned)
        described |= demo
        if "demo" in args.parts:
            steps["demo"] = lambda name: ENGINES[name].demo(
                pythons[name], demo, args.work, args.threads
            )
        if "quality" in args.parts:
            windows = held_out(args.work / "windows.npy")
            steps["quality"] = lambda name: QUALITY[name](
                pythons[name], demo, windows, args.work, args.threads
            )
    for name in pythons:
        for part, step in steps.items():
            if part == "quality" and name not in QUALITY:
                continue
            try:
                keep(step(name))
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{name}: {part} failed: {error}")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    now = time.monotonic()
    print(f"{len(rows)} rows in {now - begun:.0f} s, after {begun - started:.0f} s of installing")
    return 1 if failures else 0


def judged(row: Row, described: dict[str, Any]) -> Row:
    """The row with what the table says of its checkpoint."""
    facts = described[row["model"]]
    if facts.get("heterogeneous"):
        return row | {"expected": "refused" if facts["heterogeneous"] == "shapes" else "loads"}
    said = verdict(load_config(facts["folder"]), row["engine"])
    return row | {"expected": said.answer if said else "unknown"}


def held_out(path: Path) -> Path:
    """Windows (N, 512) of the demo's held-out text, as token ids, saved to `path`."""
    from maskprune.hf.demo_model import demo_model_dir, demo_text
    from maskprune.hf.load import load_tokenizer
    from maskprune.training.data import token_blocks

    tokens = WINDOWS * WINDOW
    blocks = token_blocks(
        str(demo_text()[1]), load_tokenizer(demo_model_dir()), WINDOW, num_tokens=tokens
    )
    np.save(path, blocks[:WINDOWS].numpy())
    return path


def line(row: Row) -> str:
    """A row as one line of text."""
    head = f"{row['engine']} {row['what']} {row['model']}"
    if row["what"] != "agreement":
        text = ", ".join(
            f"{p} {row[f'{p}_tokens_s']:.4g} tok/s ({row[f'{p}_against_dense']:.2f}x dense)"
            for p in ("prefill", "decode")
        )
        ppl = f", perplexity {row['ppl']:.2f}" if "ppl" in row else ""
        return f"{head} {row['type']}: {row['bytes'] / 1e6:.1f} MB, {text}{ppl}"
    if not row["loads"]:
        return f"{head}: refused: {row['error']}"
    if "tokens" not in row:
        return f"{head}: loads"
    return (
        f"{head}: {row['same_tokens']} of {row['tokens']} tokens, log-probabilities within "
        f"{row['logprob_difference']:.2g}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
