"""FFN units that go a few at a time while all weights train, against all of them at once.

    python -m benchmarks.quality.rounds --seeds 1 2 3 --rows benchmarks/results/rounds.jsonl

On the small Llama of `benchmarks.quality.small_llama`, half of the heads and FFN units of every
layer gone, all weights of the blocks trained against the dense model by the KL alone, as `prune
--train weights --lm-weight 0` does. The heads go at once by Taylor's ranking. The FFN units go at
once, or in equal rounds over the first part of the run, each judged anew on the weights as they
are and on text of its own, which `tokens_read` counts. A round chooses by Taylor's ranking, at
random, or by `obs`, Optimal Brain Surgeon: one unit after the other, each time the one whose
removal costs the least after the least squares of what stays, in the norm of the outputs'
gradients. Every removal, however chosen, is followed by those least squares.
Removed columns are kept at zero, not cut, so unlike in `prune` their gradients count in the clip.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Parser, environment, fix_threads, write_rows
from benchmarks.harness.rows import MEASURED
from benchmarks.quality import small_llama
from benchmarks.quality.structured import load
from maskprune.commands.evaluate import perplexity
from maskprune.hf.demo_model import demo_text
from maskprune.hf.families import FAMILIES, attention_output, ffn_output, layers_of
from maskprune.structured.compensation import RIDGE
from maskprune.structured.distill import distill
from maskprune.structured.masks import attach_masks
from maskprune.structured.saliency import Observer, taylor, unit_saliency
from maskprune.training.activations import add_gram
from maskprune.training.data import block_order, token_blocks
from maskprune.training.optimizer import adamw

CHOICES = ("taylor", "obs", "random")
WINDOW, WINDOWS, BATCH = 256, 100, 4
FITTED, REFITTED = 256, 32
RATE, WARMUP = 2e-3, 0.03
FOUND = (*MEASURED, "tokens_read", "last_kl", "moved_ffn", "ppl_held_out", "train_seconds")
Place = tuple[str, int]


def remove(W: torch.Tensor, H: torch.Tensor, gone: torch.Tensor, order: torch.Tensor) -> None:
    """Removes input channels of W, the least squares over those that stay after each.

    Args:
        W: (O, I) weight, changed in place.
        H: (I, I) sum over tokens of x x^T.
        gone: (I,) bool, the channels that are at 0 already; changed in place.
        order: (k,) channels to remove; or, as (k, O, O), the outputs' gradient covariance once
            for each of k channels that are chosen here.
    """
    live = (~gone).nonzero()[:, 0]
    kept = H.double()[live][:, live]
    kept.diagonal().add_(RIDGE * kept.diagonal().mean())
    inverse = torch.linalg.inv(kept)
    new = W.detach().double()[:, live]
    stays = torch.ones(len(live), dtype=torch.bool)
    for step in order:
        if step.dim():
            cost = torch.einsum("oi,op,pi->i", new, step.double(), new) / inverse.diagonal()
            at = int(cost.masked_fill(~stays, torch.inf).argmin())
        else:
            at = int((live == step).nonzero())
        row = inverse[at] / inverse[at, at]
        new -= torch.outer(new[:, at], row)
        inverse -= torch.outer(inverse[:, at], row)
        stays[at] = False
        new[:, ~stays] = 0
        # What is gone has no inverse; 1 keeps its cost finite, and it is not asked again.
        inverse[~stays] = 0
        inverse[:, ~stays] = 0
        inverse.diagonal()[~stays] = 1
    gone[live[~stays]] = True
    W.data[:, live] = new.to(W.dtype)
    W.data[:, gone] = 0


class Student:
    """The model being pruned at full width: pruned channels are zero columns, kept at zero."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.model.layers.requires_grad_(True)
        self.model.model.norm.requires_grad_(True)
        self.family = FAMILIES[model.config.model_type]
        self.outputs: dict[Place, Any] = {}
        for layer, block in enumerate(layers_of(self.model)):
            self.outputs["head", layer] = attention_output(block, self.family)
            self.outputs["ffn", layer] = ffn_output(block, self.family)
        self.gone = {
            place: torch.zeros(module.in_features, dtype=torch.bool)
            for place, module in self.outputs.items()
        }

    @torch.no_grad()
    def stay_pruned(self) -> None:
        for place, module in self.outputs.items():
            module.weight[:, self.gone[place]] = 0

    def look(self, blocks: torch.Tensor) -> dict[str, Any]:
        """Saliency of heads and FFN units, and for each output matrix the sums of its inputs and
        of its outputs' gradients, of the next tokens' cross entropy on `blocks`."""
        H: dict[Place, torch.Tensor] = {}
        G: dict[Place, torch.Tensor] = {}

        def see(kind: str, layer: int, module: Any, x: torch.Tensor, g: torch.Tensor) -> None:
            H[kind, layer] = add_gram(H.get((kind, layer)), x)

        handles = [
            module.register_full_backward_hook(
                lambda module, of_inputs, of_outputs, place=place: G.__setitem__(
                    place, add_gram(G.get(place), of_outputs[0])
                )
            )
            for place, module in self.outputs.items()
        ]
        masks = attach_masks(self.model, "kv_group")
        try:
            with Observer(self.model, self.family, see):
                head, ffn = taylor(self.model, masks, blocks)
            head = unit_saliency(head, masks)
        finally:
            masks.detach()
            for handle in handles:
                handle.remove()
        return {"head": head, "ffn": ffn, "H": H, "G": G}

    def remove_heads(self, seen: dict[str, Any], units: int) -> None:
        for layer, saliency in enumerate(seen["head"]):
            place, size = ("head", layer), len(self.gone["head", layer]) // len(saliency)
            least = saliency.argsort(stable=True)[:units]
            channels = (least[:, None] * size + torch.arange(size)).flatten()
            weight = self.outputs[place].weight
            remove(weight, seen["H"][place], self.gone[place], channels)

    def remove_units(
        self, seen: dict[str, Any], units: int, choice: str, generator: torch.Generator
    ) -> None:
        for layer, saliency in enumerate(seen["ffn"]):
            place = ("ffn", layer)
            gone = self.gone[place]
            if choice == "obs":
                order = seen["G"][place].expand(units, -1, -1)
            else:
                if choice == "random":
                    saliency = torch.rand(len(saliency), generator=generator)
                order = saliency.masked_fill(gone, torch.inf).argsort(stable=True)[:units]
            remove(self.outputs[place].weight, seen["H"][place], gone, order)


def one_run(args: Any, choice: str, rounds: int, seed: int) -> dict[str, Any]:
    """The fields of a row."""
    train, held_out = demo_text()
    teacher, tokenizer = load(small_llama.NAME)
    blocks = token_blocks(train, tokenizer, WINDOW, seed=seed)
    started = time.monotonic()
    student = Student(teacher.requires_grad_(False))
    model = student.model
    masks = attach_masks(teacher, "kv_group")
    generator = torch.Generator().manual_seed(seed)
    width, kv_heads = model.config.intermediate_size, model.config.num_key_value_heads
    at = {round(i * args.reach * args.steps / rounds): i for i in range(rounds)}
    removed = [width // 2 * (i + 1) // rounds - width // 2 * i // rounds for i in range(rounds)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": parameters, "lr": RATE, "weight_decay": 0.0}], 32)
    warmup = max(1, round(WARMUP * args.steps))
    taken = 0
    kls: list[float] = []
    ranked: list[torch.Tensor] = []
    order = block_order(len(blocks), BATCH, args.steps, seed, seq_len=WINDOW)
    for step, rows in enumerate(order):
        if step in at:
            text = blocks[taken : taken + (REFITTED if taken else FITTED)]
            taken += len(text)
            seen = student.look(text)
            if not ranked:
                student.remove_heads(seen, kv_heads // 2)
                ranked = list(seen["ffn"].argsort(dim=1, stable=True)[:, : width // 2])
            student.remove_units(seen, removed[at[step]], choice, generator)
        optimizer.param_groups[0]["lr"] = (
            RATE * min(1, (step + 1) / warmup) * (1 - step / args.steps)
        )
        loss = distill(model, masks, blocks[rows], alpha=0.0, teacher=teacher)
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        student.stay_pruned()
        kls.append(float(loss.kl))
    first = [~student.gone["ffn", i][units] for i, units in enumerate(ranked)]
    found = perplexity(model.eval(), tokenizer, held_out, WINDOW, limit=WINDOWS)
    return {
        "tokens_read": taken * WINDOW + args.steps * BATCH * WINDOW,
        "last_kl": sum(kls[-60:]) / len(kls[-60:]),
        "moved_ffn": float(torch.cat(first).float().mean()),
        "train_seconds": round(time.monotonic() - started, 1),
        "ppl_held_out": round(found["ppl"], 3),
    }


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--in-rounds", type=int, nargs="+", default=[1, 10], help="1: all at once")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--reach", type=float, default=0.3, help="share of the steps with rounds")
    args = parser.parse_args()
    fix_threads(args.threads)
    common = environment("cpu", 0)
    for seed in args.seeds:
        for rounds in args.in_rounds:
            for choice in args.choices:
                row: dict[str, Any] = {
                    "op": "rounds",
                    "model": small_llama.NAME,
                    "provider": choice,
                    "rounds": rounds,
                    "reach": args.reach if rounds > 1 else 0.0,
                    "seed": seed,
                    "steps": args.steps,
                    "tokens_per_step": BATCH * WINDOW,
                }
                row |= one_run(args, choice, rounds, seed)
                print(json.dumps(row), flush=True)
                if args.rows:
                    write_rows(args.rows, [common | row], overwrite=args.overwrite, ignore=FOUND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
