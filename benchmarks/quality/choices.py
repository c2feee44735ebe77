"""What a choice of units is worth before its weights are trained, and what is left of it after.

    python -m benchmarks.quality.choices --seeds 1 2 3 --rows benchmarks/results/choices.jsonl

On the small Llama of `benchmarks.quality.small_llama`, half of the heads and FFN units of every
layer gone. Choices: rankings at once (`taylor`, `wanda-sp`, `random`); `learned`, MaskPrune's masks
alone, all weights frozen, trained by Adam at the paper's rate; `learned-shared`, by Adam-mini, one
scale for all masks of a kind in place of Adam's own for every mask, at the default rate (`prune
--method maskprune` has a shorter ramp by default, and lets masks rest once the shape is final);
both also with their gradients shuffled within each row; and `swapped`, Taylor's FFN units exchanged
for better ones as long as the loss falls. Held-out perplexity of each with nothing else done, with
its masks' own values, after the compensation, and after training what stays as every other arm is.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import Parser, environment, fix_threads, write_rows
from benchmarks.harness.rows import MEASURED
from benchmarks.quality import small_llama
from benchmarks.quality.structured import load, shuffle_gradients
from maskprune.commands.evaluate import perplexity
from maskprune.config import PruneConfig
from maskprune.hf.demo_model import demo_text
from maskprune.structured import prune as pruning
from maskprune.structured.budget import Budget
from maskprune.structured.distill import distill
from maskprune.structured.masks import Masks, attach_masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.saliency import one_shot, taylor, warm_start
from maskprune.training.data import block_order, token_blocks
from maskprune.training.optimizer import adamw

RANKINGS = ("taylor", "wanda-sp", "random")
# Each: the masks' optimizer, its rate, and whether its gradients are shuffled.
LEARNED = {
    "learned": ("adam", 1e-2, False),
    "learned-shuffled": ("adam", 1e-2, True),
    "learned-shared": ("adam-mini", 2e-1, False),
    "learned-shared-shuffled": ("adam-mini", 2e-1, True),
}
CHOICES = (*RANKINGS, *LEARNED, "swapped")
WINDOW, WINDOWS, RANKED, SEARCHED, BATCH = 256, 100, 128, 256, 4
SETTINGS: dict[str, Any] = {
    "head_sparsity": 0.5,
    "ffn_sparsity": 0.5,
    "batch_size": BATCH,
    "seq_len": WINDOW,
    "learning_rate": 5e-3,
    "output_r": 128,
    "lora_r": 32,
    "lora_alpha": 32,
    "compensation_tokens": 65536,
    "warm_start_blocks": RANKED,
    "lm_weight": 0.0,
    "save_steps": 100_000,
}
FOUND = (
    *MEASURED, "moved_head", "moved_ffn", "ppl_alone", "ppl_own_values", "ppl_compensated",
    "ppl_trained", "search_seconds", "tokens_searched",
)  # fmt: skip
Values = dict[str, torch.Tensor]


def values(masks: Masks) -> Values:
    return {kind: getattr(masks, kind).detach().clone() for kind in ("head", "ffn")}


@torch.no_grad()
def put(masks: Masks, chosen: Values, binary: bool = True) -> None:
    for kind, value in chosen.items():
        getattr(masks, kind).copy_((value != 0).float() if binary else value)


def learn(
    model: Any, masks: Masks, budget: Budget, blocks: torch.Tensor, name: str, steps: int, seed: int
) -> None:
    """MaskPrune's masks alone, from the Taylor start; seven tenths of the steps are its ramp."""
    optimizer_name, lr, shuffled = LEARNED[name]
    warm_start("taylor", model, masks, budget, blocks[:RANKED])
    reach = 0.7
    solver = Minimax(masks, budget, steps, reach=reach)
    mini = optimizer_name == "adam-mini"
    optimizer = adamw([{"params": list(masks.parameters()), "mini": mini}], 32, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    order = block_order(len(blocks), BATCH, steps, seed, seq_len=WINDOW)
    for step, rows in enumerate(order):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (1 - step / steps) / (1 - reach))
        distill(model, masks, blocks[rows], alpha=0.0).total.backward()
        if shuffled:
            shuffle_gradients(masks, generator)
        optimizer.step()
        optimizer.zero_grad()
        solver.step()
    solver.finish()


def swap(model: Any, masks: Masks, budget: Budget, blocks: torch.Tensor) -> int:
    """Exchange FFN units by first and second order of the loss; returns how often it was read.

    In a row with masks m, gradient g and F the Fisher information, a kept unit is worth
    F/2 - g and a pruned one -F/2 - g. The k best exchanges of every row are made at once, and k is
    halved where the loss does not fall.
    """
    one_shot("taylor", model, masks, budget, blocks[:RANKED])
    chosen = values(masks)
    fisher = taylor(model, masks, blocks)[1] / blocks.numel()
    put(masks, chosen)
    k, reads = 16, 1
    while k:
        masks.zero_grad()
        before = sum(loss(model, masks, part, len(blocks)) for part in blocks.split(16))
        m, g = masks.ffn.detach().clone(), masks.ffn.grad
        assert g is not None
        worth = (m - 0.5) * fisher - g
        least = worth.masked_fill(m == 0, torch.inf).topk(k, dim=1, largest=False)
        most = worth.masked_fill(m == 1, -torch.inf).topk(k, dim=1)
        better = most.values > least.values
        with torch.no_grad():
            masks.ffn.scatter_(1, least.indices, (~better).float())
            masks.ffn.scatter_(1, most.indices, better.float())
            after = sum(
                loss(model, masks, part, len(blocks), gradient=False) for part in blocks.split(16)
            )
            reads += 2
            if after >= before:
                masks.ffn.copy_(m)
                k //= 2
    return reads


def loss(model: Any, masks: Masks, part: torch.Tensor, n: int, gradient: bool = True) -> float:
    """This part's share of the mean KL over n blocks."""
    total = distill(model, masks, part, alpha=0.0).total * (len(part) / n)
    if gradient:
        total.backward()
    return float(total.detach())


@contextlib.contextmanager
def given(chosen: Values) -> Iterator[None]:
    """Within the context `prune` takes this choice where it would take a ranking's."""

    def choose(kind: str, model: Any, masks: Masks, *rest: Any, **kw: Any) -> Any:
        split = one_shot(kind, model, masks, *rest, **kw)
        put(masks, chosen)
        return split

    with mock.patch.object(pruning, "one_shot", choose):
        yield


def moved(chosen: Values, ranked: Values) -> dict[str, float]:
    """Share of the pruned units that the ranking keeps, per kind."""
    return {
        f"moved_{kind}": float(ranked[kind][value == 0].mean()) for kind, value in chosen.items()
    }


def one_choice(name: str, seed: int, steps: int, search_steps: int) -> Iterator[tuple[str, Any]]:
    """The fields of a row."""
    train, held_out = demo_text()
    model, tokenizer = load(small_llama.NAME)
    blocks = token_blocks(train, tokenizer, WINDOW, seed=seed)
    config = PruneConfig(**SETTINGS, method="taylor", steps=steps, seed=seed)

    def measured(pruned: Any) -> float:
        found = perplexity(pruned, tokenizer, held_out, WINDOW, limit=WINDOWS)
        return round(found["ppl"], 3)

    model.requires_grad_(False)
    budget = Budget.of(model, config)
    masks = attach_masks(model, config.head_unit)
    one_shot("taylor", model, masks, budget, blocks[:RANKED])
    ranked = values(masks)
    torch.manual_seed(seed)
    started, searched = time.monotonic(), 0
    if name in RANKINGS:
        one_shot(name, model, masks, budget, blocks[:RANKED])
    elif name == "swapped":
        searched = swap(model, masks, budget, blocks[:SEARCHED]) * SEARCHED * WINDOW
    else:
        learn(model, masks, budget, blocks, name, search_steps, seed)
        searched = search_steps * BATCH * WINDOW
    chosen = values(masks)
    yield "search_seconds", round(time.monotonic() - started, 1)
    yield "tokens_searched", searched
    yield from moved(chosen, ranked).items()
    put(masks, chosen)
    yield "ppl_alone", measured(model)
    if name in LEARNED:
        put(masks, chosen, binary=False)
        yield "ppl_own_values", measured(model)

    # A run whose weights do not move shows the compensation alone.
    for field, changes in (
        ("ppl_compensated", {"steps": 20, "learning_rate": 1e-12}),
        ("ppl_trained", {}),
    ):
        model, _ = load(small_llama.NAME)
        of_run = PruneConfig(**(vars(config) | changes))
        with given(chosen), tempfile.TemporaryDirectory() as run:
            pruned = pruning.prune(model, tokenizer, blocks, of_run, run_dir=Path(run), quiet=True)
        yield field, measured(pruned.model)


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=300, help="of training what stays")
    parser.add_argument("--search-steps", type=int, default=600, help="of learned masks")
    args = parser.parse_args()
    fix_threads(args.threads)
    for seed in args.seeds:
        for name in args.choices:
            row: dict[str, Any] = {
                "op": "choice",
                "model": small_llama.NAME,
                "provider": name,
                "seed": seed,
                "steps": args.steps,
                "search_steps": args.search_steps if name in LEARNED else None,
                "tokens_per_step": BATCH * WINDOW,
            }
            row |= dict(one_choice(name, seed, args.steps, args.search_steps))
            print(json.dumps(row), flush=True)
            if args.rows:
                write_rows(
                    args.rows,
                    [environment("cpu", 0) | row],
                    overwrite=args.overwrite,
                    ignore=FOUND,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
