"""MaskPrune against one-shot choices followed by the same adapter training.

    python -m benchmarks.quality.structured --rows benchmarks/results/quality.jsonl

All arms read the same tokens in the same order and train adapters of the same places and ranks
with the same loss and rates. `wanda-sp` prunes equal fractions of heads and FFN, as published;
`wanda-sp-split` is given the shape that MaskPrune learned, `wanda-sp-split-compensated` its
compensation as well, and `taylor-` and `random-split-compensated` are the same for the ranking
that MaskPrune starts from and for none. `maskprune-shuffled` is MaskPrune whose mask gradients are
permuted within each row: what it finds owes nothing to which gradient belongs to which unit;
`maskprune-split` is MaskPrune in that given shape.
`maskprune-cold` starts with all masks at 1, and `paper` is README's recipe of the paper's own run,
without compensation and with adapters on queries and values alone; both move the masks by the
paper's Adam, `paper-mini` by Adam-mini and is the same else, `paper-mini-shuffled` its control.
`--model small-llama` and `gemma-3-270m` take what `benchmarks.quality.small_llama` and `.gemma`
make. Held-out perplexity is on text that no arm read.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from benchmarks.harness import Parser, environment, fix_threads, write_rows
from benchmarks.harness.machine import machine
from benchmarks.harness.rows import MEASURED
from benchmarks.quality import gemma, small_llama
from benchmarks.quality.zero_shot import REPORTED, accuracies
from maskprune.commands.evaluate import perplexity
from maskprune.config import PruneConfig
from maskprune.hf.demo_model import MODEL_NAME, demo_text
from maskprune.hf.families import text_config
from maskprune.hf.load import load_model
from maskprune.hf.shape import Shape, shape_of
from maskprune.structured.prune import prune
from maskprune.training.checkpoints import newest
from maskprune.training.data import token_blocks
from maskprune.training.speed import bfloat16_is_faster

# Each arm: the method, whether it gets the learned shape, whether it compensates.
ARMS = {
    "maskprune": ("maskprune", False, True),
    "wanda-sp": ("wanda-sp", False, False),
    "wanda-sp-split": ("wanda-sp", True, False),
    "wanda-sp-split-compensated": ("wanda-sp", True, True),
    "taylor-split-compensated": ("taylor", True, True),
    "random-split-compensated": ("random", True, True),
    "maskprune-split": ("maskprune", True, True),
    "maskprune-shuffled": ("maskprune", True, True),
    "maskprune-cold": ("maskprune", True, True),
    "maskprune-plain": ("maskprune", False, False),
    "paper": ("maskprune", True, False),
    "paper-mini": ("maskprune", True, False),
    "paper-mini-shuffled": ("maskprune", True, False),
}
# Settings of their own, over those of the command line.
COLD: dict[str, Any] = {
    "warm_start": "none",
    "mask_optimizer": "adam",
    "mask_lr": 1e-2,
    "reach": None,
}
PAPER = COLD | {"lora_targets": "q_proj,v_proj", "alpha": 0.04, "interval": 10, "lm_weight": 0.0}
MINI = PAPER | {"mask_optimizer": "adam-mini", "mask_lr": None}
OWN = {"maskprune-cold": COLD, "paper": PAPER, "paper-mini": MINI, "paper-mini-shuffled": MINI}

# What a run finds, in which it may differ from an older one that it replaces.
FOUND = (
    *MEASURED, "sparsity", "heads", "kv_heads", "ffn", "last_kl", "locked_at", "residual",
    "train_seconds", "ppl_held_out", "ppl_text", "ppl_dtype", "kl_at_lock", "moved_head",
    "moved_ffn", "signal_ffn", *(f"acc_{name}" for name in REPORTED),
)  # fmt: skip


def shuffle_gradients(masks: nn.Module, generator: torch.Generator) -> None:
    """Permute the gradients of the masks within each row."""
    for mask in masks.parameters():
        if mask.grad is not None and mask.numel():
            order = torch.rand(mask.shape, generator=generator).argsort(dim=1)
            mask.grad.copy_(mask.grad.gather(1, order))


class ShuffleMaskGradients(TrainerCallback):
    """Permutes each row's mask gradients before the optimizer sees them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        modules = dict(kw["model"].named_modules())
        masks = next(m for name, m in modules.items() if name.endswith("maskprune"))
        # By the step, so that a resumed run draws what a whole one does.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * state.global_step)
        shuffle_gradients(masks, generator)


def load(name: str) -> tuple[Any, Any]:
    """(model, tokenizer) in float32."""
    for maker in (small_llama, gemma):
        if name == maker.NAME and not maker.folder().is_dir():
            raise SystemExit(f"{name} is not made yet: python -m {maker.__name__}")
    made = {maker.NAME: maker.folder() for maker in (small_llama, gemma)}
    return load_model(made.get(name, name), dtype="float32")


def settings(args: Any, arm: str, seed: int, shape: Shape | None, dense: Shape) -> PruneConfig:
    """The settings of one arm."""
    method, given, compensates = ARMS[arm]
    split: dict[str, Any] = {"sparsity": args.sparsity}
    if given and shape is not None:
        split = {
            "head_sparsity": 1 - shape.kv_heads / dense.kv_heads,
            "ffn_sparsity": 1 - shape.ffn / dense.ffn,
        }
    chosen = {
        "compensate": compensates,
        "method": method,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "seed": seed,
        "learning_rate": args.learning_rate,
        "save_steps": 50 if args.runs else 10_000,
        "logging_steps": 20,
    }
    return PruneConfig(**split, **(chosen | dict(args.set) | OWN.get(arm, {})))


def run_folder(
    args: Any, arm: str, config: PruneConfig, model: nn.Module, blocks: torch.Tensor
) -> Path | None:
    """Where a run under --runs keeps its checkpoints: a folder for an arm, its settings, the
    model's weights and the text."""
    if args.runs is None:
        return None
    told = json.dumps([str(args.model), vars(config)], sort_keys=True, default=str)
    key = zlib.crc32(told.encode())
    for tensor in (blocks, *model.parameters()):
        key = zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy(), key)
    return Path(args.runs, f"{arm}-{config.seed}-{key:08x}")


def commit_of(run: Path, resumed: bool) -> str:
    """The commit that a run under --runs began at, kept in its folder."""
    file = run / "commit.txt"
    if not resumed:
        run.mkdir(parents=True, exist_ok=True)
        file.write_text(str(machine("cpu")["commit"]))
    return file.read_text() if file.is_file() else "unknown"


def one_run(args: Any, arm: str, seed: int, shape: Shape | None) -> tuple[dict[str, Any], Shape]:
    """Prune once and measure; returns the row and the shape it ended in."""
    train, held_out = demo_text()
    model, tokenizer = load(args.model)
    dense = shape_of(model.config)
    config = settings(args, arm, seed, shape, dense)
    blocks = token_blocks(train, tokenizer, args.seq_len, seed=seed)
    started = time.monotonic()
    shuffled = [ShuffleMaskGradients(seed)] if arm.endswith("-shuffled") else []
    run = run_folder(args, arm, config, model, blocks)
    resumed = run is not None and newest(run) is not None
    began = {} if run is None else {"commit": commit_of(run, resumed)}
    result = prune(
        model,
        tokenizer,
        blocks,
        config,
        run_dir=run,
        resume=resumed,
        quiet=args.quiet,
        callbacks=shuffled,
    )
    seconds = None if resumed else round(time.monotonic() - started, 1)
    settled = [r for r in result.trace if r["locked"]]
    ranking = config.warm_start if config.method == "maskprune" else config.method
    read = 0 if ranking in ("none", "random") else config.warm_start_blocks * args.seq_len
    if config.compensate:
        fitted = config.compensation_tokens or 32 * dense.ffn
        # What ranks the units at once also sums what the compensation needs, in one pass.
        read = read + fitted if config.method == "maskprune" else max(read, fitted)
    row: dict[str, Any] = {
        "op": "quality",
        "model": args.model,
        "provider": arm,
        "seed": seed,
        "sparsity": 1 - result.trace[-1]["R"],
        "heads": result.shape.heads,
        "kv_heads": result.shape.kv_heads,
        "ffn": result.shape.ffn,
        "steps": args.steps,
        "tokens_per_step": args.batch_size * args.seq_len,
        "train": config.train,
        "learning_rate": config.rate(text_config(model.config).hidden_size),
        "output_r": config.output_r,
        "compensate": config.compensate,
        "refine_passes": config.refine_passes,
        "self_text": config.self_text,
        "lm_weight": config.lm_weight,
        "warm_start": config.warm_start if config.method == "maskprune" else None,
        "mask_optimizer": config.mask_adam if config.method == "maskprune" else None,
        "tokens_read": args.steps * args.batch_size * args.seq_len + read,
        "kl_at_lock": settled[0]["kl"],
        "last_kl": sum(r["kl"] for r in settled[-3:]) / len(settled[-3:]),
        "locked_at": next((r["step"] for r in result.trace if r["locked"]), None),
        "residual": max(result.residuals.values()),
        "train_seconds": seconds,
    }
    moved = {
        k: v for k, v in result.trace[-1].items() if k.startswith("moved_") and "rank" not in k
    }
    signals = [r["signal_ffn"] for r in result.trace if "signal_ffn" in r and not r["locked"]]
    row |= moved | ({"signal_ffn": sum(signals) / len(signals)} if signals else {})
    row |= {f"set_{n}": v for n, v in (dict(args.set) | OWN.get(arm, {})).items()}
    row |= began | qualities(args, result.model, tokenizer, held_out)
    return row, result.shape


def qualities(args: Any, model: Any, tokenizer: Any, held_out: Path) -> dict[str, Any]:
    """Perplexity on the demo's held-out text, on --text, and accuracies, where they are given."""
    sources = {"held_out": held_out} | ({"text": args.text} if args.text else {})
    faster = bfloat16_is_faster(model.config.hidden_size, args.window)
    dtype = torch.bfloat16 if faster else torch.float32
    found: dict[str, Any] = {"ppl_dtype": str(dtype).removeprefix("torch.")}
    for name, source in sources.items():
        made = perplexity(
            model,
            tokenizer,
            source,
            args.window,
            limit=args.windows,
            dtype=dtype if faster else None,
        )
        found[f"ppl_{name}"] = round(made["ppl"], 3)
        found[f"ppl_{name}_windows"] = made["windows"]
    found["ppl_window"] = args.window
    if args.zero_shot:
        found |= accuracies(model, tokenizer, args.zero_shot, args.questions)
    return found


def pair(text: str) -> tuple[str, Any]:
    """`name=value` with the value as a number or a truth value where it is one."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL_NAME, help="MODEL, small-llama, or gemma-3-270m")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, help="default: of what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:4])
    parser.add_argument(
        "--shape",
        type=int,
        nargs=2,
        metavar=("KV_HEADS", "FFN"),
        help="the shape of -split arms that run without maskprune",
    )
    parser.add_argument("--text", help="another text for perplexity, such as WikiText-2's")
    parser.add_argument(
        "--zero-shot",
        type=Path,
        metavar="FOLDER",
        help="piqa.jsonl, openbookqa.jsonl, boolq.jsonl for lm-eval's accuracy",
    )
    parser.add_argument("--questions", type=int, help="at most, of each file; default: all")
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="keep checkpoints there; the same command goes on where it was killed, and measures "
        "a finished run again without training it; rows name the commit that a run began at",
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument(
        "--set",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting of PruneConfig, for both arms",
    )
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    if any(ARMS[arm][1] for arm in args.arms) and not (args.shape or "maskprune" in args.arms):
        parser.error("a -split arm needs the learned shape: run maskprune too, or give --shape")
    known = {field.name for field in fields(PruneConfig)}
    if unknown := sorted({name for name, _ in args.set} - known):
        parser.error(f"--set {', '.join(unknown)}: no such setting of PruneConfig")
    fix_threads(args.threads)
    common = environment("cpu", 0)

    model, tokenizer = load(args.model)
    dense = {"op": "quality", "model": args.model, "provider": "dense"} | qualities(
        args, model, tokenizer, demo_text()[1]
    )
    rows = [common | dense]
    print(rows[-1], flush=True)
    del model
    for seed in args.seeds:
        shape: Shape | None = None
        if args.shape:
            shape = Shape(0, 0, args.shape[0], 0, args.shape[1])
        for arm in sorted(args.arms, key=list(ARMS).index):
            row, ended = one_run(args, arm, seed, shape)
            if arm == "maskprune":
                shape = shape or ended
            rows.append(common | row)
            print(row, flush=True)
            gc.collect()
            if args.rows:
                new = rows[-1:] if len(rows) > 2 else rows
                write_rows(args.rows, new, overwrite=args.overwrite, ignore=FOUND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
