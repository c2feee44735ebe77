"""Timing in turns, for scripts in an engine's own environment: standard library alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

Clock = Callable[[], float]


def take_turns(
    names: Iterable[str],
    rounds: int,
    threads: int,
    once: Callable[[str, Clock], tuple[float, float]],
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of every model, in turn and in random order, after a round not counted.

    One thread is timed by the process's CPU time, which what else runs on the machine leaves alone.

    Args:
        once: of a name and a clock, the tokens a second of one prefill and one decode.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    order = list(names)
    speeds: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in order}
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            found = once(name, clock)
            if turn:
                for regime, speed in zip(("prefill", "decode"), found, strict=True):
                    speeds[name][regime].append(speed)
    return speeds
