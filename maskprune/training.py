"""The loop: Algorithm 1 on the Hugging Face Trainer, with checkpoints that resume to the bit."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from maskprune.budget import Budget
from maskprune.callbacks import CompensationCallback, PruneCallback, TraceCallback
from maskprune.checkpoints import latest, load_solver, mark_complete, save_solver
from maskprune.compensation import compensate
from maskprune.config import PruneConfig
from maskprune.cuts import Shape
from maskprune.data import block_order, token_blocks
from maskprune.distill import distill
from maskprune.exporter import export
from maskprune.families import family_of, output_names
from maskprune.masks import Masks, attach_masks
from maskprune.minimax import Minimax
from maskprune.progress import note
from maskprune.speed import bfloat16_is_faster
from maskprune.warmstart import one_shot, warm_start

logger = logging.getLogger(__name__)


@dataclass
class PruneResult:
    """What `prune` gives back.

    model: the stock pruned model. masks: attached to `masked_model`, pruned units exactly 0.
    shape: the uniform shape. trace: a row per logged step. residuals: largest pruned mask before
    it was set to 0, per kind. masked_model: the PEFT model under its masks, for the proof.
    """

    model: Any
    masks: Masks
    shape: Shape
    trace: list[dict[str, Any]]
    residuals: dict[str, float]
    masked_model: Any
    budget: Budget
    steps: int


class _Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks in the order in which the steps read them."""

    def __init__(self, blocks: torch.Tensor, order: torch.Tensor) -> None:
        self.blocks, self.order = blocks, order.flatten()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[self.order[index]]}


class PruneTrainer(Trainer):
    """`Trainer` with the distillation loss, two parameter groups and whole checkpoints.

    Use `PruneCallback` with it, or with a `Trainer` of your own, for the proximal step.
    """

    def __init__(self, *args: Any, masks: Masks, solver: Minimax, config: PruneConfig, **kw: Any):
        super().__init__(*args, **kw)
        self.masks, self.solver, self.config = masks, solver, config
        self.model_accepts_loss_kwargs = False
        self.last_loss: dict[str, torch.Tensor] = {}

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            trained: Any = self.model
            mask_ids = {id(p) for p in self.masks.parameters()}
            weights = [p for p in trained.parameters() if p.requires_grad and id(p) not in mask_ids]
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": weights, "lr": self.config.learning_rate, "weight_decay": 0.0},
                    {
                        "params": list(self.masks.parameters()),
                        "lr": self.config.mask_lr,
                        "weight_decay": 0.0,
                    },
                ]
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            T, warmup = num_training_steps, max(1, round(self.config.warmup * num_training_steps))

            def weights(step: int) -> float:
                return min(1.0, (step + 1) / warmup) * (1 - step / T)

            ramp = self.solver.rates.reach

            # At full rate while the solver chooses; then the kept masks only settle.
            def masks(step: int) -> float:
                return min(1.0, (1 - step / T) / (1 - ramp))

            target: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, [weights, masks])
        return self.lr_scheduler

    def _get_train_sampler(self, *_: Any) -> Any:
        blocks: Any = self.train_dataset
        return SequentialSampler(blocks)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = distill(
            self.accelerator.unwrap_model(model) if self.config.alpha else model,
            self.masks,
            inputs["input_ids"],
            alpha=self.config.alpha,
            kl_direction=self.config.kl_direction,
        )
        self.last_loss = {
            "loss": loss.total.detach(),
            "kl": loss.kl.detach(),
            "layer": loss.layer.detach(),
        }
        return (loss.total, {}) if return_outputs else loss.total

    def require_finite(self) -> None:
        """Raise on a NaN or infinite loss; synchronises with the device."""
        if self.last_loss and not torch.isfinite(self.last_loss["loss"]):
            raise FloatingPointError(
                f"the loss is {self.last_loss['loss'].item()} at step {self.state.global_step};"
                " the last good checkpoint is kept: go on from it with --resume and a lower "
                "--learning-rate"
            )
        self.solver.require_healthy()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            save_solver(folder, dict(self.masks.named_parameters()), self.solver.state_dict())
            mark_complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        values, state = load_solver(Path(resume_from_checkpoint))
        for name, parameter in self.masks.named_parameters():
            parameter.data.copy_(values[name])
        self.solver.load_state_dict(state)


def total_steps(config: PruneConfig, n_blocks: int) -> int:
    """Optimizer steps of a run on `n_blocks` blocks: `steps`, else `epochs`, else 7 epochs."""
    if config.steps is not None:
        return config.steps
    steps = int((config.epochs or 7.0) * n_blocks / config.batch_size)
    if steps < 20:
        raise ValueError(
            f"{config.epochs or 7.0} epochs of {n_blocks} blocks are {steps} steps of "
            f"{config.batch_size}; the schedule needs at least 20: give more data or --steps"
        )
    return steps


def prune(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    config: PruneConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> PruneResult:
    """Prune a model with MaskPrune: learn the masks under the budget, give back a stock model.

    Args:
        model: a transformers causal LM of a known family. It ends with adapters and masks on it;
            reload it where the original is needed.
        tokenizer: its tokenizer; not used when `data` is token blocks already.
        data: a text source as `token_blocks` takes it, or (n, seq_len) int64 token blocks.
        config: the settings.
        run_dir: where checkpoints and the trace go; a temporary folder where None.
        resume: continue from the newest whole checkpoint in `run_dir`.
        quiet: show no progress.

    Returns:
        PruneResult; its model's layers are uniform and meet the budget.

    Raises:
        ValueError: settings or data that cannot work, said before any training.
        FloatingPointError: the loss diverged; says at which step, checkpoints stay.

    Source: MaskPrune (arXiv 2502.14008), Algorithm 1 and section 3.3.
    """
    from peft import LoraConfig, get_peft_model

    core: Any = model
    budget = Budget(
        core,
        config.sparsity,
        head_unit=config.head_unit,
        multiple_of=config.multiple_of,
        head_sparsity=config.head_sparsity,
        ffn_sparsity=config.ffn_sparsity,
        arch_fallback=config.arch_fallback,
    )
    blocks = (
        data
        if isinstance(data, torch.Tensor)
        else token_blocks(
            data, tokenizer, config.seq_len, num_tokens=config.max_tokens, seed=config.seed
        )
    )
    steps = total_steps(config, len(blocks))
    order = block_order(len(blocks), config.batch_size, steps, config.seed, seq_len=config.seq_len)

    set_seed(config.seed)
    device = next(core.parameters()).device
    core.config.use_cache = False
    targets = [name.strip() for name in config.lora_targets.split(",")]
    family = family_of(core.config)
    outputs = {
        name: config.output_r
        for name in output_names(family)[0 if family.prunes_heads else 1 :]
        if targets == ["all-linear"]
        or any(name.endswith(t) or t.endswith(f".{name}") for t in targets)
    }
    peft_model: Any = get_peft_model(
        core,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            rank_pattern=outputs,
            alpha_pattern=outputs,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
        ),
    )
    if config.gradient_checkpointing:
        _checkpoint_activations(core)
    masks = attach_masks(peft_model, config.head_unit)
    reach = config.reach or (0.6 if config.warm_start == "none" else 0.1)
    solver = Minimax(
        masks,
        budget,
        steps,
        mode=config.mode,
        reach=reach,
        eta1=config.eta1,
        interval=config.interval,
    )
    autocast = _autocast(config, core, device)

    with contextlib.ExitStack() as stack:
        if run_dir is None:
            run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskprune-"))
        run = Path(run_dir)
        run.mkdir(parents=True, exist_ok=True)
        checkpoint = latest(run) if resume else None
        learned = config.method == "maskprune"
        masks.requires_grad_(learned)
        sample = blocks[: config.warm_start_blocks].to(device)

        def computing() -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=autocast)

        def compensation() -> list[nn.Parameter]:
            tokens = config.compensation_tokens or 32 * masks.shape.ffn
            fitted = blocks[: -(-tokens // blocks.shape[1])].to(device)
            note(f"compensating for the pruned units on {fitted.numel():,} tokens", quiet)
            with computing():
                return compensate(peft_model, masks, solver.kept(), fitted)

        callbacks: list[TrainerCallback] = [PruneCallback(solver, config.max_grad_norm)]
        if checkpoint is None:
            ranking = config.warm_start if learned else config.method
            if ranking != "none":
                note(f"ranking the units by {ranking} on {sample.numel():,} tokens", quiet)
            with computing():
                if learned:
                    warm_start(config.warm_start, peft_model, masks, budget, sample)
                else:
                    solver.lock(one_shot(config.method, peft_model, masks, budget, sample))
            if config.compensate and solver.locked:
                compensation()
        if config.compensate and learned:
            callbacks.append(CompensationCallback(solver, compensation))
        trace = TraceCallback(run / "trace.jsonl", config, quiet)
        trainer = PruneTrainer(
            model=peft_model,
            args=_arguments(config, run, steps, device, autocast),
            train_dataset=_Blocks(blocks, order),
            callbacks=[*callbacks, trace],
            masks=masks,
            solver=solver,
            config=config,
        )
        trace.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        with _quiet_trainer():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Trainer leaves its autocast around forward; the proof must run at full precision.
        trainer.accelerator.unwrap_model(peft_model, keep_fp32_wrapper=False)
    residuals = solver.finish()
    peft_model.eval()
    core.config.use_cache = True
    return PruneResult(
        model=export(peft_model, masks, arch_fallback=config.arch_fallback),
        masks=masks,
        shape=solver.shape(),
        trace=trace.rows,
        residuals=residuals,
        masked_model=peft_model,
        budget=budget,
        steps=steps,
    )


def _checkpoint_activations(model: Any) -> None:
    # transformers renamed it within version 5.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def _autocast(config: PruneConfig, model: Any, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as asked, else where it is faster on this machine."""
    if config.autocast != "auto":
        return config.autocast == "bfloat16"
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return bfloat16_is_faster(model.config.hidden_size, config.seq_len)


def _arguments(
    config: PruneConfig, run: Path, steps: int, device: torch.device, autocast: bool
) -> TrainingArguments:
    micro = config.batch_size // config.gradient_accumulation
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if micro % world:
        raise ValueError(f"batch_size {micro} per micro-batch does not divide over {world} devices")
    return TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=micro // world,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=0.0,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=False,
    )


@contextlib.contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Trainer's own notes about checkpoints would tear the progress bar."""
    noisy = logging.getLogger("transformers.trainer")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(before)
