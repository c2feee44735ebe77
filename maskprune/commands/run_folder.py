"""What every run on disk shares: its folder, its inputs, its model and text."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from maskprune.files import require_new_folder, write_json
from maskprune.hf.demo_model import MODEL_NAME, TEXT_NAME, demo_text
from maskprune.hf.load import load_model, resolve_model
from maskprune.training.data import Source
from maskprune.training.distributed import rank

C4 = "allenai/c4:en:train"
INPUTS_FILE = "settings.json"


def run_folder(out: Path) -> Path:
    """Where a run in progress keeps its checkpoints and trace; gone once OUT stands."""
    return out.parent / f"{out.name}.run"


def claim_run_folder(out: Path, inputs: dict[str, Any], *, resume: bool, overwrite: bool) -> Path:
    """The run folder of OUT: not there, or with the run that `resume` continues.

    Args:
        inputs: what a resumed run must have in common with its first part.

    Raises:
        ValueError: OUT stands, a run is in progress, there is none to resume, or its settings
            or inputs were others; or the folder is not a run's.
    """
    require_new_folder(out, overwrite)
    run = run_folder(out)
    if run.exists() and not resume:
        if any(run.glob("checkpoint-*")):
            raise ValueError(
                f"{run} holds a run in progress; continue it with --resume, or remove it"
            )
        if any(run.iterdir()) and not (run / INPUTS_FILE).is_file():
            raise ValueError(
                f"{run}, where the run would keep its checkpoints, holds other files; choose "
                "another output folder, or move them"
            )
        shutil.rmtree(run)
    if resume:
        if not run.exists():
            raise ValueError(f"there is no run in progress at {run}; start one without --resume")
        _require_same_inputs(run, inputs)
    return run


def _require_same_inputs(run: Path, now: dict[str, Any]) -> None:
    try:
        saved = json.loads((run / INPUTS_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(
            f"{run} does not say what run it is of ({INPUTS_FILE} is missing or broken), so it "
            "cannot go on; choose another output folder, or move that one away"
        ) from None
    changed = [f"{k} {saved.get(k)!r} -> {now[k]!r}" for k in now if saved.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"--resume with other settings than the first run's: {', '.join(changed)}; repeat the "
            "first command with --resume"
        )


def run_inputs(name: str, data: str | None, settings: Any) -> dict[str, Any]:
    """MODEL, DATA and every setting, as a resumed run must have them again."""
    return {"model": str(name), "data": data} | asdict(settings)


@contextlib.contextmanager
def open_run_folder(run: Path, inputs: dict[str, Any]) -> Iterator[None]:
    """Make the run folder and note the inputs in it; bad input leaves none without checkpoints.

    Of several processes, rank 0 does.
    """
    if rank() > 0:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / INPUTS_FILE, inputs)
    try:
        yield
    except ValueError:
        if not any(run.glob("checkpoint-*")):
            shutil.rmtree(run)
        raise


def read_config(name: str) -> Any:
    """The transformers config of MODEL, without its weights."""
    from transformers import AutoConfig

    from maskprune.hf.load import gguf_file

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


def training_text(name: str, data: str | None) -> tuple[Source, str]:
    """DATA, or what stands in for it, and its name: the demo model's own text, C4 for others."""
    if data is not None:
        return data, data
    return (demo_text()[0], TEXT_NAME) if name == MODEL_NAME else (C4, C4)


def load_to_train(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer); `auto` is float32 on the CPU, as stored on a GPU."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    return load_model(name, dtype=dtype, device=device)
