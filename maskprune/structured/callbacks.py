"""Trainer callbacks: the proximal step, and the trace of a run."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from maskprune.structured.kept_units import compute_kept_units
from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.signal import MaskSignal
from maskprune.training.sharding import clip_gradients


class PruneCallback(TrainerCallback):
    """Runs the proximal step after each optimizer step; clips the adapters' gradient before it.

    Works with any `Trainer` whose optimizer trains the masks:
    `Trainer(..., callbacks=[PruneCallback(solver)])`.
    """

    def __init__(self, solver: Minimax, max_grad_norm: float = 0.0) -> None:
        self.solver, self.max_grad_norm = solver, max_grad_norm

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kw: object,
    ) -> None:
        # DeepSpeed and others create their optimizer later.
        if optimizer is not None:
            self.solver.require_trained(p for g in optimizer.param_groups for p in g["params"])

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kw: object,
    ) -> None:
        if self.max_grad_norm and model is not None:
            mask_ids = {id(p) for p in self.solver.masks.parameters()}
            weights = [p for p in model.parameters() if p.requires_grad and id(p) not in mask_ids]
            clip_gradients(weights, self.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.solver.step()


class LockCallback(TrainerCallback):
    """Settles the masks and resets the adapters, once, when the shape is final.

    Until then each step synchronises with the device to ask the solver. A run resumed from a
    checkpoint whose shape was final has done this already.

    Args:
        reset: sets the adapters, returns the parameters that it set.
    """

    def __init__(self, solver: Minimax, reset: Callable[[], list[nn.Parameter]]) -> None:
        self.solver, self.reset = solver, reset
        self.done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.done = self.solver.locked

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kw: object,
    ) -> None:
        if self.done or not self.solver.locked or optimizer is None:
            return
        self.done = True
        self.solver.settle()
        for p in self.reset():
            # The old factors' moments do not apply to the new ones.
            for moment in optimizer.state.get(p, {}).values():
                moment.zero_()


class KeptUnitsCallback(TrainerCallback):
    """Trains without computing pruned units, where a one-shot choice lets the masks rest.

    A resumed run's masks are known once its checkpoint is loaded, as training begins. When it
    ends, weights are in their order again before later callbacks are called.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.model, self.masks = model, masks
        self.put_back: Callable[[], None] = lambda: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.put_back = compute_kept_units(self.model, self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.put_back()


class SignalCallback(TrainerCallback):
    """Adds up the masks' gradients for the trace while the masks are learned."""

    def __init__(self, signal: MaskSignal) -> None:
        self.signal = signal

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: object
    ) -> None:
        self.signal.add_gradients()
