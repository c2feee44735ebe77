"""Pruning with the Hugging Face Trainer; a run resumes from its checkpoints bit for bit."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from maskprune.config import PruneConfig
from maskprune.files import JsonObject
from maskprune.hf.adapters import adapted_layers, require_mergeable
from maskprune.hf.families import Family, family_of, output_names, require_causal_lm, text_config
from maskprune.hf.head import head_of
from maskprune.hf.quiet import quiet_transformers
from maskprune.hf.shape import Shape, require_ranks
from maskprune.structured.budget import Budget
from maskprune.structured.callbacks import LockCallback, PruneCallback, SignalCallback
from maskprune.structured.compensation import compensate
from maskprune.structured.distill import DistillLoss, distill
from maskprune.structured.export import export
from maskprune.structured.masks import Masks, attach_masks, load_masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.saliency import one_shot, warm_start
from maskprune.structured.signal import MaskSignal
from maskprune.training.checkpoints import (
    load_solver,
    open_run,
    require_checkpoint_space,
    save_solver,
    temporary_folder,
)
from maskprune.training.data import block_order
from maskprune.training.distributed import as_forward, on_first, rank
from maskprune.training.documents import Source
from maskprune.training.optimizer import adamw, require_optimizer
from maskprune.training.progress import note, reporting
from maskprune.training.sharding import (
    device_of_run,
    has_states,
    load_adapter,
    load_trained,
    shard_blocks,
    shards,
)
from maskprune.training.trace import TraceCallback
from maskprune.training.trainer import (
    Blocks,
    BlockTrainer,
    as_blocks,
    checkpoint_activations,
    join_run,
    quiet_trainer,
    require_trainable_dtype,
    total_steps,
    training_arguments,
    use_autocast,
)

logger = logging.getLogger(__name__)


AT_ONCE = (
    "the least salient units are removed at once, and every step trains the rest: learned "
    "masks chose no better in any run so far (docs/experiments.md); --method maskprune learns them"
)

# Share of the run over which the adapters' learning rate rises again after the masks settled.
SETTLED_WARMUP = 0.05


@dataclass
class PruneResult:
    """What `prune` returns.

    Attributes:
        model: the stock pruned model; None where no process holds all of it (`--shard full`):
            `export_checkpoint` then makes it from masks and adapter.
        masks: attached to `masked_model`, pruned units exactly 0.
        shape: the uniform shape.
        trace: a row per logged step.
        residuals: largest pruned mask before it was set to 0, per kind.
        masked_model: the PEFT model under its masks, for the proof.
        budget: the budget that the shape meets.
        steps: optimizer steps of the whole run.
    """

    model: Any
    masks: Masks
    shape: Shape
    trace: list[JsonObject]
    residuals: dict[str, float]
    masked_model: Any
    budget: Budget
    steps: int


class PruneTrainer(BlockTrainer):
    """`Trainer` with the distillation loss, two parameter groups and whole checkpoints.

    Use `PruneCallback` with it, or with a `Trainer` of your own, for the proximal step.
    """

    def __init__(
        self,
        *args: Any,
        masks: Masks,
        solver: Minimax,
        config: PruneConfig,
        signal: MaskSignal | None = None,
        **kw: Any,
    ):
        super().__init__(*args, **kw)
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

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            mask_ids = {id(p) for p in self.masks.parameters()}
            weights = [
                p for p in self.core.parameters() if p.requires_grad and id(p) not in mask_ids
            ]
            self.optimizer = adamw(
                [
                    {"params": weights, "lr": self.config.learning_rate, "weight_decay": 0.0},
                    {
                        "params": list(self.masks.parameters()),
                        "lr": self.config.mask_lr,
                        "weight_decay": 0.0,
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
                core, self.masks, ids, alpha=config.alpha, kl_direction=config.kl_direction
            )

        loss = as_forward(model, core, forward, inputs["input_ids"])
        self.last_loss = {
            "loss": loss.total.detach(),
            "kl": loss.kl.detach(),
            "layer": loss.layer.detach(),
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

    def save_whole(self, folder: Path) -> None:
        """Save masks and solver, which are never sharded."""
        save_solver(folder, dict(self.masks.named_parameters()), self.solver.state_dict())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, core = Path(resume_from_checkpoint), self.core
        if has_states(folder):
            load_trained(folder, core)
        elif self.sharded:
            load_adapter(folder, core)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        values, state = load_solver(folder)
        for name, parameter in self.masks.named_parameters():
            parameter.data.copy_(values[name])
        self.solver.load_state_dict(state)


def settles(config: PruneConfig) -> bool:
    """Whether masks are set to 0 and 1 once the shape is final; in the paper they train on."""
    return config.chooser == "maskprune" and config.compensate


def first_masks(run: Path, masks: Masks) -> dict[str, torch.Tensor]:
    """The masks of step 0 by kind; kept in the run folder for a resumed run."""
    path = run / "first_masks.safetensors"
    if not path.is_file():
        masks.save(path)
    before = load_masks(path)
    return {name: getattr(before, name).detach().to(masks.ffn.device) for name in ("head", "ffn")}


def _solver(masks: Masks, budget: Budget, steps: int, config: PruneConfig) -> Minimax:
    return Minimax(
        masks,
        budget,
        steps,
        mode=config.mode,
        reach=config.reach or (0.6 if config.warm_start == "none" else 0.1),
        eta1=config.eta1,
        interval=config.interval,
    )


def require_reachable(budget: Budget, steps: int, config: PruneConfig) -> None:
    """Refuse a short run without warm start that would end before it meets the budget.

    Runs the solver to the end without a loss, which takes less than a second. Runs of more than
    500 steps have prox calls to spare, and a warm start begins near the budget.

    Raises:
        ValueError: the budget is not reached; says what to change.
    """
    if config.warm_start != "none" or config.chooser != "maskprune" or steps > 500:
        return
    masks = Masks(budget.shape, config.head_unit, budget.family.model_type)
    solver = _solver(masks, budget, steps, config)
    for _ in range(steps):
        solver.step()
    if not solver.locked:
        raise ValueError(
            f"{steps} steps from --warm-start none end at R = {solver.read()['R']:.3f}, above the "
            f"budget {budget.R_star:.3f}; give more --steps, a smaller --interval (now "
            f"{solver.rates.interval}), or a warm start"
        )


def prune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Source | torch.Tensor,
    config: PruneConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PruneResult:
    """Prune heads and FFN units to the budget, train what stays, return a stock model.

    The units go at once by a ranking, or their masks are learned by MaskPrune: `config.method`.

    Args:
        model: a transformers causal LM of a known family. It ends with adapters and masks on it;
            reload it where the original is needed.
        tokenizer: its tokenizer; not used when `data` is token blocks already.
        data: a text source as `token_blocks` takes it, or (n, seq_len) int64 token blocks.
        config: the settings.
        run_dir: where checkpoints and the trace go; a temporary folder where None.
        resume: continue from the newest whole checkpoint in `run_dir`.
        quiet: show no progress.
        callbacks: further Trainer callbacks, called after the method's own.

    Returns:
        PruneResult; its model's layers are uniform and meet the budget.

    Raises:
        ValueError: settings or data that cannot work, before any training.
        FloatingPointError: the loss diverged; names the step. The checkpoints remain.

    Source: MaskPrune (arXiv 2502.14008), Algorithm 1 and section 3.3.
    """
    from peft import LoraConfig, get_peft_model

    core = require_causal_lm(model)
    if hasattr(model, "get_base_model") or adapted_layers(core):
        raise ValueError("the model has adapters already; merge them first: merge_and_unload()")
    require_trainable_dtype(core)
    require_optimizer(config.optimizer_bits)
    join_run(config, core)
    sharded = shards(config, core.config)
    quiet = quiet or rank() > 0
    budget = Budget.of(core, config)
    require_ranks(core.config, lora_r=config.lora_r, output_r=config.output_r)
    blocks = as_blocks(data, tokenizer, config, core)
    steps = total_steps(config, len(blocks))
    require_reachable(budget, steps, config)
    order = block_order(len(blocks), config.batch_size, steps, config.seed, seq_len=config.seq_len)

    set_seed(config.seed)
    device = device_of_run(core, sharded)
    text_config(core.config).use_cache = False
    targets = [name.strip() for name in config.lora_targets.split(",")]
    family = family_of(core.config)
    outputs = {
        name: config.output_r
        for name in output_names(family)[0 if family.prunes_heads else 1 :]
        if targets == ["all-linear"]
        or any(name.endswith(t) or t.endswith(f".{name}") for t in targets)
    }
    with quiet_transformers():
        peft_model = get_peft_model(
            core,
            LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                rank_pattern=outputs,
                alpha_pattern=outputs,
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                exclude_modules=_outside_language_model(core, family),
            ),
        )
    require_mergeable(peft_model)
    if config.gradient_checkpointing:
        checkpoint_activations(core)
    masks = attach_masks(peft_model, config.head_unit)
    learned = config.chooser == "maskprune"
    masks.requires_grad_(learned)
    # DDP must not wait for gradients of head masks in a family that keeps its heads.
    masks.head.requires_grad_(learned and masks.head.numel() > 0)
    if sharded:
        shard_blocks(peft_model, device)
    if obstacle := head_of(core).obstacle:
        note(f"{obstacle}: the loss needs whole logits, and their memory", quiet)
    solver = _solver(masks, budget, steps, config)
    autocast = use_autocast(config, core, device)

    with contextlib.ExitStack() as stack:
        if run_dir is None:
            run_dir = stack.enter_context(temporary_folder())
        run = Path(run_dir)
        checkpoint = on_first(lambda: open_run(run, resume))
        if checkpoint is None:
            require_checkpoint_space(run, (p for p in core.parameters() if p.requires_grad))
        sample = blocks[: config.warm_start_blocks].to(device)

        def computing() -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=autocast)

        def compensation() -> list[nn.Parameter]:
            tokens = config.compensation_tokens or 32 * masks.shape.ffn
            fitted = blocks[: -(-tokens // blocks.shape[1])].to(device)
            what = "compensating for the pruned units"
            with (
                trace.outside_steps(),
                computing(),
                reporting(what, fitted.numel(), quiet) as progress,
            ):
                return compensate(peft_model, masks, solver.kept(), fitted, progress)

        trace = TraceCallback(run / "trace.jsonl", config, quiet, _progress_line)
        own: list[TrainerCallback] = [PruneCallback(solver, config.max_grad_norm)]
        if checkpoint is None:
            ranking = config.warm_start if learned else config.chooser
            if config.method == "auto" and not learned:
                note(AT_ONCE, quiet)
            if ranking != "none":
                what = f"ranking the units by {ranking}"
                with computing(), reporting(what, sample.numel(), quiet) as progress:
                    ranked = (ranking, peft_model, masks, budget, sample, progress)
                    if learned:
                        warm_start(*ranked)
                    else:
                        solver.lock(one_shot(*ranked))
            if config.compensate and solver.locked:
                compensation()
        signal = lock = None
        if learned:
            signal = MaskSignal(masks, on_first(lambda: first_masks(run, masks)))
            own.append(SignalCallback(signal))
        if settles(config):
            lock = LockCallback(solver, compensation)
            own.append(lock)
        trainer = PruneTrainer(
            model=peft_model,
            args=training_arguments(config, run, steps, device, autocast, sharded),
            train_dataset=Blocks(blocks, order),
            callbacks=[*own, *callbacks, trace],
            masks=masks,
            solver=solver,
            config=config,
            signal=signal,
        )
        trace.trainer = trainer
        with quiet_trainer():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Trainer leaves its autocast around forward; the proof must run at full precision.
        trainer.accelerator.unwrap_model(peft_model, keep_fp32_wrapper=False)
    left = solver.finish()
    residuals = lock.residuals if lock is not None and lock.residuals else left
    peft_model.eval()
    text_config(core.config).use_cache = True
    return PruneResult(
        model=None if sharded else export(peft_model, masks, arch_fallback=config.arch_fallback),
        masks=masks,
        shape=solver.shape(),
        trace=trace.rows,
        residuals=residuals,
        masked_model=peft_model,
        budget=budget,
        steps=steps,
    )


def _outside_language_model(model: PreTrainedModel, family: Family) -> str | None:
    """A pattern of a multimodal model's modules outside its language model, which text never
    reaches; None for a language model."""
    if text_config(model.config) is model.config:
        return None
    decoder = family.layers.rpartition(".")[0]
    return rf"(?!{re.escape(decoder)}\.).*"


def _progress_line(row: JsonObject) -> str:
    """Loss, R against R*, y, z, uniformity, tokens/s."""
    text = (
        f"loss {row['loss']:.3f} R {row['R']:.3f}>{row['R_star']:.3f} y {row['y']:.2f} "
        f"z {row['z']:.2f} spread {row['width_spread']:.1f} {row['tokens_per_s']:.0f} tok/s"
    )
    return text + " locked" if row["locked"] else text
