"""`maskprune check`: is this folder a stock checkpoint, who loads it, does it equal its origin."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from maskprune.hf.checkpoint_files import stock_config


@dataclass
class Findings:
    """What was checked and held, what did not, and what to know."""

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, held: bool, good: str, bad: str) -> None:
        """Record one check."""
        (self.good if held else self.bad).append(good if held else bad)


def check(
    folder: str | Path,
    *,
    against: str | None = None,
    masks_file: str | Path | None = None,
    targets: str | None = None,
) -> Findings:
    """Check a checkpoint folder; with `against` and `masks_file`, its logits too.

    Args:
        folder: the checkpoint.
        against: the original model: folder, hub id or `smollm2-135m`.
        masks_file: the masks of the run, of units or 2:4; `folder/adapter`, where there is one, is
            applied too.
        targets: engines to lint the shape for, see `plan.lint`.

    Raises:
        ValueError: the folder is no checkpoint at all.
    """
    from transformers import AutoConfig

    from maskprune.hf.families import FAMILIES
    from maskprune.hf.load import check_checkpoint, load_model
    from maskprune.hf.shape import shape_of
    from maskprune.structured.plan import lint, tp_sizes

    folder, found = Path(folder), Findings()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a checkpoint folder")
    check_checkpoint(folder)
    raw = json.loads((folder / "config.json").read_text())
    found.say("auto_map" not in raw, "needs no remote code", "config.json asks for remote code")
    found.say(
        bool(raw.get("architectures")),
        f"class {(raw.get('architectures') or ['?'])[0]}",
        "config.json names no architectures; vLLM and llama.cpp need it",
    )
    stumbling = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    stumbling += [n for n in ("adapter_config.json",) if (folder / n).exists()]
    found.say(not stumbling, "no file that stock tools stumble over", f"stray files: {stumbling}")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type in FAMILIES:
        shape = shape_of(config)
        found.say(
            shape.heads % shape.kv_heads == 0,
            f"uniform: {shape}",
            f"{shape.heads} heads do not divide into {shape.kv_heads} KV heads",
        )
        expected = stock_config(config)
        # What transformers 4 reads, and vLLM where the head count is not hidden / head size.
        wanted = [k for k in ("head_dim", "rope_theta", "torch_dtype") if k in expected]
        missing = [k for k in wanted if raw.get(k) != expected[k]]
        found.say(
            not missing,
            "config reads the same in transformers 4 and 5",
            f"config.json lacks or contradicts {missing}; transformers 4 would read another model",
        )
        sizes = ", ".join(map(str, tp_sizes(shape)))
        found.notes.append(f"tensor-parallel sizes: {sizes}")
        found.notes += [f"misaligned for {n}" for n in lint(shape, targets or "vllm,gguf,awq128")]
    else:
        found.notes.append(f"family {config.model_type} is not in maskprune's table")
    model, tokenizer = load_model(folder)
    if config.model_type in FAMILIES and _is_two_four(model):
        found.notes.append("2:4 in every linear of its blocks")
    found.good.append("loads with from_pretrained, every tensor present, tokenizer too")
    _check_generation(model, tokenizer, found)
    if against is not None:
        _check_equal(model, tokenizer, against, masks_file, folder / "adapter", found)
    elif masks_file is not None:
        raise ValueError("--masks needs --against MODEL, the model that the masks belong to")
    return found


def _is_two_four(model: Any) -> bool:
    from maskprune.two_four.patterns import is_two_four, oriented, prunable

    try:
        linears = prunable(model)
    except ValueError:
        return False
    return all(is_two_four(oriented(module)) for module in linears.values())


@torch.no_grad()
def _check_generation(model: Any, tokenizer: Any, found: Findings) -> None:
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids.to(model.device)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    same = torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )
    found.say(same, "generates with cache as without", "generation differs with and without cache")


def _check_equal(
    model: Any,
    tokenizer: Any,
    against: str,
    masks_file: str | Path | None,
    adapter: Path,
    found: Findings,
) -> None:
    from maskprune.hf.equality import TOLERANCE, compare_logits
    from maskprune.hf.load import load_model
    from maskprune.hf.quiet import quiet_transformers
    from maskprune.structured.masks import attach_masks, load_masks
    from maskprune.two_four.patterns import apply_masks, is_masks_file
    from maskprune.two_four.patterns import load_masks as load_two_four

    origin, _ = load_model(against, dtype=str(model.dtype).removeprefix("torch."))
    if adapter.is_dir():
        from peft import PeftModel

        with quiet_transformers():
            origin = PeftModel.from_pretrained(origin, adapter)
    if masks_file is not None and is_masks_file(masks_file):
        apply_masks(origin, load_two_four(masks_file)[0])
    elif masks_file is not None:
        attach_masks(origin, masks=load_masks(masks_file), fused=False)
    ids = torch.randint(0, len(tokenizer), (2, 128), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    difference = compare_logits(origin, model, ids)
    limit = TOLERANCE[model.dtype]
    text = (
        f"largest logit difference {difference.largest:.2e}, relative {difference.relative:.2e}, "
        f"top-1 agreement {difference.top1_agreement:.4f}"
    )
    found.say(
        difference.relative <= limit,
        f"equals the masked model: {text}",
        f"differs from the masked model: {text}; expected relative at most {limit}",
    )
