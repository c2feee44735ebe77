"""Checkpoints of a run in progress: a half-written one is never taken for a whole one."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from maskprune.files import JsonObject, require_space, sync, write_json
from maskprune.training.distributed import on_first, rank

logger = logging.getLogger(__name__)

MARKER = "complete.json"


def save_solver(folder: Path, masks: dict[str, torch.Tensor], solver: JsonObject) -> None:
    """Write masks and solver state into a checkpoint folder, no pickle."""
    from safetensors.torch import save_file

    tensors = {f"masks.{name}": value.detach().cpu().contiguous() for name, value in masks.items()}
    tensors["solver.state"] = solver["state"].cpu()
    header = {name: json.dumps(solver[name]) for name in ("fields", "rates", "settled")}
    save_file(tensors, folder / "maskprune.safetensors", metadata=header)


def load_solver(folder: Path) -> tuple[dict[str, torch.Tensor], JsonObject]:
    """What `save_solver` wrote: masks by name, solver state."""
    from safetensors import safe_open

    with safe_open(folder / "maskprune.safetensors", framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    masks = {n.removeprefix("masks."): t for n, t in tensors.items() if n.startswith("masks.")}
    solver = {
        "state": tensors["solver.state"],
        "fields": json.loads(meta["fields"]),
        "rates": json.loads(meta["rates"]),
        "settled": json.loads(meta.get("settled", "null")),
    }
    return masks, solver


def require_checkpoint_space(run: Path, trained: Iterable[torch.Tensor]) -> None:
    """Refuse a run whose checkpoints will not fit: two are kept while a third is written.

    Raises:
        ValueError: they do not fit; says how much space they need.
    """
    # AdamW keeps two averages of the size of what it trains.
    one = 3 * sum(p.numel() * p.element_size() for p in trained)
    require_space(run, 3 * one, "the checkpoints of this run")


def mark_complete(folder: Path) -> None:
    """Flush every file of a checkpoint to disk, then write the marker with their sizes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        sync(file)
    write_json(folder / MARKER, {str(p.relative_to(folder)): p.stat().st_size for p in files})


def is_complete(folder: Path) -> bool:
    """Whether every file that the marker names is there and has its size."""
    try:
        sizes = json.loads((folder / MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the duration of the context, the same for all ranks."""
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="maskprune-") if rank() == 0 else None
        if folder is not None:
            stack.enter_context(folder)
        yield on_first(lambda: Path(folder.name if folder is not None else ""))


def open_run(run: Path, resume: bool) -> Path | None:
    """Make a run's folder; returns the checkpoint to resume from, None for a new start."""
    run.mkdir(parents=True, exist_ok=True)
    return latest(run) if resume else None


def remove_old(run: Path, keep: int | None) -> None:
    """Remove all but the last `keep` checkpoints of a run, counting the one being written."""
    names = [folder.name.removeprefix("checkpoint-") for folder in run.glob("checkpoint-*")]
    for step in sorted(int(name) for name in names if name.isdigit())[: -keep if keep else 0]:
        shutil.rmtree(run / f"checkpoint-{step}")


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    whole = [
        (int(number), folder)
        for folder in run.glob("checkpoint-*")
        if (number := folder.name.removeprefix("checkpoint-")).isdigit() and is_complete(folder)
    ]
    return max(whole)[1] if whole else None


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; removes half-written ones."""
    for folder in run.glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdigit() and not is_complete(folder):
            logger.warning("removing %s, which a killed run left half-written", folder)
            shutil.rmtree(folder)
    return newest(run)
