"""`maskprune sparsify` on disk: MODEL and settings in, a proven 2:4 stock checkpoint out."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from maskprune.commands.run_folder import (
    claim_run_folder,
    load_to_train,
    machine,
    open_run_folder,
    read_config,
    run_inputs,
    save_proven,
    training_text,
    versions,
)
from maskprune.config import SparsifyConfig
from maskprune.files import new_folder, require_new_folder, write_json
from maskprune.hf.families import family_of
from maskprune.hf.load import load_model
from maskprune.hf.model_card import model_card
from maskprune.training.data import token_blocks
from maskprune.training.distributed import on_first, rank, start
from maskprune.two_four.patterns import apply_masks, load_masks, save_masks

MASKS_FILE = "two_four.safetensors"


def run_sparsify(
    name: str,
    out: Path,
    settings: SparsifyConfig,
    *,
    data: str | None = None,
    masks: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> str:
    """`maskprune sparsify`; returns what to tell the user, and nothing on ranks other than 0.

    Args:
        masks: a masks file to apply as it is, in place of choosing or learning any.

    Raises:
        ValueError: anything that cannot work, before anything is written.
    """
    if masks is not None and rank() > 0:
        return ""
    if masks is not None:
        family_of(read_config(name))
        return _apply(name, out, masks, settings, overwrite, max_shard_size)
    start(settings.device)
    family_of(on_first(lambda: read_config(name)))
    inputs = run_inputs(name, data, settings)
    run = on_first(lambda: claim_run_folder(out, inputs, resume=resume, overwrite=overwrite))
    if settings.method == "maskllm" and settings.prior.endswith(".safetensors"):
        load_masks(settings.prior)
    model, tokenizer = load_to_train(name, settings.dtype, settings.device)
    source = blocks = None
    if settings.method != "magnitude":
        source = training_text(name, data)
        wanted = settings.max_tokens
        if settings.method != "maskllm":
            wanted = settings.calibration_blocks * settings.seq_len
        blocks = on_first(
            lambda: token_blocks(
                source, tokenizer, settings.seq_len, num_tokens=wanted, seed=settings.seed
            )
        )
    # Imported late: it pulls in the whole training stack, which bad input should not wait for.
    from maskprune.two_four.sparsify import sparsify

    with open_run_folder(run, inputs):
        result = sparsify(model, tokenizer, blocks, settings, run_dir=run, resume=resume)
    if rank() > 0:
        return ""
    text = None if source is None else str(source)
    record = _record(name, settings, text) | {"steps": result.steps}
    if result.difference is not None:
        record["logits_masked_against_exported"] = vars(result.difference) | {
            "relative": result.difference.relative
        }
    made = {
        "steps": result.steps or None,
        "tokens": result.steps * settings.batch_size * settings.seq_len or None,
        "data": Path(text).name if text else None,
        "difference": record.get("logits_masked_against_exported"),
    }
    with new_folder(out, overwrite) as folder:
        _write(result.model, result.masks, folder, name, tokenizer, record, made, max_shard_size)
        if result.trace:
            shutil.copyfile(run / "trace.jsonl", folder / "trace.jsonl")
    shutil.rmtree(run)
    return _told(result.masks, out, type(result.model).__name__)


def _apply(
    name: str, out: Path, file: str, settings: SparsifyConfig, overwrite: bool, shard: str
) -> str:
    """Masks from a file onto MODEL: what somebody else learned, on one's own copy."""
    require_new_folder(out, overwrite)
    masks, metadata = load_masks(file)
    model, tokenizer = load_model(name, dtype=settings.dtype, device=settings.device)
    apply_masks(model, masks)
    record = _record(name, settings, None) | {"masks": file, "settings": None}
    record["method"] = metadata.get("method")
    with new_folder(out, overwrite) as folder:
        _write(model, masks, folder, name, tokenizer, record, {}, shard)
    return _told(masks, out, type(model).__name__)


def _record(name: str, settings: SparsifyConfig, data: str | None) -> dict[str, Any]:
    return {
        "format": "maskprune-two-four",
        "model": str(name),
        "method": settings.method,
        "data": data,
        "settings": asdict(settings),
        "seed": settings.seed,
        "versions": versions(),
        "machine": machine(),
    }


def _write(
    model: Any,
    masks: dict[str, torch.Tensor],
    folder: Path,
    name: str,
    tokenizer: Any,
    record: dict[str, Any],
    made: dict[str, Any],
    max_shard_size: str,
) -> None:
    total = sum(mask.numel() for mask in masks.values())
    record["linears"] = len(masks)
    record["weights_masked"] = total // 2
    record["parameters"] = sum(p.numel() for p in model.parameters())
    card = model_card(
        made
        | {
            "base_model": name,
            "pattern": "2:4",
            "method": record["method"],
            "seed": record["seed"],
            "versions": record["versions"],
        }
    )
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 64), generator=generator).to(model.device)
    save_proven(
        model,
        folder,
        ids,
        name=name,
        tokenizer=tokenizer,
        model_card=card,
        max_shard_size=max_shard_size,
    )
    about = {"source_model": str(name), "method": record["method"] or ""}
    if (record["settings"] or {}).get("update_weights"):
        about["weights"] = "updated, and not in this file"
    save_masks(folder / MASKS_FILE, masks, about)
    write_json(folder / "maskprune.json", record)


def _told(masks: dict[str, torch.Tensor], out: Path, kind: str) -> str:
    weights = sum(mask.numel() for mask in masks.values())
    return (
        f"2:4 in {len(masks)} linears: {weights // 2:,} of their {weights:,} weights are zero\n"
        f"stock {kind} in {out}, equal when read back; its masks in {out / MASKS_FILE}; load it "
        f'with AutoModelForCausalLM.from_pretrained("{out}")'
    )
