"""What vLLM on a CPU makes of the checkpoints: rows of agreement and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.engines.models import Described
from benchmarks.engines.rows import Row, race_task, speed_rows
from benchmarks.engines.scripted import Scripted, one_line

RACE = ("dense", "pruned", "uniform 50 %", "zeros 50 %")


def short(error: str) -> str:
    """What vLLM says in one line; of what pydantic wraps, the cause."""
    cause = error.partition("Value error, ")[2] or error
    return one_line(cause.partition(" [type=")[0])


ENGINE = Scripted(
    "vllm",
    settings={
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # The engine in the script's own process, whose CPU time is measured.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    },
    # vLLM's code of these imports torchvision, which this environment must do without.
    left_out=("gemma3", "qwen3_5_text"),
    shortened=short,
)
small = ENGINE.small


def demo(
    python: Path, described: Mapping[str, Described], work: Path, threads: int
) -> Iterator[Row]:
    """Rows of the demo's models: agreement in float32, and tokens a second in bfloat16."""
    yield from small(python, described, work, threads)
    folders = {name: Path(described[name]["folder"]) / "model" for name in RACE}
    task = race_task("BF16", {name: str(folder) for name, folder in folders.items()}, threads)
    ((kind, answer),) = ENGINE.run(python, [task], threads)
    if "error" in answer:
        raise RuntimeError(f"{kind}: {answer['error']}")
    # The files are float32.
    sizes = {n: sum(f.stat().st_size for f in p.glob("*.safetensors")) // 2
             for n, p in folders.items()}  # fmt: skip
    yield from speed_rows(ENGINE.name, kind, described, sizes, answer["done"], threads)
