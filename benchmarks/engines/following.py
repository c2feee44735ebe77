"""A reference followed token by token, for scripts in an engine's own environment: numpy alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

# A function of tokens and where they start: what the engine gives after the last of them, (V,)
# logits. Start 0 begins a new text.
Feed = Callable[[list[int], int], np.ndarray]
# A function of tokens and a number: that many tokens after them, each with its (V,) logits.
Write = Callable[[list[int], int], Sequence[tuple[int, np.ndarray]]]


def follow(reference: str, feed: Feed) -> dict[str, Any]:
    """Agreement of an engine that is fed the reference's tokens: a difference counts once.

    Args:
        reference: what `models.reference` made, saved by numpy.
        feed: the engine.
    """

    def write(tokens: list[int], at: int) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        while at < len(tokens):
            logits = feed(tokens[start:at], start)
            yield int(logits.argmax()), logits
            start, at = at, at + 1

    return _compare(reference, write)


def go_along(reference: str, write: Write) -> dict[str, Any]:
    """Agreement of an engine that chooses itself, and goes on from the reference where it errs."""

    def again(tokens: list[int], at: int) -> Iterator[tuple[int, np.ndarray]]:
        while at < len(tokens):
            for token, logits in write(tokens[:at], len(tokens) - at):
                yield token, logits
                at += 1
                if token != tokens[at - 1]:
                    break

    return _compare(reference, again)


def _compare(
    reference: str, write: Callable[[list[int], int], Iterator[tuple[int, np.ndarray]]]
) -> dict[str, Any]:
    same, total, largest = 0, 0, 0.0
    with np.load(reference) as asked:
        parts = [asked[key] for key in ("tokens", "prompt", "logprobs")]
    for row, prompt, expected in zip(*parts, strict=True):
        tokens = [int(token) for token in row if token >= 0]
        said = write(tokens, int(prompt))
        for (token, logits), right, wanted in zip(said, tokens[prompt:], expected, strict=True):
            same += token == right
            off = np.abs(log_softmax(logits)[: len(wanted)] - wanted).max()
            # A NaN is larger than all.
            largest = float("inf") if np.isnan(off) else max(largest, float(off))
        total += len(expected)
    return {"same_tokens": same, "tokens": total, "logprob_difference": largest}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@contextmanager
def converted(folder: str, engine: str) -> Iterator[str]:
    """A folder beside the checkpoint for the engine's own files, gone afterwards."""
    path = Path(folder).with_name(f"converted-{engine}")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield str(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def answer(tasks: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Tasks come as JSON lines on stdin, `{task, name, arguments}`; an answer for each goes out."""
    for line in sys.stdin.readlines():
        asked = json.loads(line)
        try:
            # What a task prints goes where the last line of a script that died is looked for.
            with redirect_stdout(sys.stderr):
                done: dict[str, Any] = {"done": tasks[asked["task"]](**asked["arguments"])}
        except Exception as error:
            done = {"error": f"{type(error).__name__}: {error}"}
        # On a line of its own, whatever the engine's own libraries printed.
        print("\nROW" + json.dumps({"name": asked["name"]} | done), flush=True)
