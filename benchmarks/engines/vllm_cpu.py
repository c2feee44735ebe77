"""What vLLM on a CPU makes of the checkpoints: rows of agreement and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.engines.models import Described
from benchmarks.engines.rows import Row, agreement, race_task, speed_rows
from benchmarks.engines.runner import stream

NAME = "vllm"
SCRIPT = "run_vllm.py"
# For one model; a race is of five.
TIMEOUT = 900.0
RACE = ("dense", "pruned", "uniform 50 %", "zeros 50 %")
# vLLM's code of these imports torchvision, which this environment must do without.
LEFT_OUT = ("gemma3", "qwen3_5_text")


def small(
    python: Path, described: Mapping[str, Described], work: Path, threads: int
) -> Iterator[Row]:
    """A row for every model: loads, and agrees with transformers in float32."""
    tasks = [_task(n, facts) for n, facts in described.items() if facts["family"] not in LEFT_OUT]
    for name, answer in stream(python, SCRIPT, tasks, TIMEOUT, _settings(threads)):
        if "error" in answer:
            answer["error"] = short(answer["error"])
        yield agreement(NAME, name, described[name], answer)


def demo(
    python: Path, described: Mapping[str, Described], work: Path, threads: int
) -> Iterator[Row]:
    """Rows of the demo's models: agreement in float32, and tokens a second in bfloat16."""
    yield from small(python, described, work, threads)
    folders = {name: Path(described[name]["folder"]) / "model" for name in RACE}
    task = race_task("BF16", {name: str(folder) for name, folder in folders.items()}, threads)
    ((kind, answer),) = stream(python, SCRIPT, [task], TIMEOUT, _settings(threads))
    if "error" in answer:
        raise RuntimeError(f"{kind}: {answer['error']}")
    # The files are float32.
    sizes = {n: sum(f.stat().st_size for f in p.glob("*.safetensors")) // 2
             for n, p in folders.items()}  # fmt: skip
    yield from speed_rows(NAME, kind, described, sizes, answer["done"], threads)


def short(error: str) -> str:
    """What vLLM says in one line; of what pydantic wraps, the cause."""
    cause = error.partition("Value error, ")[2] or error
    return " ".join(cause.partition(" [type=")[0].split())


def _task(name: str, facts: Described) -> Row:
    asked: dict[str, Any] = {"folder": str(Path(facts["folder"]) / "model")}
    if reference := facts.get("reference"):
        return {"task": "compare", "name": name, "arguments": asked | {"reference": reference}}
    return {"task": "load", "name": name, "arguments": asked}


def _settings(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine in the script's own process, whose CPU time is measured.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
