"""`maskprune check`: is this folder a stock checkpoint, who loads it, does it equal its origin."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maskprune.files import OWN_FOLDER, JsonObject, adapter_beside, own_file
from maskprune.hf.checkpoint_files import stock_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Findings:
    """Checks that passed, checks that failed, and notes."""

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
        masks_file: masks of the run, structured or 2:4, or a folder with them; None takes those in
            `folder`, if any. An adapter in `folder` is always put on the original; one in the
            folder of masks where the checkpoint differs without it.
        targets: engines to lint the shape for, see `plan.lint`.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    from transformers import AutoConfig

    from maskprune.hf.families import FAMILIES
    from maskprune.hf.load import check_checkpoint, load_model
    from maskprune.hf.shape import shape_of
    from maskprune.structured.plan import engine_notes, lint, tp_sizes

    folder, findings = Path(folder), Findings()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a checkpoint folder")
    check_checkpoint(folder)
    raw = json.loads((folder / "config.json").read_text())
    findings.say("auto_map" not in raw, "needs no remote code", "config.json asks for remote code")
    findings.say(
        bool(raw.get("architectures")),
        f"class {(raw.get('architectures') or ['?'])[0]}",
        "config.json names no architectures; vLLM and llama.cpp need it",
    )
    stray = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    stray += [n for n in ("adapter_config.json",) if (folder / n).exists()]
    findings.say(not stray, "no file that misleads stock tools", f"stray files: {stray}")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type in FAMILIES:
        shape = shape_of(config)
        findings.say(
            shape.heads % shape.kv_heads == 0,
            f"uniform: {shape}",
            f"{shape.heads} heads do not divide into {shape.kv_heads} KV heads",
        )
        _check_fields(raw, stock_config(config), folder, findings)
        sizes = ", ".join(map(str, tp_sizes(shape)))
        findings.notes.append(f"tensor-parallel sizes: {sizes}")
        asked = targets or "vllm,gguf,awq128"
        findings.notes += [f"misaligned for {n}" for n in lint(shape, asked)]
        findings.notes += engine_notes(config, asked)
    else:
        findings.notes.append(f"family {config.model_type} is not in maskprune's table")
    model, tokenizer = load_model(folder)
    if config.model_type in FAMILIES and _is_two_four(model):
        findings.notes.append("2:4 in every linear of its blocks")
    if config.model_type in FAMILIES:
        _check_tensors(folder, model, findings)
    findings.good.append("loads with from_pretrained, every tensor present, tokenizer too")
    _check_generation(model, tokenizer, findings)
    if against is not None:
        if proof := _trained_after_cut(folder):
            findings.notes.append(f"logits not compared with {against}: {proof}")
            _check_frozen(model, against, findings)
        elif (masks_file := masks_file or _own_masks(folder)) and _updated(masks_file):
            findings.notes.append(
                f"logits not compared with {against}: SparseGPT adjusted the weights that stay, "
                "which the masks do not hold"
            )
            _check_zeros(model, masks_file, findings)
        else:
            _check_equal(model, tokenizer, against, masks_file, folder, findings)
    elif masks_file is not None:
        raise ValueError("--masks needs --against MODEL, the model that the masks belong to")
    return findings


def _check_fields(raw: JsonObject, expected: JsonObject, folder: Path, findings: Findings) -> None:
    """Whether transformers 4 reads config.json as 5 does, and vLLM where the head size is given.

    A missing field fails only in a checkpoint of maskprune: transformers 5 does not write them all.
    """
    wanted = [k for k in ("head_dim", "rope_theta", "torch_dtype") if k in expected]
    missing = [k for k in wanted if k not in raw]
    wrong = [k for k in wanted if k in raw and raw[k] != expected[k]]
    text = (
        f"config.json has no {', '.join(missing)}, as transformers 5 writes it: transformers "
        "before 5.0, and engines that read the field, take a default in place of "
        f"{', '.join(str(expected[k]) for k in missing)}"
    )
    if missing and not (folder / OWN_FOLDER).is_dir():
        findings.notes.append(text)
    elif missing:
        findings.bad.append(text)
    if wrong:
        said = ", ".join(f"{k} {raw[k]} where transformers 5 reads {expected[k]}" for k in wrong)
        findings.bad.append(f"config.json contradicts itself: {said}")
    elif not missing:
        findings.good.append("config reads the same in transformers 4 and 5")


def _is_two_four(model: PreTrainedModel) -> bool:
    from maskprune.two_four.patterns import is_two_four, oriented, prunable

    try:
        linears = prunable(model)
    except ValueError:
        return False
    return all(is_two_four(oriented(module)) for module in linears.values())


def _trained_after_cut(folder: Path) -> str | None:
    """What a result whose weights were trained after the cut says of the cut; None for others."""
    from maskprune.commands.report import read_info

    record = read_info(folder)
    if (record.get("settings") or {}).get("train") != "weights":
        return None
    largest = record["logits_masked_against_exported"]["largest"]
    return (
        "its weights were trained after the cut, so no masked model has its logits; when it was "
        f"cut they differed from the masked model's by {largest:.2e} at most"
    )


def _check_frozen(model: PreTrainedModel, against: str, findings: Findings) -> None:
    """Whether what no run trains, the token embeddings and the output head, is the original's."""
    from maskprune.hf.load import load_model

    def frozen(model: PreTrainedModel) -> list[Any]:
        modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        return [t for m in modules for t in (m.weight, getattr(m, "bias", None))]

    def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    origin, _ = load_model(against, dtype=str(model.dtype).removeprefix("torch."))
    findings.say(
        all(map(same, frozen(model), frozen(origin))),
        f"token embeddings and output head are those of {against}, bit for bit",
        f"token embeddings or output head are not those of {against}; give the model that the run "
        "began with",
    )


def _own_masks(folder: Path) -> Path | None:
    from maskprune.structured.masks import MASKS_FILE
    from maskprune.two_four.patterns import MASKS_FILE as TWO_FOUR_FILE

    places = (own_file(folder, name) for name in (MASKS_FILE, TWO_FOUR_FILE))
    return next((path for path in places if path.is_file()), None)


def _updated(masks_file: str | Path) -> bool:
    """Whether these are 2:4 masks of a run that adjusted the weights that stay."""
    from maskprune.two_four.patterns import is_masks_file, load_masks

    return is_masks_file(masks_file) and "weights" in load_masks(masks_file)[1]


def _check_zeros(model: PreTrainedModel, masks_file: str | Path, findings: Findings) -> None:
    """Whether the weights that 2:4 masks leave out are 0."""
    from maskprune.two_four.patterns import load_masks, oriented, prunable

    masks, linears = load_masks(masks_file)[0], prunable(model)
    fits = {name: tuple(m.shape) for name, m in masks.items()} == {
        name: tuple(oriented(module).shape) for name, module in linears.items()
    }
    findings.say(
        fits and not any(oriented(linears[n])[~m].any() for n, m in masks.items()),
        f"every weight that the masks of {masks_file} leave out is 0",
        f"weights that the masks of {masks_file} leave out are not 0",
    )


def _check_tensors(folder: Path, model: PreTrainedModel, findings: Findings) -> None:
    """Whether each tensor of each safetensors file at the top of `folder` is the model's."""
    from maskprune.hf.families import family_of
    from maskprune.streaming.safetensors_file import INDEX_NAME, read_header

    family = family_of(model.config)
    own = set(model.state_dict())
    own |= {name.removeprefix(f"{model.base_model_prefix}.") for name in own}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    foreign = {}
    for file in sorted(folder.glob("*.safetensors")):
        strange = (n for n in read_header(file) if own.isdisjoint({n, *family.stock_names(n)}))
        name = next((n for n in strange if not any(re.search(p, n) for p in ignored)), None)
        if name is not None:
            foreign[file.name] = name
    text = ", ".join(f"{file} ({name})" for file, name in foreign.items())
    if foreign and (folder / INDEX_NAME).is_file():
        findings.notes.append(
            f"files whose tensors are not the model's, left out by the index: {text}"
        )
    else:
        findings.say(
            not foreign,
            "no safetensors file but the model's",
            f"tensors that are not the model's: {text}; vLLM takes every safetensors file of a "
            "folder for weights: move them into a folder of their own",
        )


@torch.no_grad()
def _check_generation(model: Any, tokenizer: PreTrainedTokenizerBase, findings: Findings) -> None:
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids.to(model.device)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    same = torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )
    findings.say(
        same,
        "generates the same with and without cache",
        "generation differs with and without cache",
    )


def _check_equal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    against: str,
    masks_file: str | Path | None,
    folder: Path,
    findings: Findings,
) -> None:
    from maskprune.hf.equality import TOLERANCE, compare_logits
    from maskprune.hf.families import text_config
    from maskprune.hf.load import load_model
    from maskprune.hf.quiet import quiet_transformers
    from maskprune.structured.masks import attach_masks, load_masks
    from maskprune.two_four.patterns import apply_masks, is_masks_file
    from maskprune.two_four.patterns import load_masks as load_two_four

    def masked(adapter: Path | None) -> nn.Module:
        origin: nn.Module
        origin, _ = load_model(against, dtype=str(model.dtype).removeprefix("torch."))
        if adapter is not None:
            from peft import PeftModel

            try:
                with quiet_transformers():
                    origin = PeftModel.from_pretrained(origin, adapter)
            except RuntimeError:
                raise ValueError(
                    f"the adapter in {adapter} does not fit --against {against}; give the model "
                    "that the run began with"
                ) from None
        if masks_file is not None and is_masks_file(masks_file):
            apply_masks(origin, load_two_four(masks_file)[0])
        elif masks_file is not None:
            attach_masks(origin, masks=load_masks(masks_file), fused=False)
        return origin

    length = min(128, getattr(text_config(model.config), "max_position_embeddings", None) or 128)
    ids = torch.randint(
        0, len(tokenizer), (2, length), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    limit = TOLERANCE[model.dtype]
    own = adapter_beside(folder)
    difference = compare_logits(masked(own), model, ids)
    of_run = None
    if own is None and masks_file is not None and (adapter := adapter_beside(Path(masks_file))):
        # What `export --masks RUN` wrote, with `--adapter RUN` or without.
        if difference.relative > limit:
            of_run, difference = adapter, compare_logits(masked(adapter), model, ids)
        else:
            findings.notes.append(
                f"what the run trained, in {adapter}, is not in it; export --adapter merges it"
            )
    text = (
        f"largest logit difference {difference.largest:.2e}, relative {difference.relative:.2e}, "
        f"top-1 agreement {difference.top1_agreement:.4f}"
    )
    if masks_file is None:
        origin_name, hint = f"{against}, without masks", " (give those of the run with --masks)"
    else:
        trained = f" and adapter of {of_run}" if of_run else ""
        origin_name, hint = f"the masked model, masks of {masks_file}{trained}", ""
    findings.say(
        difference.relative <= limit,
        f"equals {origin_name}: {text}",
        f"differs from {origin_name}{hint}: {text}; expected relative at most {limit}",
    )
