"""A Trainer callback: the trace of a run, and its progress."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskprune.config import RunConfig
from maskprune.files import JsonObject
from maskprune.training.distributed import on_first, rank
from maskprune.training.progress import Progress
from maskprune.training.trainer import BlockTrainer


class TraceCallback(TrainerCallback):
    """Writes the trace and shows the progress; stops at a loss that is not finite.

    Every rank has the rows; rank 0 writes them.

    Args:
        config: settings with `logging_steps`, `batch_size` and `seq_len`.
        line: formats a row for the progress display.

    Set `trainer` once it exists: a trainer takes its callbacks when it is made.
    """

    trainer: BlockTrainer

    def __init__(
        self, path: Path, config: RunConfig, quiet: bool, line: Callable[[JsonObject], str]
    ) -> None:
        self.path, self.config, self.quiet, self.line = path, config, quiet, line
        self.rows: list[JsonObject] = []
        self.progress: Progress | None = None
        self.mark = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.rows = on_first(lambda: self._begin(state.global_step))
        self.progress = Progress(args.max_steps, state.global_step, self.quiet)
        self.mark = (state.global_step, time.monotonic())

    def _begin(self, done: int) -> list[JsonObject]:
        """The rows of a resumed run up to step `done`; later ones are removed from the file."""
        rows = []
        if self.path.is_file():
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            rows = [row for row in rows if row["step"] <= done]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kw: object,
    ) -> None:
        assert self.progress is not None and optimizer is not None
        self.progress.advance()
        done = state.global_step
        due = done == 1 or done % self.config.logging_steps == 0 or done == args.max_steps
        # On the CPU the check is free; on a GPU it would stall every step.
        if due or args.device.type == "cpu":
            self.trainer.require_finite()
        if not due:
            return
        row = self.row(done, optimizer)
        self.rows.append(row)
        if rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.progress.show(done, self.line(row))

    @contextlib.contextmanager
    def outside_steps(self) -> Iterator[None]:
        """Exclude the time within the context from the steps' tokens/s and from the time left."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.mark = (self.mark[0], self.mark[1] + seconds)
        if self.progress is not None:
            self.progress.skip(seconds)

    def row(self, done: int, optimizer: Optimizer) -> JsonObject:
        """The state of the run after `done` steps."""
        steps, since = done - self.mark[0], time.monotonic() - self.mark[1]
        self.mark = (done, time.monotonic())
        tokens = steps * self.config.batch_size * self.config.seq_len
        losses = {name: value.item() for name, value in self.trainer.last_loss.items()}
        return (
            {"step": done}
            | losses
            | self.trainer.trace_row(optimizer)
            | {"tokens_per_s": tokens / max(since, 1e-9)}
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        if self.progress:
            self.progress.close()
