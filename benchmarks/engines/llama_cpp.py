"""What llama.cpp makes of the checkpoints: rows of agreement, speed and quantised quality."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.engines.models import Described
from benchmarks.engines.rows import Row, agreement, race_task, speed_rows
from benchmarks.engines.runner import HERE, answers, environment

NAME = "llama.cpp"
SCRIPT = "run_llama_cpp.py"
TIMEOUT = 900.0
# Which demo models are raced as what.
RACES = {
    "F16": ("dense", "pruned", "uniform 50 %", "zeros 50 %"),
    "Q8_0": ("dense", "pruned", "uniform 50 %"),
    "Q4_K_M": ("dense", "pruned", "uniform 50 %"),
}
# The wheel's quantiser gives Q5_K of rows that 256 does not divide a type of its own.
QUALITY_TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q4_K_M")


def small(python: Path, described: Mapping[str, Described], work: Path, threads: int) -> list[Row]:
    """A row for every small model: loads, and agrees with transformers in float32."""
    files = {name: work / f"{Path(d['folder']).name}.gguf" for name, d in described.items()}
    jobs = [(n, str(Path(d["folder"]) / "model"), str(files[n])) for n, d in described.items()]
    done = subprocess.run(
        [str(python), str(HERE / "run_converter.py")], input=json.dumps(jobs), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), check=False,
    )  # fmt: skip
    errors = {a["name"]: a["error"] for a in map(json.loads, done.stdout.splitlines())}
    lost = "the converter ended without an answer"
    refused = {n: e for n in described if (e := errors.get(n, lost)) is not None}
    tasks = [_compare(n, files[n], described[n], threads) for n in described if n not in refused]
    said = answers(python, SCRIPT, tasks, TIMEOUT)
    for path in files.values():
        path.unlink(missing_ok=True)
    rows = []
    for name, facts in described.items():
        answer = {"error": f"converter: {refused[name]}"} if name in refused else said[name]
        rows.append(agreement(NAME, name, facts, answer))
    return rows


def demo(
    python: Path, described: Mapping[str, Described], work: Path, threads: int
) -> Iterator[Row]:
    """Rows of the demo's models: agreement in float32, and tokens a second by type."""
    for name, facts in described.items():
        path, error = _converted(python, facts, work, "F32")
        answer: Mapping[str, Any] = {"error": error}
        if path and "reference" in facts:
            answer = answers(python, SCRIPT, [_compare(name, path, facts, threads)], TIMEOUT)[name]
        elif path:
            asked = {"path": str(path), "threads": threads}
            tasks = [{"task": "load", "name": name, "arguments": asked}]
            answer = answers(python, SCRIPT, tasks, TIMEOUT)[name]
        yield agreement(NAME, name, facts, answer)
        if path:
            path.unlink()
    for kind, names in RACES.items():
        paths = {}
        for name in names:
            path, error = _converted(python, described[name], work, kind)
            if path is None:
                print(f"{NAME}: no {kind} of {name}: {error}", file=sys.stderr)
            else:
                paths[name] = path
        yield from _raced(python, paths, described, kind, threads)
        for path in paths.values():
            path.unlink(missing_ok=True)


def quality(
    python: Path, described: Mapping[str, Described], windows: Path, work: Path, threads: int
) -> Iterator[Row]:
    """Perplexity, bytes and tokens a second of quantised files, of the dense and the trained."""
    for kind in QUALITY_TYPES:
        paths = {}
        for name in ("dense", "pruned"):
            path, error = _converted(python, described[name], work, kind)
            if path is None:
                raise RuntimeError(f"no {kind} of {name}: {error}")
            paths[name] = path
        tasks = [
            {"task": "perplexity", "name": name, "arguments": asked}
            for name, path in paths.items()
            if (asked := {"path": str(path), "windows": str(windows), "threads": threads})
        ]
        said = answers(python, SCRIPT, tasks, TIMEOUT)
        for row in _raced(python, paths, described, kind, threads):
            if "error" in said[row["model"]]:
                raise RuntimeError(f"{row['model']} {kind}: {said[row['model']]['error']}")
            yield row | {"what": "quality"} | said[row["model"]]["done"]
        for path in paths.values():
            path.unlink(missing_ok=True)


def _compare(name: str, path: Path, facts: Described, threads: int) -> Row:
    asked = {"path": str(path), "reference": facts["reference"], "threads": threads}
    return {"task": "compare", "name": name, "arguments": asked}


def _converted(
    python: Path, facts: Described, work: Path, kind: str
) -> tuple[Path | None, str | None]:
    """(file, None) as `maskprune convert` writes it, or (None, why not)."""
    folder = Path(facts["folder"])
    path = work / f"{folder.name}-{kind}.gguf"
    command = [str(python), "-m", "maskprune", "convert", str(folder / "model"), "-o", str(path)]
    command += ["--quantize", kind, "--overwrite"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), check=False, timeout=TIMEOUT
    )
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1]
    return path, None


def _raced(
    python: Path,
    paths: Mapping[str, Path],
    described: Mapping[str, Described],
    kind: str,
    threads: int,
) -> list[Row]:
    task = race_task(kind, {name: str(path) for name, path in paths.items()}, threads)
    answer = answers(python, SCRIPT, [task], TIMEOUT)[kind]
    if "error" in answer:
        raise RuntimeError(f"{kind}: {answer['error']}")
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return speed_rows(NAME, kind, described, sizes, answer["done"], threads)
