"""A pruning run on disk: MODEL and settings in, a proven stock checkpoint out."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path

from maskprune.commands.record import RunRecord, proof_tokens, save_proven, sizes
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
from maskprune.config import PruneConfig, PruneFiles
from maskprune.files import OWN_FOLDER, JsonObject, new_folder, require_space
from maskprune.hf.equality import compare_logits, require_equal
from maskprune.hf.load import torch_device
from maskprune.hf.shape import require_positions, require_ranks, shape_of
from maskprune.structured.budget import Budget
from maskprune.structured.masks import MASKS_FILE
from maskprune.structured.plan import Plan, cost, lint, plan
from maskprune.training.data import token_blocks
from maskprune.training.distributed import on_first, rank, start
from maskprune.training.sharding import shards


def plan_prune(name: str, settings: PruneConfig) -> Plan:
    """The shapes that a run may end in, from MODEL's config alone."""
    config = read_config(name)
    return plan(config, Budget.of(config, settings), settings.targets)


def run_prune(files: PruneFiles, settings: PruneConfig, *, anew: bool = False) -> RunRecord | None:
    """`maskprune prune`: writes the folder `files.output` and returns its record.

    Args:
        anew: discard a run in progress there.

    Returns:
        RunRecord; None on ranks other than 0, which write nothing.

    Raises:
        ValueError: inputs or settings that cannot work, before anything is written.
    """
    torch_device(settings.device)
    start(settings.device)

    def checked() -> None:
        config = plan_prune(files.model, settings).budget.config
        require_positions(config, settings.seq_len)
        require_ranks(config, lora_r=settings.lora_r, output_r=settings.output_r)

    on_first(checked)
    with claim_output(files) as out:
        inputs = run_inputs(files, settings)
        run = on_first(lambda: claim_run_folder(out, inputs, resume=files.resume, anew=anew))
        return _run(files, settings, out, run, inputs)


def _run(
    files: PruneFiles, settings: PruneConfig, out: Path, run: Path, inputs: JsonObject
) -> RunRecord | None:
    name, config = files.model, read_config(files.model)
    source, data = training_text(name, files.data)
    sharded = shards(settings, config)
    if sharded:
        from maskprune.commands.sharded import prove, require_streamable, write_pruned

        on_first(lambda: require_streamable(name, config, settings))
    model, tokenizer = load_to_train(name, settings.dtype, settings.device, sharded)
    require_space(out, weight_bytes(model), "the weights to write")
    dense_config, dense_generation = copy.deepcopy(model.config), model.generation_config
    blocks = on_first(
        lambda: token_blocks(
            source, tokenizer, settings.seq_len, num_tokens=settings.max_tokens, seed=settings.seed
        )
    )
    # Imported late: it pulls in the whole training stack, which bad input should not wait for.
    from maskprune.structured.prune import prune

    with open_run_folder(run, inputs, blocks), contextlib.ExitStack() as stack:
        result = prune(model, tokenizer, blocks, settings, run_dir=run, resume=files.resume)
        if rank() > 0 and not sharded:
            return None
        result.masks.source = name
        ids = proof_tokens(result.masked_model, blocks)
        if sharded:
            folder = on_first(lambda: stack.enter_context(new_folder(out, files.overwrite)))
            size, fallback = files.max_shard_size, settings.arch_fallback
            pruned_config = write_pruned(result, name, folder, size, fallback)
            difference = prove(result.masked_model, folder, ids)
        else:
            result.model.generation_config = dense_generation
            pruned_config = result.model.config
            if result.difference is None:
                difference = compare_logits(result.masked_model, result.model, ids)
                require_equal(difference, result.model.dtype)
            else:
                difference = result.difference
        if rank() > 0:
            return None
        small = cost(pruned_config)
        record = RunRecord(
            format="maskprune-run",
            model=name,
            method=settings.chooser,
            data=data,
            settings=settings,
            seed=settings.seed,
            steps=result.steps,
            tokens=result.steps * settings.batch_size * settings.seq_len,
            model_class=(pruned_config.architectures or ["?"])[0],
            difference=difference,
            tokens_compared=ids.numel(),
            dense=sizes(cost(dense_config)),
            pruned=sizes(small),
            details={
                "shape": vars(result.shape),
                "residuals": result.residuals,
                "trace": [
                    {k: r[k] for k in ("step", "loss", "kl", "lm", "R", "y", "z")}
                    for r in result.trace
                ],
            },
            card_only={
                "sparsity": result.budget.sparsity,
                "head_unit": settings.head_unit,
                "trained_after_cut": settings.train == "weights",
                "tp": small.tp_sizes,
            },
        )
        if sharded:
            record.save(folder)
        else:
            folder = stack.enter_context(new_folder(out, files.overwrite))
            save_proven(
                result.model,
                folder,
                ids,
                record,
                tokenizer=tokenizer,
                max_shard_size=files.max_shard_size,
            )
            result.masks.save(folder / OWN_FOLDER / MASKS_FILE)
            if settings.train == "adapters":
                result.masked_model.save_pretrained(folder / OWN_FOLDER / "adapter")
        shutil.copyfile(run / "trace.jsonl", folder / OWN_FOLDER / "trace.jsonl")
    before, proof = shape_of(dense_config), "exported against reloaded 0"
    if sharded:
        proof = "the exported one as read back"
    if settings.train == "weights":
        proof = "before its weights were trained; " + proof
    lines = [
        f"{before} -> {result.shape}",
        f"parameters {record.dense['parameters']:,} -> {small.parameters:,}",
        f"largest logit difference masked against exported {difference.largest:.2e}, {proof}",
        f"stock {record.model_class} in {files.output}; load it with "
        f'AutoModelForCausalLM.from_pretrained("{files.output}")',
    ]
    lines += [f"misaligned for {n}" for n in lint(result.shape, settings.targets, before)]
    record.summary = "\n".join(lines)
    return record
