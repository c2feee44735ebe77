"""Trainer callbacks: the proximal step, and the trace of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from maskprune.minimax import Minimax
from maskprune.progress import Progress


class PruneCallback(TrainerCallback):
    """Runs the proximal step after each optimizer step; clips the adapters' gradient before it.

    Works with any `Trainer` whose optimizer trains the masks:
    `Trainer(..., callbacks=[PruneCallback(solver)])`.
    """

    def __init__(self, solver: Minimax, max_grad_norm: float = 0.0) -> None:
        self.solver, self.max_grad_norm = solver, max_grad_norm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.max_grad_norm:
            mask_ids = {id(p) for p in self.solver.masks.parameters()}
            model: nn.Module = kw["model"]
            weights = [p for p in model.parameters() if p.requires_grad and id(p) not in mask_ids]
            torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.solver.step()


class CompensationCallback(TrainerCallback):
    """Once, when the solver has made the shape final: starts the output adapters anew.

    Until then each step asks the solver, which synchronises with the device. A run resumed from a
    checkpoint with a final shape has had it.

    Args:
        compensation: sets the adapters, returns the parameters that it set.
    """

    def __init__(self, solver: Minimax, compensation: Callable[[], list[nn.Parameter]]) -> None:
        self.solver, self.compensation = solver, compensation
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.done = self.solver.locked

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.done or not self.solver.locked:
            return
        self.done = True
        for p in self.compensation():
            # Moments of the old factors say nothing of the new ones.
            for moment in kw["optimizer"].state.get(p, {}).values():
                moment.zero_()


class TraceCallback(TrainerCallback):
    """Writes the trace and shows the progress; stops at a loss that is not finite.

    Args:
        config: settings with `logging_steps`, `batch_size` and `seq_len`.
        line: the numbers of a row that a person sees.
    """

    def __init__(
        self, path: Path, config: Any, quiet: bool, line: Callable[[dict[str, Any]], str]
    ) -> None:
        self.path, self.config, self.quiet, self.line = path, config, quiet, line
        self.rows: list[dict[str, Any]] = []
        self.trainer: Any = None
        self.progress: Progress | None = None
        self.mark = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.path.is_file():
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.rows = [row for row in rows if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.progress = Progress(args.max_steps, state.global_step, self.quiet)
        self.mark = (state.global_step, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        assert self.progress is not None
        self.progress.advance()
        done = state.global_step
        due = done == 1 or done % self.config.logging_steps == 0 or done == args.max_steps
        # On the CPU the check is free; on a GPU it would stall every step.
        if due or args.device.type == "cpu":
            self.trainer.require_finite()
        if not due:
            return
        row = self.row(done, kw["optimizer"])
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.progress.show(done, self.line(row))

    def row(self, done: int, optimizer: Any) -> dict[str, Any]:
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

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.progress:
            self.progress.close()
