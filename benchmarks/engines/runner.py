"""Scripts that run in an engine's environment, and what they answer."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARK = "ROW"


def answers(
    python: Path, script: str, tasks: Iterable[Mapping[str, Any]], timeout: float
) -> dict[str, dict[str, Any]]:
    """What `script` answers to every task, by the task's name: `{"done": ...}` or `{"error": ...}`.

    Tasks go in as JSON lines; an answer is a line `ROW{...}`. A script that dies takes its task
    with it, not the ones after.
    """
    left = {str(task["name"]): task for task in tasks}
    found: dict[str, dict[str, Any]] = {}
    while left:
        lines = "".join(json.dumps(task) + "\n" for task in left.values())
        with tempfile.TemporaryFile("w+") as log:
            try:
                done = subprocess.run(
                    [str(python), str(HERE / script)],
                    input=lines, stdout=subprocess.PIPE, stderr=log, text=True, check=False,
                    timeout=timeout, env=environment(),
                )  # fmt: skip
                said, code = done.stdout, f"exit status {done.returncode}"
            except subprocess.TimeoutExpired as stopped:
                # Bytes, although text was asked for: a bug of Python's, fixed in no 3.11.
                out = stopped.stdout or b""
                said = out.decode() if isinstance(out, bytes) else out
                code = f"no answer within {timeout:.0f} s"
            log.seek(0)
            last = [line.strip() for line in log.read().splitlines() if line.strip()]
        for answer in _parsed(said):
            found[answer.pop("name")] = answer
        for name in found:
            left.pop(name, None)
        if left:
            name = next(iter(left))
            left.pop(name)
            found[name] = {"error": f"{script} ended: {code}; {last[-1] if last else 'no message'}"}
    return found


def environment() -> dict[str, str]:
    """This one, with the checkout's package in reach."""
    return os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
