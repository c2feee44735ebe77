"""Trainer with the distillation loss and the masks' schedule, for a run of `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from maskprune.config import PruneConfig
from maskprune.files import JsonObject
from maskprune.hf.families import stock_model, text_config
from maskprune.structured.distill import DistillLoss, distill
from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.signal import MaskSignal
from maskprune.structured.student import load_weights, save_weights
from maskprune.training.checkpoints import load_solver, save_solver
from maskprune.training.distributed import as_forward
from maskprune.training.optimizer import adamw
from maskprune.training.sharding import has_states, load_adapter, load_trained
from maskprune.training.trainer import BlockTrainer

# Share of the run over which the adapters' learning rate rises again after the masks settled.
SETTLED_WARMUP = 0.05


class PruneTrainer(BlockTrainer):
    """`Trainer` with the distillation loss, two parameter groups and whole checkpoints.

    Trains the masked model against itself, or, where `teacher` is the masked model, one cut from
    it: the masks rest then, and go into the checkpoints alone.

    Use `PruneCallback` with it, or with a `Trainer` of your own, for the proximal step.
    """

    def __init__(
        self,
        *args: Any,
        masks: Masks,
        solver: Minimax,
        config: PruneConfig,
        signal: MaskSignal | None = None,
        teacher: nn.Module | None = None,
        **kw: Any,
    ):
        super().__init__(*args, **kw)
        self.teacher = teacher
        self.masks, self.solver, self.config, self.signal = masks, solver, config, signal
        self.settled_at: int | None = None

    def steps_settled(self, step: int) -> int | None:
        """Steps from the settling of the masks to `step`; None if they have not settled.

        Synchronises with the device until they have.
        """
        if not settles(self.config):
            return None
        if self.settled_at is None and self.solver.locked:
            self.settled_at = int(self.solver.read()["locked_at"]) + 1
        return None if self.settled_at is None else step - self.settled_at

    @property
    def rate(self) -> float:
        """Peak learning rate of all but the masks."""
        return self.config.rate(text_config(stock_model(self.core).config).hidden_size)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            mask_ids = {id(p) for p in self.masks.parameters()}
            weights = [
                p for p in self.core.parameters() if p.requires_grad and id(p) not in mask_ids
            ]
            self.optimizer = adamw(
                [
                    {"params": weights, "lr": self.rate, "weight_decay": 0.0},
                    {
                        "params": list(self.masks.parameters()),
                        "lr": self.config.mask_rate,
                        "weight_decay": 0.0,
                        **({"mini": True} if self.config.mask_adam == "adam-mini" else {}),
                    },
                ],
                self.config.optimizer_bits,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        if self.lr_scheduler is None:
            T, warmup = num_training_steps, max(1, round(self.config.warmup * num_training_steps))

            # Output adapters that start anew, with their moments at 0, need another warm-up.
            again = max(1, round(SETTLED_WARMUP * T))

            def weights(step: int) -> float:
                since = self.steps_settled(step)
                rise = 1.0 if since is None else min(1.0, (since + 1) / again)
                return min(1.0, (step + 1) / warmup) * rise * (1 - step / T)

            ramp = self.solver.rates.reach

            # Full rate while the solver chooses; then 0 where masks settle, else a linear decay.
            def masks(step: int) -> float:
                if self.steps_settled(step) is not None:
                    return 0.0
                return min(1.0, (1 - step / T) / (1 - ramp))

            target = optimizer or self.create_optimizer()
            self.lr_scheduler = LambdaLR(target, [weights, masks])
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> torch.Tensor | tuple[torch.Tensor, JsonObject]:
        core = self.core

        def forward(ids: torch.Tensor) -> DistillLoss:
            config = self.config
            return distill(
                core,
                self.masks,
                ids,
                alpha=config.alpha,
                kl_direction=config.kl_direction,
                lm_weight=config.lm_weight,
                teacher=self.teacher,
            )

        with self.computing():
            loss = as_forward(model, core, forward, inputs["input_ids"])
        self.last_loss = {
            "loss": loss.total.detach(),
            "kl": loss.kl.detach(),
            "layer": loss.layer.detach(),
            "lm": loss.lm.detach(),
        }
        return (loss.total, {}) if return_outputs else loss.total

    def require_finite(self) -> None:
        """Raise on a NaN or infinite loss, or NaN masks; synchronises with the device."""
        super().require_finite()
        self.solver.require_healthy()

    def trace_row(self, optimizer: Optimizer) -> JsonObject:
        now, left = self.solver.read(), self.solver.residuals()
        names = ("R", "y", "z", "r_head", "r_ffn", "s_head", "s_ffn", "interval", "shrink", "S")
        return {name: now[name] for name in names} | {
            "R_star": self.solver.budget.R_star,
            "locked": bool(now["locked"]),
            "residual_head": left["head"],
            "residual_ffn": left["ffn"],
            "width_spread": float((self.masks.ffn > 0.5).sum(1).double().std(correction=0)),
            "lr": float(optimizer.param_groups[0]["lr"]),
            "mask_lr": float(optimizer.param_groups[1]["lr"]),
            **(self.signal.row(self.solver) if self.signal else {}),
        }

    def _save(self, output_dir: str | None = None, state_dict: JsonObject | None = None) -> None:
        if self.teacher is None:
            super()._save(output_dir, state_dict)
        else:
            # transformers writes some families under other names than it reads back here.
            save_weights(Path(output_dir or str(self.args.output_dir)), self.core)

    def save_whole(self, folder: Path) -> None:
        """Save masks and solver, which are never sharded."""
        save_solver(folder, dict(self.masks.named_parameters()), self.solver.state_dict())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, core = Path(resume_from_checkpoint), self.core
        if self.teacher is not None:
            load_weights(folder, core)
        elif has_states(folder):
            load_trained(folder, core)
        elif self.sharded:
            load_adapter(folder, core)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_masks_and_solver(folder, self.masks, self.solver)


def load_masks_and_solver(folder: Path, masks: Masks, solver: Minimax) -> None:
    """Set both to what a checkpoint holds."""
    values, state = load_solver(folder)
    for name, parameter in masks.named_parameters():
        parameter.data.copy_(values[name])
    solver.load_state_dict(state)


def settles(config: PruneConfig) -> bool:
    """Whether masks are set to 0 and 1 once the shape is final; in the paper they train on."""
    return config.chooser == "maskprune" and config.compensate
