"""SIGTERM and SIGINT in a run: the step ends, a checkpoint is saved, and the run stops.

A signal outside the training loop, or a second one, stops at once. A run of several processes
ignores a second one, since torchrun sends it after the terminal's; all processes stop after the
same step, whichever of them got the signal.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskprune.training.distributed import rank, world_size


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its text says how to continue."""

    def __init__(self, signum: int = signal.SIGINT, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class _Signals:
    def __init__(self) -> None:
        self.in_loop = False
        self.received: int | None = None
        # A gloo group where training uses NCCL, which would make each step wait for the device.
        self.group: dist.ProcessGroup | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not self.in_loop or (again and world_size() == 1):
            raise Interrupted(signum)
        self.received = signum
        if rank() == 0 and not again:
            end = ", again to stop at once" if world_size() == 1 else ""
            name = signal.Signals(signum).name
            sys.stderr.write(f"\n{name}: saving a checkpoint after this step{end}\n")

    def agree(self) -> bool:
        """Whether any process of the run has received a signal; all must ask at the same step."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.received is not None
        told = torch.tensor(self.received or 0)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        # A signal that came in between was not told: it stands until the next step.
        self.received = int(told) or self.received
        return bool(told)


_signals = _Signals()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT as above while the context lasts.

    A signal that this process was started with as ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
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
        Interrupted: at the end, if a signal came.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo":
        _signals.group = dist.new_group(backend="gloo")
    _signals.in_loop, _signals.received = True, None
    try:
        yield
    finally:
        _signals.in_loop, _signals.group = False, None
    if _signals.received is not None:
        raise Interrupted(_signals.received)


class StopCallback(TrainerCallback):
    """Saves and stops after the step in which a signal came."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        if _signals.agree():
            control.should_save = control.should_training_stop = True
