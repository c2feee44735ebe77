"""A pruning run on disk: MODEL and settings in, a proven stock checkpoint out."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from maskprune.config import PruneConfig
from maskprune.files import new_folder, write_json
from maskprune.hf.equality import compare_logits, require_equal
from maskprune.hf.model_card import model_card
from maskprune.hf.shape import shape_of
from maskprune.structured.budget import Budget
from maskprune.structured.plan import cost, lint, plan, render
from maskprune.training.data import token_blocks
from maskprune.training.distributed import on_first, rank, start


def make_budget(config: Any, settings: PruneConfig) -> Budget:
    """The budget that the settings ask for."""
    return Budget(
        config,
        settings.sparsity,
        head_unit=settings.head_unit,
        multiple_of=settings.multiple_of,
        head_sparsity=settings.head_sparsity,
        ffn_sparsity=settings.ffn_sparsity,
        arch_fallback=settings.arch_fallback,
    )


def run_prune(
    name: str,
    out: Path,
    settings: PruneConfig,
    *,
    data: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    max_shard_size: str = "5GB",
) -> str:
    """`maskprune prune`; returns what to tell the user, and nothing on ranks other than 0.

    Raises:
        ValueError: anything that cannot work, before anything is written.
    """
    start(settings.device)
    config = on_first(lambda: read_config(name))
    budget = make_budget(config, settings)
    made = plan(config, budget, settings.targets)
    if dry_run:
        return render(made)
    inputs = run_inputs(name, data, settings)
    run = on_first(lambda: claim_run_folder(out, inputs, resume=resume, overwrite=overwrite))
    source = training_text(name, data)
    model, tokenizer = load_to_train(name, settings.dtype, settings.device)
    blocks = on_first(
        lambda: token_blocks(
            source, tokenizer, settings.seq_len, num_tokens=settings.max_tokens, seed=settings.seed
        )
    )
    # Imported late: it pulls in the whole training stack, which bad input should not wait for.
    from maskprune.structured.prune import prune

    dense_generation = model.generation_config
    with open_run_folder(run, inputs):
        result = prune(model, tokenizer, blocks, settings, run_dir=run, resume=resume)
    if rank() > 0:
        return ""
    result.model.generation_config = dense_generation
    result.masks.source = str(name)

    ids = blocks[: min(4, len(blocks))].to(next(result.model.parameters()).device)
    difference = compare_logits(result.masked_model, result.model, ids)
    require_equal(difference, result.model.dtype)
    dense, small = made.dense, cost(result.model.config)
    record: dict[str, Any] = {
        "format": "maskprune-run",
        "model": str(name),
        "data": data or str(source),
        "settings": asdict(settings),
        "seed": settings.seed,
        "steps": result.steps,
        "versions": versions(),
        "machine": machine(),
        "shape": vars(result.shape),
        "dense": _sizes(dense),
        "pruned": _sizes(small),
        "model_class": type(result.model).__name__,
        "residuals": result.residuals,
        "logits_masked_against_exported": vars(difference) | {"relative": difference.relative},
        "trace": [{k: r[k] for k in ("step", "R", "y", "z")} for r in result.trace],
    }
    card = model_card(
        {
            "base_model": name,
            "method": settings.method,
            "sparsity": result.budget.sparsity,
            "head_unit": settings.head_unit,
            "steps": result.steps,
            "tokens": result.steps * settings.batch_size * settings.seq_len,
            "data": Path(str(source)).name,
            "seed": settings.seed,
            "dense": record["dense"],
            "pruned": record["pruned"],
            "model_class": record["model_class"],
            "difference": vars(difference) | {"tokens": ids.numel()},
            "tp": small.tp_sizes,
            "versions": record["versions"],
        }
    )
    with new_folder(out, overwrite) as folder:
        save_proven(
            result.model,
            folder,
            ids,
            name=name,
            tokenizer=tokenizer,
            model_card=card,
            max_shard_size=max_shard_size,
        )
        result.masks.save(folder / "masks.safetensors")
        result.masked_model.save_pretrained(folder / "adapter")
        shutil.copyfile(run / "trace.jsonl", folder / "trace.jsonl")
        write_json(folder / "maskprune.json", record)
    shutil.rmtree(run)
    lines = [
        f"{shape_of(config)} -> {result.shape}",
        f"parameters {dense.parameters:,} -> {small.parameters:,}",
        f"largest logit difference masked against exported {difference.largest:.2e}, "
        "exported against reloaded 0",
        f"stock {record['model_class']} in {out}; load it with "
        f'AutoModelForCausalLM.from_pretrained("{out}")',
    ]
    lines += [f"misaligned for {n}" for n in lint(result.shape, settings.targets, shape_of(config))]
    return "\n".join(lines)


def _sizes(c: Any) -> dict[str, Any]:
    return vars(c.shape) | {
        "parameters": c.parameters,
        "bytes": c.bytes,
        "kv_bytes_per_token": c.kv_bytes_per_token,
        "flops_per_token": c.flops_per_token,
    }
