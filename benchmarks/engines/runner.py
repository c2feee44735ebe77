"""Scripts that run in an engine's environment, and what they answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MARK = "ROW"
Answer = dict[str, Any]


def answers(
    python: Path, script: str, tasks: Iterable[Mapping[str, Any]], timeout: float
) -> dict[str, Answer]:
    """What `stream` yields, by the task's name."""
    return dict(stream(python, script, tasks, timeout))


def stream(
    python: Path,
    script: str,
    tasks: Iterable[Mapping[str, Any]],
    timeout: float,
    settings: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Answer]]:
    """(name, answer) of every task as it comes: `{"done": ...}` or `{"error": ...}`.

    Tasks go in as JSON lines; an answer is a line `ROW{...}`. A script that dies, or says nothing
    for `timeout` seconds, takes its task with it, not the ones after.

    Args:
        settings: variables of the script's environment.
    """
    left = {str(task["name"]): task for task in tasks}
    while left:
        with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as log:
            asked.writelines(json.dumps(task) + "\n" for task in left.values())
            asked.seek(0)
            process = subprocess.Popen(
                [str(python), str(HERE / script)], stdin=asked, stdout=subprocess.PIPE,
                stderr=log, text=True, env=environment() | dict(settings or {}),
                start_new_session=True,
            )  # fmt: skip
            try:
                for line in _lines(process, timeout):
                    if line.startswith(MARK):
                        answer = json.loads(line.removeprefix(MARK))
                        name = answer.pop("name")
                        left.pop(name, None)
                        yield name, answer
            finally:
                _kill(process)
            log.seek(0)
            last = [line.strip() for line in log.read().splitlines() if line.strip()]
        if left:
            name = next(iter(left))
            left.pop(name)
            code = f"exit status {process.returncode}"
            if process.returncode == -signal.SIGKILL:
                code = f"killed, or no answer within {timeout:g} s"
            yield name, {"error": f"{script} ended: {code}; {last[-1] if last else 'no message'}"}


def _lines(process: subprocess.Popen[str], timeout: float) -> Iterator[str]:
    """What it prints, until it ends or prints nothing for `timeout` seconds and is killed."""
    assert process.stdout
    while True:
        watch = threading.Timer(timeout, _kill, [process])
        watch.start()
        try:
            line = process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            process.wait()
            return
        yield line


def _kill(process: subprocess.Popen[str]) -> None:
    """With its children, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """This one, with the checkout's package in reach."""
    return os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
