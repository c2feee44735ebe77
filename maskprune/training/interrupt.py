"""SIGTERM and SIGINT in a run: the step ends, a checkpoint is saved, and the run stops.

A signal outside the training loop, or a second one, stops at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its text says how to go on."""

    def __init__(self, signum: int = signal.SIGINT, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class _Signals:
    def __init__(self) -> None:
        self.in_loop = False
        self.received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.in_loop or self.received is not None:
            raise Interrupted(signum)
        self.received = signum
        name = signal.Signals(signum).name
        sys.stderr.write(f"\n{name}: saving a checkpoint after this step, again to stop at once\n")


_signals = _Signals()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT as above while the context lasts; processes of one run alone.

    Processes that train together would stop after different steps, so they are left alone, and
    so is a signal that whoever started this process has set to be ignored.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    handled = {s: old for s, old in before.items() if old != signal.SIG_IGN}
    for signum in handled:
        signal.signal(signum, _signals.handle)
    try:
        yield
    finally:
        for signum, old in handled.items():
            signal.signal(signum, old)


@contextlib.contextmanager
def training_loop() -> Iterator[None]:
    """The part of a run in which a first signal waits for the end of the step.

    Raises:
        Interrupted: at the end, where a signal came.
    """
    _signals.in_loop, _signals.received = True, None
    try:
        yield
    finally:
        _signals.in_loop = False
    if _signals.received is not None:
        raise Interrupted(_signals.received)


class StopCallback(TrainerCallback):
    """Saves and stops after the step in which a signal came."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if _signals.received is not None:
            control.should_save = control.should_training_stop = True
