"""What a model can still do: perplexity by windows, and lm-eval tasks."""

from __future__ import annotations

import difflib
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from maskprune.config import EvalConfig
from maskprune.files import JsonObject, write_json
from maskprune.hf.shape import require_positions
from maskprune.training.data import text_prefix
from maskprune.training.documents import Source, read_text
from maskprune.training.trainer import require_known_tokens
from maskprune.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROWS_PER_LOSS = 512
PROTOCOL = "documents joined by blank lines, one text, windows that do not overlap"


def evaluate(config: EvalConfig) -> JsonObject:
    """Load the model, measure what `config` names, write the JSON file if it names one.

    Returns:
        dict with `model`, `versions`, and `perplexity` and `tasks` as asked.

    Raises:
        ValueError: a model, text or task that cannot be read; says what to do.
        RuntimeError: lm-eval is asked for and not installed, or the model gives NaN.
    """
    from maskprune.hf.load import load_model

    if config.json:
        _require_writable(Path(config.json).absolute())
    # Both fail fast, before minutes go into loading a model.
    text = read_text(config.ppl) if config.ppl else None
    tasks = [task for task in (config.tasks or "").split(",") if task.strip()]
    if tasks:
        _lm_eval()
    model, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    result: JsonObject = {"model": config.model, "versions": _versions()}
    if text is not None:
        result["perplexity"] = {"data": config.ppl} | perplexity(
            model,
            tokenizer,
            [text],
            config.seq_len,
            limit=config.limit,
            batch_size=config.batch_size,
        )
    if tasks:
        result["tasks"] = run_tasks(
            model,
            tokenizer,
            tasks,
            limit=config.limit,
            batch_size=config.batch_size,
            num_fewshot=config.num_fewshot,
        )
    if config.json:
        write_json(Path(config.json), result)
    return result


def _require_writable(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"--json {file}: its folder does not exist; create it first")
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--json {file} cannot be written; choose another file")


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    seq_len: int = 2048,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
) -> JsonObject:
    """exp(mean of -log p(token | those before it in its window)), over all windows.

    The papers' protocol: all documents as one text, tokenised once, cut into windows of seq_len
    that do not overlap; the tail that fills no window is dropped. Where the tokenizer adds BOS,
    every window begins with it, not the first alone, and all else is predicted, as lm-eval's
    rolling log-likelihood does for a text of one window (with add_bos_token=False: its default
    gives such a tokenizer's BOS twice). Else a window predicts all but its first token.

    Args:
        model: a causal LM; runs on its device, and its mode is restored.
        source: what `data.read_text` takes; a text itself is given as [text].
        limit: use only the first `limit` windows.
        dtype: run under autocast in this type; None: as the model is.

    Returns:
        dict: ppl, nll (nats per token), windows, tokens (predicted), seq_len, seconds, protocol.

    Raises:
        ValueError: text shorter than one window, or a window longer than the model's positions.
        RuntimeError: the loss is not finite.

    Source: the evaluation of LLM-Pruner (arXiv 2305.11627), which MaskPrune's tables follow.
    """
    require_positions(model.config, seq_len)
    prefix = text_prefix(tokenizer)
    ids = tokenizer(
        read_text(source), add_special_tokens=False, verbose=False, return_tensors="pt"
    )["input_ids"][0]
    require_known_tokens(model, ids)
    width = seq_len - len(prefix)
    windows = len(ids) // width if width > 0 else 0
    if windows == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, but one window needs {width}; give more text or a "
            "smaller seq_len"
        )
    windows = min(windows, limit or windows)
    start_of_each = torch.tensor(prefix, dtype=ids.dtype).expand(windows, -1)
    blocks = torch.cat([start_of_each, ids[: windows * width].view(windows, width)], dim=1)
    context = max(1, len(prefix))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, start = 0.0, time.perf_counter()
    try:
        for first in range(0, windows, batch_size):
            batch = blocks[first : first + batch_size].to(device)
            with _autocast(device, dtype):
                logits = model(input_ids=batch, use_cache=False).logits
            loss = _nll(logits[:, context - 1 : -1].flatten(0, 1), batch[:, context:].flatten())
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss is {loss} in window {first}; the model's weights are damaged or "
                    "overflow in this dtype: try --dtype float32"
                )
            total += loss
    finally:
        model.train(was_training)
    tokens = windows * (seq_len - context)
    nll = total / tokens
    return {
        "ppl": math.exp(min(nll, 700.0)),
        "nll": nll,
        "windows": windows,
        "tokens": tokens,
        "seq_len": seq_len,
        "seconds": time.perf_counter() - start,
        "protocol": PROTOCOL + (", each begun with BOS" if prefix else ""),
    }


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    # In pieces: float32 copies of all logits would be several times as large as the model's own.
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    pieces = zip(logits.split(ROWS_PER_LOSS), targets.split(ROWS_PER_LOSS), strict=True)
    for rows, labels in pieces:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        total += F.cross_entropy(wide, labels, reduction="sum").double()
    return float(total)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
) -> dict[str, JsonObject]:
    """lm-eval's metrics of each task, by the task's name.

    Args:
        tasks: names of lm-eval tasks, YAML files, or folders of YAML files. Local ones need no
            network, and where all are local the index of lm-eval's own tasks is not built.
        limit: at most this many documents per task.

    Returns:
        {task: {metric: value, ..., "samples": n}}, metrics as `acc`, `acc_norm`, `acc_stderr`.

    Raises:
        RuntimeError: lm-eval is not installed, or a task's data cannot be fetched.
        ValueError: an unknown task; names similar ones.
    """
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names, folders = _local_tasks(tasks)
    by_name = [name for name in names if name not in folders]
    manager = TaskManager(
        include_path=sorted({str(folder) for folder in folders.values()}) or None,
        include_defaults=bool(by_name),
    )
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"lm-eval has no task {name!r}{hint}; `lm-eval ls tasks` lists them")
    device = str(next(model.parameters()).device)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    try:
        output = lm_eval.simple_evaluate(
            model=lm,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager,
        )
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"the data of {', '.join(names)} could not be read ({reason}); offline, give a YAML "
            "file whose data_files are local"
        ) from None
    samples = output.get("n-samples", {})
    return {
        task: {
            key.removesuffix(",none").replace(",none", ""): value
            for key, value in metrics.items()
            if isinstance(value, int | float) and key != "sample_len"
        }
        | {"samples": samples.get(task, {}).get("effective")}
        for task, metrics in output["results"].items()
    }


def _local_tasks(tasks: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """Task names, with YAML files and folders replaced by the tasks in them; name -> folder."""
    names: list[str] = []
    folders: dict[str, Path] = {}
    for task in tasks:
        path = Path(task.strip())
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not path.is_dir() and path.suffix not in (".yaml", ".yml"):
            names.append(task.strip())
            continue
        named = [(name, file) for file in files if (name := _task_name(file))]
        if not named:
            raise ValueError(f"{path} holds no lm-eval task (no line `task: name` in any YAML)")
        for name, file in named:
            names.append(name)
            folders[name] = file.absolute().parent
    return names, folders


def _task_name(file: Path) -> str | None:
    # Not a YAML parser: lm-eval's files hold !function tags that only its own loader knows.
    if not file.is_file():
        raise ValueError(f"task file {file} does not exist; give a path or an lm-eval task name")
    match = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", file.read_text(encoding="utf-8"), re.M)
    return match.group(1) if match else None


def _lm_eval() -> ModuleType:
    try:
        import lm_eval
    except ImportError:
        raise RuntimeError(
            "tasks are run by lm-eval, which is not installed; pip install 'maskprune[eval]'"
        ) from None
    return lm_eval


def _versions() -> dict[str, str]:
    import transformers

    return {
        "maskprune": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
