"""2:4 masks that MaskLLM learned against one-shot ones, on the demo model.

    python -m benchmarks.quality.two_four --rows benchmarks/results/quality_two_four.jsonl
    python -m benchmarks.quality.two_four --start --rows benchmarks/results/two_four_start.jsonl

Every arm calibrates on the same blocks; the learned ones go on from there on the same tokens in the
same order. Only `sparsegpt-updated` changes the weights that stay. Held-out perplexity is on text
that no arm read. --start trains nothing: it is the loss of a run's first samples, by the strength
of the prior and the temperature.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import Parser, environment, fix_threads, show, write_rows
from benchmarks.harness.rows import MEASURED
from benchmarks.quality.structured import pair, perplexities
from maskprune.config import SparsifyConfig
from maskprune.hf.demo_model import demo_model_dir, demo_text
from maskprune.hf.load import load_model
from maskprune.training.data import token_blocks
from maskprune.two_four import attach_two_four, one_shot_masks
from maskprune.two_four.sparsify import sparsify

# Each arm: the method, and what it starts from or whether it updates weights.
ARMS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt-updated": {"method": "sparsegpt", "update_weights": True},
    "maskllm-sparsegpt": {"prior": "sparsegpt"},
    "maskllm-wanda": {"prior": "wanda"},
    "maskllm-magnitude": {"prior": "magnitude"},
    "maskllm-none": {"prior": "none"},
}
# What a run finds, in which it may differ from an older one that it replaces.
FOUND = (
    *MEASURED, "last_loss", "max_prob", "changed", "kept_norm", "seconds", "ppl_held_out",
    "ppl_text", "ppl_dtype",
)  # fmt: skip


def settings(args: Any, arm: str, seed: int) -> SparsifyConfig:
    """The settings of one arm."""
    chosen = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "gradient_accumulation": args.draws,
        "seq_len": args.seq_len,
        "calibration_blocks": args.calibration_blocks,
        "seed": seed,
        "save_steps": 10_000,
        "logging_steps": 20,
    }
    learned = {} if "method" in ARMS[arm] else dict(args.set)
    return SparsifyConfig(**(chosen | ARMS[arm] | learned))


def one_run(args: Any, arm: str, seed: int) -> dict[str, Any]:
    """Make the model sparse by one arm and measure it; the row."""
    train, held_out = demo_text()
    model, tokenizer = load_model(demo_model_dir(), dtype="float32")
    config = settings(args, arm, seed)
    blocks = token_blocks(train, tokenizer, args.seq_len, seed=seed)
    started = time.monotonic()
    result = sparsify(model, tokenizer, blocks, config, quiet=args.quiet)
    seconds = time.monotonic() - started
    row: dict[str, Any] = {
        "op": "two_four",
        "provider": arm,
        "seed": seed,
        "calibration_tokens": config.calibration_blocks * args.seq_len,
        "seconds": round(seconds, 1),
    }
    if config.method == "maskllm":
        last = result.trace[-1]
        row |= {
            "steps": args.steps,
            "tokens_per_step": args.batch_size * args.seq_len,
            "draws_per_step": args.draws,
            "loss": config.loss,
            "last_loss": last["loss"],
            "max_prob": last["max_prob"],
            "changed": last["changed"],
            "kept_norm": last["kept_norm"],
        }
        row |= {f"set_{name}": value for name, value in args.set}
    return row | perplexities(args, result.model, tokenizer, held_out)


@torch.no_grad()
def loss_of(model: Any, ids: torch.Tensor) -> float:
    """Language-model loss in nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def first_samples(args: Any) -> list[dict[str, Any]]:
    """Rows with the loss of the prior masks and of first samples around them."""
    model, tokenizer = load_model(demo_model_dir(), dtype="float32")
    blocks = token_blocks(demo_text()[0], tokenizer, args.seq_len, seed=args.seeds[0])
    n = args.calibration_blocks
    prior = one_shot_masks(model, "sparsegpt", blocks[:n])
    ids = blocks[n : n + args.batch_size]
    row = {
        "op": "two_four_start",
        "seed": args.seeds[0],
        "calibration_tokens": n * args.seq_len,
        "tokens": ids.numel(),
    }
    rows = [row | {"provider": "dense", "loss": loss_of(model, ids)}]
    for strength in (3.0, 5.0, 8.0):
        masks = attach_two_four(model, prior, strength=strength, seed=args.seeds[0])
        start = row | {"strength": strength}
        with masks.seen_as("hard"):
            rows.append(start | {"provider": "choice", "loss": loss_of(model, ids)})
        for tau in (4.0, 2.0, 1.0, 0.5):
            masks.schedule(100.0, tau)
            masks.draw(0)
            sample = {"provider": "sample", "kappa": 100.0, "tau": tau}
            rows.append(start | sample | {"loss": loss_of(model, ids)})
        masks.detach()
    return rows


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--draws", type=int, default=1, help="samples of the masks per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--calibration-blocks", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:5])
    parser.add_argument("--text", help="another text for perplexity, such as WikiText-2's")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument(
        "--set",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting of SparsifyConfig, for the learned arms",
    )
    parser.add_argument("--start", action="store_true", help="only the loss of first samples")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    known = {field.name for field in fields(SparsifyConfig)} - vars(args).keys()
    if unknown := sorted({name for name, _ in args.set} - known):
        parser.error(f"--set {', '.join(unknown)}: no such setting, or one with a flag of its own")
    fix_threads(args.threads)
    common = environment("cpu", 0)

    if args.start:
        rows = [common | row for row in first_samples(args)]
        print(show(rows, ("provider", "strength", "tau", "loss")))
        if args.rows:
            write_rows(args.rows, rows, overwrite=args.overwrite, ignore=(*MEASURED, "loss"))
        return 0
    model, tokenizer = load_model(demo_model_dir(), dtype="float32")
    dense = {"op": "two_four", "provider": "dense"}
    rows = [common | dense | perplexities(args, model, tokenizer, demo_text()[1])]
    print(rows[-1], flush=True)
    del model
    for seed in args.seeds:
        for arm in sorted(args.arms, key=list(ARMS).index):
            rows.append(common | one_run(args, arm, seed))
            print(rows[-1], flush=True)
            gc.collect()
            if args.rows:
                new = rows[-1:] if len(rows) > 2 else rows
                write_rows(args.rows, new, overwrite=args.overwrite, ignore=FOUND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
