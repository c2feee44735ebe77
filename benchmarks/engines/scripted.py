"""Engines whose script takes a checkpoint folder: rows of agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.models import Described
from benchmarks.engines.rows import Row, agreement
from benchmarks.engines.runner import stream

# For one model.
TIMEOUT = 900.0


def one_line(error: str) -> str:
    """An engine's message without line breaks."""
    return " ".join(error.split())


@dataclass(frozen=True)
class Scripted:
    """An engine that reads checkpoint folders.

    Attributes:
        name: of the engine; its script is `run_NAME.py`.
        settings: variables of the script's environment beside the threads.
        left_out: families that it is not given.
        shortened: of its message, what a row keeps.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    shortened: Callable[[str], str] = one_line

    def small(
        self, python: Path, described: Mapping[str, Described], work: Path, threads: int
    ) -> Iterator[Row]:
        """A row for every model: loads, and agrees with transformers in float32."""
        tasks = [_task(n, f) for n, f in described.items() if f["family"] not in self.left_out]
        for name, said in self.run(python, tasks, threads):
            if "error" in said:
                folder = described[name]["folder"]
                said["error"] = self.shortened(said["error"].replace(f"{folder}/", ""))
            yield agreement(self.name, name, described[name], said)

    demo = small

    def run(
        self, python: Path, tasks: list[Row], threads: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, answer) of every task, see `runner.stream`."""
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **self.settings}
        yield from stream(python, f"run_{self.name}.py", tasks, TIMEOUT, settings)


def _task(name: str, facts: Described) -> Row:
    asked: dict[str, Any] = {"folder": str(Path(facts["folder"]) / "model")}
    if reference := facts.get("reference"):
        return {"task": "compare", "name": name, "arguments": asked | {"reference": reference}}
    return {"task": "load", "name": name, "arguments": asked}
