"""What every run on disk shares: its output, its folder in progress, its inputs, model and text."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from maskprune.config import ADAPTER_RATE, PruneConfig, RunFiles, SparsifyConfig
from maskprune.files import JsonObject, locked, output_folder, require_new_folder, write_json
from maskprune.hf.demo_model import MODEL_NAME, TEXT_NAME, demo_text
from maskprune.hf.load import load_model, require_finite_weights, resolve_model
from maskprune.streaming.safetensors_file import parse_size
from maskprune.training.checkpoints import newest
from maskprune.training.distributed import on_first, rank
from maskprune.training.documents import Source
from maskprune.training.interrupt import Interrupted, stop_on_signals

C4 = "allenai/c4:en:train"
INPUTS_FILE = "settings.json"
# Settings that may differ in a resumed run: the result does not depend on them.
MAY_CHANGE = ("save_steps", "logging_steps", "device", "shard", "targets")


@contextlib.contextmanager
def claim_output(files: RunFiles, *also_read: str | None) -> Iterator[Path]:
    """The output folder of a run, held against other processes; signals and a full disk explained.

    Args:
        also_read: inputs beside MODEL and DATA, which OUT must not hold either.

    Raises:
        ValueError: it exists, cannot be written, holds an input, or another run writes it.
        Interrupted: SIGTERM or SIGINT came.
        RuntimeError: the disk is full.
    """

    def checked() -> Path:
        parse_size(files.max_shard_size)
        out = output_folder(str(files.output))
        require_new_folder(out, files.overwrite, (files.model, files.data, *also_read))
        return out

    out = on_first(checked)
    with stop_on_signals(), locked(out):
        try:
            yield out
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _disk_is_full(error):
                raise
            kept = f"; {run_folder(out)} keeps a checkpoint, continue with --resume"
            raise RuntimeError(
                f"no space is left on the disk of {out}; free some and run it again"
                + (kept if newest(run_folder(out)) else "")
            ) from error


def _disk_is_full(error: Exception) -> bool:
    # torch.save says only that fewer bytes were written than it gave.
    return (
        getattr(error, "errno", None) == errno.ENOSPC
        or "No space left on device" in str(error)
        or "inline_container" in str(error)
    )


def run_folder(out: Path) -> Path:
    """Where a run in progress keeps its checkpoints and trace; removed once OUT is written."""
    return out.parent / f"{out.name}.run"


def claim_run_folder(out: Path, inputs: JsonObject, *, resume: bool, anew: bool = False) -> Path:
    """The run folder of OUT: it does not exist yet, or holds the run that `resume` continues.

    Args:
        inputs: from `run_inputs`; a resumed run must have the same.
        anew: remove a run in progress.

    Raises:
        ValueError: a run is in progress, there is none to resume, or it has other settings or
            inputs; or the folder holds other files.
    """
    run = run_folder(out)
    if not run.exists():
        if resume:
            raise ValueError(f"there is no run in progress at {run}; start one without --resume")
        return run
    if any(run.iterdir()) and not (run / INPUTS_FILE).is_file():
        raise ValueError(
            f"{run}, where the run would keep its checkpoints, holds other files; choose another "
            "output folder, or move that one away"
        )
    checkpoint = newest(run)
    if resume and checkpoint is None:
        raise ValueError(f"{run} has no whole checkpoint to continue from; start without --resume")
    if resume:
        _require_same(run, inputs)
    elif checkpoint is not None and not anew:
        raise ValueError(f"{run} holds a run in progress; continue it with --resume, or remove it")
    else:
        shutil.rmtree(run)
    return run


# What settings were in runs that began before they existed.
BEFORE: JsonObject = {"lm_weight": 0.0, "train": "adapters", "refine_passes": 0, "self_text": 0.0}
# Settings that were numbers by default, and are None by default now.
MEANT = {"learning_rate": ADAPTER_RATE}


def _require_same(run: Path, now: JsonObject) -> None:
    try:
        saved = json.loads((run / INPUTS_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(
            f"{run} cannot be continued: its {INPUTS_FILE}, which names the run, is broken; "
            "choose another output folder, or move that one away"
        ) from None
    saved = BEFORE | saved
    compared = [k for k in now if k not in MAY_CHANGE and k in saved]
    same = {k for k in compared if now[k] is None and saved[k] == MEANT.get(k, now[k])}
    compared = [k for k in compared if k not in same]
    changed = [f"{k} {saved[k]!r} -> {now[k]!r}" for k in compared if saved[k] != now[k]]
    if changed:
        raise ValueError(
            f"--resume with other settings than the first run's: {', '.join(changed)}; repeat the "
            "first command with --resume"
        )


def run_inputs(files: RunFiles, settings: PruneConfig | SparsifyConfig) -> JsonObject:
    """MODEL, DATA and every setting, as a resumed run must have them again."""
    return {"model": _same_place(files.model), "data": _same_place(files.data)} | asdict(settings)


def _same_place(name: str | None) -> str | None:
    path = Path(name or "").expanduser()
    return str(path.resolve()) if name and path.exists() else name


@contextlib.contextmanager
def open_run_folder(run: Path, inputs: JsonObject, blocks: torch.Tensor | None) -> Iterator[None]:
    """Make the run folder and write the inputs into it; remove it when the context ends.

    After an error or signal it stays if it has a whole checkpoint to continue from. Only rank 0
    does any of this.

    Args:
        blocks: (n, T) int64 token blocks; a resumed run must read the same ones.
    """
    if rank() > 0:
        yield
        return
    if blocks is not None:
        text = hashlib.sha256(blocks.contiguous().numpy().data).hexdigest()
        inputs = inputs | {"sha256 of the tokens read": text}
    if run.exists():
        _require_same(run, inputs)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / INPUTS_FILE, inputs)
    try:
        yield
    except BaseException as error:
        checkpoint = newest(run)
        if checkpoint is None:
            shutil.rmtree(run)
        if isinstance(error, KeyboardInterrupt):
            said = "nothing was kept, no checkpoint was saved yet"
            if checkpoint is not None:
                said = f"{checkpoint} is saved, continue from it with --resume"
            first = str(error) or "interrupted"
            raise Interrupted(getattr(error, "signum", 2), f"{first}; {said}") from None
        raise
    shutil.rmtree(run)


def read_config(name: str) -> PreTrainedConfig:
    """The transformers config of MODEL, without its weights.

    Raises:
        ValueError: there is none, it cannot be read, or it is of quantised weights.
    """
    from transformers import AutoConfig

    from maskprune.hf.load import gguf_file

    where = resolve_model(name) if not _only_config(name) else name
    options: JsonObject = {}
    if Path(where).is_dir() and (gguf := gguf_file(Path(where))):
        options["gguf_file"] = gguf
    try:
        config = AutoConfig.from_pretrained(where, **options)
    # transformers checks a config's types with an error class of its own.
    except Exception as error:
        line = " ".join(str(error).split("\n")[:2])
        raise ValueError(
            f"no config could be read from {where} ({line}); expected a checkpoint folder or a "
            "hub id"
        ) from None
    if quantised := getattr(config, "quantization_config", None):
        kind = quantised if isinstance(quantised, dict) else vars(quantised)
        raise ValueError(
            f"model {name} is quantised ({kind.get('quant_method', 'quantization_config')}); "
            "expected float32, bfloat16 or float16 weights: take the model it was made from"
        )
    return config


def _only_config(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").is_file() and not any(folder.glob("*.gguf"))


def training_text(name: str, data: str | None) -> tuple[Source, str]:
    """DATA and its name; by default the demo's own text for the demo model, C4 for others."""
    if data is not None:
        return data, data
    return (demo_text()[0], TEXT_NAME) if name == MODEL_NAME else (C4, C4)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_to_train(
    name: str, dtype: str, device: str, in_host: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer); `auto` is float32 on the CPU, as stored on a GPU.

    Args:
        in_host: leave it in the host's memory, from which each process takes its part, or one
            block at a time.

    Raises:
        ValueError: see `load_model`; or weights that are NaN or infinite.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    model, tokenizer = load_model(name, dtype=dtype, device="cpu" if in_host else device)
    require_finite_weights(model, name)
    return model, tokenizer
