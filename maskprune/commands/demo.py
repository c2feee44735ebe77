"""Prune the embedded default and show, side by side, what it was and what came out."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maskprune.commands.evaluate import perplexity
from maskprune.commands.prune import run_prune
from maskprune.commands.record import RunRecord
from maskprune.config import PruneConfig, PruneFiles
from maskprune.files import JsonObject
from maskprune.hf.demo_model import MODEL_NAME, demo_text
from maskprune.hf.equality import Difference
from maskprune.hf.load import load_model
from maskprune.training.allocator import return_freed_memory
from maskprune.training.speed import bfloat16_is_faster, throughput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROMPTS = (
    "The Roman Empire was one of the largest",
    "Water boils when it is heated because",
)
WINDOW = 512
WINDOWS = 20
Row = tuple[str, str, str]


def settings(steps: int, seed: int) -> PruneConfig:
    """The demo's settings: 20 % sparsity, in minutes on two cores."""
    return PruneConfig(
        sparsity=0.2,
        steps=steps,
        batch_size=2,
        seq_len=256,
        seed=seed,
        logging_steps=5,
        device="cpu",
    )


def megabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e6:,.1f} MB"


def compare(dense: JsonObject, pruned: JsonObject, difference: Difference) -> list[Row]:
    """The rows of the table: what is measured, dense, pruned.

    Args:
        dense, pruned: shape and cost, with `ppl`, `prefill_tokens_per_s` and `decode_tokens_per_s`.
        difference: of the masked model's logits and the exported one's, as `compare_logits`.
    """

    def row(label: str, key: str, form: str) -> Row:
        return (label, form.format(dense[key]), form.format(pruned[key]))

    return [
        row("query heads per layer", "heads", "{}"),
        row("KV heads per layer", "kv_heads", "{}"),
        row("FFN width", "ffn", "{}"),
        row("parameters", "parameters", "{:,}"),
        (
            "weights on disk, float32",
            megabytes(dense["bytes"]),
            megabytes(pruned["bytes"]),
        ),
        row("KV cache bytes per token", "kv_bytes_per_token", "{:,}"),
        row("perplexity, held-out text", "ppl", "{:.2f}"),
        row("prefill tokens/s, here", "prefill_tokens_per_s", "{:.0f}"),
        row("decode tokens/s, here", "decode_tokens_per_s", "{:.1f}"),
        (
            "largest logit difference",
            "",
            f"{difference.largest:.1e} of {difference.largest_logit:.1f}",
        ),
    ]


def table(rows: Sequence[Row], head: Row = ("", "dense", "pruned")) -> str:
    """Rows under a head; the first column is aligned left, the others right."""
    everything = [head, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]

    def line(row: Row) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(head) - 1))
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def continuation(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 30
) -> str:
    """What the model writes after `prompt`, greedily, on one line."""
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        **ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes; Linux reports KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def demonstrate(out: Path, steps: int, seed: int = 0) -> RunRecord:
    """Run `maskprune prune` on the demo model into `out`, then add measurements to its record."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    files = PruneFiles(model=MODEL_NAME, output=str(out), overwrite=True)
    record = run_prune(files, settings(steps, seed), anew=True)
    assert record is not None and record.difference, "the demo runs as one process"

    _, held_out = demo_text()
    dense, tokenizer = load_model(MODEL_NAME, dtype="float32", device="cpu")
    pruned, _ = load_model(out, device="cpu")
    models = {"dense": dense, "pruned": pruned}
    speeds = throughput(models)
    faster = bfloat16_is_faster(dense.config.hidden_size, WINDOW)
    dtype = torch.bfloat16 if faster else None
    for name, facts in (("dense", record.dense), ("pruned", record.pruned)):
        print(f"measuring perplexity, {name}", file=sys.stderr)
        model = models[name]
        measured = perplexity(model, tokenizer, held_out, WINDOW, limit=WINDOWS, dtype=dtype)
        ppl = measured["ppl"]
        facts |= {"ppl": ppl} | speeds[name]
        facts["texts"] = {p: continuation(model, tokenizer, p) for p in PROMPTS}
    record.perplexity = {
        "data": f"held-out text of the demo, the first {WINDOWS} windows"
        + (", computed in bfloat16" if faster else ""),
        "seq_len": WINDOW,
        "dense": record.dense["ppl"],
        "pruned": record.pruned["ppl"],
    }
    record.card_only["limits"] = [
        f"Made in {steps} steps to show the method, not to be used: the base model's weights went "
        "through 4-bit quantisation before."
    ]
    record.details |= {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes()}
    record.save(out)
    print()
    print(table(compare(record.dense, record.pruned, record.difference)))
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m maskprune.commands.demo`."""
    parser = argparse.ArgumentParser(prog="python -m maskprune.commands.demo", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    return_freed_memory()
    try:
        record = demonstrate(given.out, given.steps, given.seed)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from maskprune.commands.report import report

    for prompt in PROMPTS:
        print(f"\n{prompt} ...")
        for name, facts in (("dense", record.dense), ("pruned", record.pruned)):
            print(f"  {name:7}{facts['texts'][prompt]}")
    print(f"\ncheckpoint  {given.out}/\nreport      {report(given.out)}")
    took, most = record.details["seconds"] / 60, record.details["peak_bytes"] / 1e9
    print(f"took {took:.1f} min, at most {most:.1f} GB of memory")
    print(
        "\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{given.out}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{given.out}")'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
