"""`maskprune sparsify` on disk: MODEL and settings in, a proven 2:4 stock checkpoint out."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from maskprune.choices import TWO_FOUR_ONE_SHOT
from maskprune.commands.record import RunRecord, proof_tokens, save_proven
from maskprune.commands.run_folder import (
    claim_output,
    claim_run_folder,
    load_to_train,
    open_run_folder,
    read_config,
    run_inputs,
    training_text,
    weight_bytes,
)
from maskprune.config import SparsifyConfig, SparsifyFiles
from maskprune.files import OWN_FOLDER, new_folder, require_space
from maskprune.hf.load import load_model, torch_device, torch_dtype
from maskprune.hf.shape import require_positions, shape_of
from maskprune.training.data import token_blocks
from maskprune.training.distributed import on_first, rank, start
from maskprune.training.layer_by_layer import free_bytes
from maskprune.training.memory_plan import USABLE, stored_dtype
from maskprune.training.progress import note
from maskprune.training.sharding import shards
from maskprune.two_four.patterns import (
    MASKS_FILE,
    apply_masks,
    load_masks,
    oriented,
    prunable,
    save_masks,
)


def run_sparsify(files: SparsifyFiles, settings: SparsifyConfig) -> RunRecord | None:
    """`maskprune sparsify`: writes the folder `files.output` and returns its record.

    Returns:
        RunRecord; None on ranks other than 0, which write nothing.

    Raises:
        ValueError: inputs or settings that cannot work, before anything is written.
    """
    if files.masks is not None and rank() > 0:
        return None
    torch_device(settings.device)
    if files.masks is None:
        start(settings.device)
        on_first(lambda: _require_shape(files.model, settings))
    else:
        shape_of(read_config(files.model))
    prior = settings.prior
    with claim_output(files, files.masks, prior) as out:
        if files.masks is not None:
            return _apply(files, out, files.masks, settings)
        if settings.method == "maskllm" and prior not in (*TWO_FOUR_ONE_SHOT, "none"):
            load_masks(prior)
        return _run(files, settings, out)


def _require_shape(name: str, settings: SparsifyConfig) -> None:
    config = read_config(name)
    shape_of(config)
    if settings.method != "magnitude":
        require_positions(config, settings.seq_len)


def _run(files: SparsifyFiles, settings: SparsifyConfig, out: Path) -> RunRecord | None:
    name, inputs = files.model, run_inputs(files, settings)
    run = on_first(lambda: claim_run_folder(out, inputs, resume=files.resume))
    config = read_config(name)
    sharded = settings.method == "maskllm" and shards(settings, config)
    if sharded:
        from maskprune.commands.sharded import prove, require_two_four_streamable, write_two_four

        on_first(lambda: require_two_four_streamable(name))
    device = device_of_blocks(config, settings)
    in_host = sharded or device is not None
    model, tokenizer = load_to_train(name, settings.dtype, settings.device, in_host)
    require_space(out, weight_bytes(model), "the weights to write")
    model_class, parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    data = blocks = None
    if settings.method != "magnitude":
        source, data = training_text(name, files.data)
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

    with open_run_folder(run, inputs, blocks), contextlib.ExitStack() as stack:
        result = sparsify(
            model,
            tokenizer,
            blocks,
            settings,
            run_dir=run,
            resume=files.resume,
            device=device,
        )
        if rank() > 0 and not sharded:
            return None
        ids = proof_tokens(result.model, blocks)
        folder, difference = None, result.difference
        if sharded:
            folder = on_first(lambda: stack.enter_context(new_folder(out, files.overwrite)))
            write_two_four(result.masks, name, folder, files.max_shard_size)
            difference = prove(result.model, folder, ids)
        if rank() > 0:
            return None
        record = RunRecord(
            format="maskprune-two-four",
            model=name,
            method=settings.method,
            data=data,
            settings=settings,
            seed=settings.seed,
            steps=result.steps,
            tokens=result.steps * settings.batch_size * settings.seq_len,
            model_class=model_class,
            difference=difference,
            tokens_compared=ids.numel(),
        )
        _describe(record, result.masks, parameters)
        if folder is not None:
            record.save(folder)
        else:
            folder = stack.enter_context(new_folder(out, files.overwrite))
            size = files.max_shard_size
            save_proven(result.model, folder, ids, record, tokenizer=tokenizer, max_shard_size=size)
        _save_masks(result.masks, folder, record, files)
        if result.trace:
            shutil.copyfile(run / "trace.jsonl", folder / OWN_FOLDER / "trace.jsonl")
    return record


def device_of_blocks(config: PreTrainedConfig, settings: SparsifyConfig) -> torch.device | None:
    """The GPU to which a model that is too large for it goes block by block; None where it fits.

    For a one-shot method; what is trained must be whole on its device. Counted are the weights, and
    beside them what is larger: the copy that the proof reads back, or with SparseGPT eight times
    the largest sum over x x^T, for its factors; a tenth is left for the rest.
    """
    from transformers import AutoModelForCausalLM

    device = torch_device(settings.device)
    free = free_bytes(device)
    if settings.method == "maskllm" or free == sys.maxsize:
        return None
    dtype = torch_dtype(settings.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = (dtype if isinstance(dtype, torch.dtype) else stored_dtype(config)).itemsize
    weights = needed = size * sum(p.numel() for p in model.parameters())
    if settings.method == "sparsegpt":
        widest = max(oriented(m).shape[1] for m in prunable(model).values())
        needed = max(needed, 8 * 4 * widest**2)
    needed += weights
    if needed <= USABLE * free:
        return None
    note(
        f"{needed / 1e9:.1f} GB for the whole model do not fit {device}, where {free / 1e9:.1f} GB "
        "are free: it stays in the host's memory, and "
        + (
            "is pruned there"
            if settings.method == "magnitude"
            else "its blocks go there one by one"
        ),
        rank() > 0,
    )
    return device


def _apply(files: SparsifyFiles, out: Path, masks_from: str, settings: SparsifyConfig) -> RunRecord:
    """Apply the masks of a file to MODEL, without training."""
    masks, metadata = load_masks(masks_from)
    model, tokenizer = load_model(files.model, dtype=settings.dtype, device=settings.device)
    apply_masks(model, masks)
    record = RunRecord(
        format="maskprune-two-four",
        model=files.model,
        method=metadata.get("method"),
        data=None,
        settings=None,
        model_class=type(model).__name__,
        details={"masks": masks_from},
    )
    _describe(record, masks, sum(p.numel() for p in model.parameters()))
    with new_folder(out, files.overwrite) as folder:
        ids, size = proof_tokens(model, None), files.max_shard_size
        save_proven(model, folder, ids, record, tokenizer=tokenizer, max_shard_size=size)
        _save_masks(masks, folder, record, files)
    return record


def _describe(record: RunRecord, masks: dict[str, torch.Tensor], parameters: int) -> None:
    weights = sum(mask.numel() for mask in masks.values())
    record.details |= {"linears": len(masks), "weights_masked": weights // 2}
    record.details["parameters"] = parameters
    record.card_only["pattern"] = "2:4"


def _save_masks(
    masks: dict[str, torch.Tensor], folder: Path, record: RunRecord, files: SparsifyFiles
) -> None:
    about = {"source_model": record.model, "method": record.method or ""}
    if isinstance(record.settings, SparsifyConfig) and record.settings.update_weights:
        about["weights"] = "updated, and not in this file"
    save_masks(folder / OWN_FOLDER / MASKS_FILE, masks, about)
    out, file = files.output, Path(str(files.output)) / OWN_FOLDER / MASKS_FILE
    weights = sum(mask.numel() for mask in masks.values())
    record.summary = (
        f"2:4 in {len(masks)} linears: {weights // 2:,} of their {weights:,} weights are zero\n"
        f"stock {record.model_class} in {out}, equal when read back; its masks in {file}; "
        f'load it with AutoModelForCausalLM.from_pretrained("{out}")'
    )
