"""A pruning run on disk: MODEL and settings in, a proven stock checkpoint out."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from maskprune.budget import Budget
from maskprune.card import model_card
from maskprune.config import PruneConfig
from maskprune.data import token_blocks
from maskprune.demo import MODEL_NAME, demo_text
from maskprune.exporter import compare_logits, require_equal, save_stock
from maskprune.files import new_folder, require_new_folder, write_json
from maskprune.load import load_model, resolve_model
from maskprune.plan import cost, lint, plan, render
from maskprune.target import shape_of

PACKAGES = ("maskprune", "torch", "transformers", "peft", "accelerate", "triton", "safetensors")
C4 = "allenai/c4:en:train"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The device that a result was made on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads"


def run_folder(out: Path) -> Path:
    """Where a run in progress keeps its checkpoints and trace; gone once OUT stands."""
    return out.parent / f"{out.name}.run"


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


def read_config(name: str) -> Any:
    """The transformers config of MODEL, without its weights."""
    from transformers import AutoConfig

    from maskprune.load import gguf_file

    where = resolve_model(name) if not _only_config(name) else name
    options: dict[str, Any] = {}
    if Path(where).is_dir() and (gguf := gguf_file(Path(where))):
        options["gguf_file"] = gguf
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"no config could be read from {where} ({line}); expected a checkpoint folder or a "
            "hub id"
        ) from None


def _only_config(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").is_file() and not any(folder.glob("*.gguf"))


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
    """`maskprune prune`; returns what to tell the user.

    Raises:
        ValueError: anything that cannot work, before anything is written.
    """
    config = read_config(name)
    budget = make_budget(config, settings)
    made = plan(config, budget, settings.targets)
    if dry_run:
        return render(made)
    require_new_folder(out, overwrite)
    run = run_folder(out)
    if run.exists() and not resume:
        if any(run.glob("checkpoint-*")):
            raise ValueError(
                f"{run} holds a run in progress; continue it with --resume, or remove it"
            )
        shutil.rmtree(run)
    if resume and not run.exists():
        raise ValueError(f"there is no run in progress at {run}; start one without --resume")
    source = _text(name, data)
    _require_same_settings(run, settings, resume)

    dtype = settings.dtype
    on_gpu = settings.device.startswith("cuda") or (
        settings.device == "auto" and torch.cuda.is_available()
    )
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    model, tokenizer = load_model(name, dtype=dtype, device=settings.device)
    blocks = token_blocks(
        source, tokenizer, settings.seq_len, num_tokens=settings.max_tokens, seed=settings.seed
    )
    # Imported late: it pulls in the whole training stack, which bad input should not wait for.
    from maskprune.training import prune

    dense_generation = model.generation_config
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "settings.json", asdict(settings))
    result = prune(model, tokenizer, blocks, settings, run_dir=run, resume=resume)
    result.model.generation_config = dense_generation
    result.masks.source = str(name)

    ids = blocks[: min(4, len(blocks))].to(next(result.model.parameters()).device)
    difference = compare_logits(result.masked_model, result.model, ids)
    require_equal(difference, result.model.dtype)
    where = Path(resolve_model(name))
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
            "base_model": name if "/" in name and not where.is_dir() else str(name),
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
        save_stock(
            result.model,
            folder,
            source=where if where.is_dir() else _hub_folder(name),
            tokenizer=tokenizer,
            model_card=card,
            max_shard_size=max_shard_size,
        )
        reloaded = _reload(folder, result.model)
        again = compare_logits(result.model, reloaded, ids)
        if again.largest != 0:
            raise RuntimeError(
                f"the reloaded checkpoint's logits differ from the exported model's by "
                f"{again.largest:.2e}; nothing was written; please report this"
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
        f"exported against reloaded {again.largest:.0e}",
        f"stock {record['model_class']} in {out}; load it with "
        f'AutoModelForCausalLM.from_pretrained("{out}")',
    ]
    lines += [f"misaligned for {n}" for n in lint(result.shape, settings.targets, shape_of(config))]
    return "\n".join(lines)


def _text(name: str, data: str | None) -> Any:
    if data is not None:
        return data
    return demo_text()[0] if name == MODEL_NAME else C4


def _require_same_settings(run: Path, settings: PruneConfig, resume: bool) -> None:
    if not resume:
        return
    saved = json.loads((run / "settings.json").read_text())
    now = asdict(settings)
    changed = [f"{k} {saved.get(k)!r} -> {now[k]!r}" for k in now if saved.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"--resume with other settings than the first run's: {', '.join(changed)}; repeat the "
            "first command with --resume"
        )


def _sizes(c: Any) -> dict[str, Any]:
    return vars(c.shape) | {
        "parameters": c.parameters,
        "bytes": c.bytes,
        "kv_bytes_per_token": c.kv_bytes_per_token,
        "flops_per_token": c.flops_per_token,
    }


def _hub_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _reload(folder: Path, like: Any) -> Any:
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
    return again.to(like.device).eval()
