"""Pruning with the Hugging Face Trainer; a run resumes from its checkpoints bit for bit."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from maskprune.config import PruneConfig
from maskprune.files import JsonObject
from maskprune.hf.adapters import adapted_layers, require_mergeable
from maskprune.hf.equality import Difference
from maskprune.hf.families import Family, family_of, output_names, require_causal_lm, text_config
from maskprune.hf.head import head_of
from maskprune.hf.quiet import quiet_transformers
from maskprune.hf.shape import Shape, require_ranks
from maskprune.structured.budget import Budget
from maskprune.structured.callbacks import (
    KeptUnitsCallback,
    LockCallback,
    PruneCallback,
    SignalCallback,
)
from maskprune.structured.compensation import compensate, shared_grams
from maskprune.structured.distill import teacher_mode
from maskprune.structured.export import export
from maskprune.structured.masks import Masks, attach_masks, load_masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.refine import refine
from maskprune.structured.saliency import Grams, one_shot, warm_start
from maskprune.structured.signal import MaskSignal
from maskprune.structured.student import (
    cut_student,
    finished,
    load_proof,
    prove_cut,
    save_proof,
    trained,
)
from maskprune.structured.trainer import PruneTrainer, load_masks_and_solver, settles
from maskprune.training.checkpoints import (
    open_run,
    require_checkpoint_space,
    temporary_folder,
)
from maskprune.training.data import block_order
from maskprune.training.distributed import on_first, rank
from maskprune.training.documents import Source
from maskprune.training.optimizer import require_optimizer
from maskprune.training.progress import note, reporting
from maskprune.training.self_text import amounts, load, mixed, save, write_blocks
from maskprune.training.sharding import (
    device_of_run,
    shard_blocks,
    shards,
)
from maskprune.training.trace import TraceCallback
from maskprune.training.trainer import (
    Blocks,
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
        masked_model: the PEFT model under its masks, for the proof; where weights are trained, as
            it was when `model` was cut from it, or in a resumed run without the compensation.
        budget: the budget that the shape meets.
        steps: optimizer steps of the whole run.
        difference: where weights are trained, of `model`'s logits from the masked model's when it
            was cut; else None, to be measured now.
    """

    model: Any
    masks: Masks
    shape: Shape
    trace: list[JsonObject]
    residuals: dict[str, float]
    masked_model: Any
    budget: Budget
    steps: int
    difference: Difference | None = None


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
        callbacks: further Trainer callbacks, called after the method's own. While a one-shot
            choice is trained, the FFN's frozen weights stand in another order, units that stay
            first, so do not save them there.

    Returns:
        PruneResult; its model's layers are uniform and meet the budget.

    Raises:
        ValueError: settings or data that cannot work, before any training.
        FloatingPointError: the loss diverged; names the step, or the block that was refined. The
            checkpoints remain.

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
    if config.self_text and tokenizer is None:
        raise ValueError(
            f"self_text is {config.self_text}, and there is no tokenizer to say how texts begin; "
            "give one"
        )
    blocks = as_blocks(data, tokenizer, config, core)
    # How many of the blocks the compensation reads, and after it the refinement.
    calibration = -(-(config.compensation_tokens or 32 * budget.shape.ffn) // blocks.shape[1])
    n_written = spared = 0
    if config.self_text:
        first = max(config.warm_start_blocks, calibration if config.compensate else 0)
        taken, n_written, spared = amounts(len(blocks), first, config)
        blocks = blocks[:taken]
    n_blocks = len(blocks) + n_written
    steps = total_steps(config, n_blocks)
    require_reachable(budget, steps, config)
    order = spared + block_order(
        n_blocks - spared, config.batch_size, steps, config.seed, seq_len=config.seq_len
    )

    set_seed(config.seed)
    device = device_of_run(core, sharded)
    text_config(core.config).use_cache = False
    targets = [name.strip() for name in config.lora_targets.split(",")]
    family = family_of(core.config)
    pruned_outputs = output_names(family)[0 if family.prunes_heads else 1 :]
    if config.train == "weights":
        # The compensation alone takes adapters.
        targets = list(pruned_outputs)
    outputs = {
        name: config.output_r
        for name in pruned_outputs
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
    if config.gradient_checkpointing and config.train == "adapters":
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
        if checkpoint is None and config.train == "adapters":
            require_checkpoint_space(run, trained(core))
        if n_written:
            assert tokenizer is not None
            shape = (n_written, blocks.shape[1])
            written = load(run, shape) if checkpoint is not None else None
            if written is None:
                what = "writing text of its own"
                with (
                    teacher_mode(peft_model, masks),
                    reporting(what, n_written * shape[1], quiet, unit="position") as progress,
                ):
                    written = write_blocks(
                        core, tokenizer, *shape, seed=config.seed, progress=progress
                    )
                if rank() == 0:
                    save(run, written)
            blocks = mixed(blocks, written, config.seed)
        sample = blocks[: config.warm_start_blocks].to(device)

        def computing() -> torch.autocast:
            return torch.autocast(device.type, torch.bfloat16, enabled=autocast)

        def compensation(summed: Grams | None = None) -> list[nn.Parameter]:
            nonlocal calibration
            read = len(sample) if summed else 0
            calibration = max(read, calibration)
            fitted = blocks[read:calibration].to(device)
            what = "compensating for the pruned units"
            with (
                trace.outside_steps(),
                computing(),
                reporting(what, sample[:read].numel() + fitted.numel(), quiet) as progress,
            ):
                return compensate(peft_model, masks, solver.kept(), fitted, progress, summed=summed)

        def refinement(student: nn.Module) -> None:
            read = blocks[:calibration].to(device)
            what = f"refining each block, {config.refine_passes} times"
            with (
                trace.outside_steps(),
                computing(),
                reporting(what, read.numel(), quiet, unit="block") as progress,
            ):
                losses = refine(
                    student,
                    peft_model,
                    lambda: teacher_mode(peft_model, masks),
                    read,
                    passes=config.refine_passes,
                    learning_rate=config.rate(text_config(core.config).hidden_size),
                    batch_size=config.batch_size,
                    gradient_accumulation=config.gradient_accumulation,
                    seed=config.seed,
                    progress=progress,
                )
            # A block that adds next to nothing is far from it in these units.
            first, last = (median(each) for each in zip(*losses, strict=True))
            note(
                f"blocks' distance from the dense ones {first:.4f} in the first pass, {last:.4f} "
                "at the end (the median; 1 is as much as the dense block adds)",
                quiet,
            )

        def start_anew() -> list[nn.Parameter]:
            changed = compensation()
            if config.refine_passes:
                refinement(peft_model)
                changed = list(trained(core))
            return changed

        trace = TraceCallback(run / "trace.jsonl", config, quiet, _progress_line)
        own: list[TrainerCallback] = [PruneCallback(solver, config.max_grad_norm)]
        if checkpoint is None:
            ranking = config.warm_start if learned else config.chooser
            # What the ranking reads is read once: its pass sums what the compensation needs too.
            grams = shared_grams(masks) if config.compensate and not learned else None
            if config.method == "auto" and not learned:
                note(AT_ONCE, quiet)
            if ranking != "none":
                what = f"ranking the units by {ranking}"
                with computing(), reporting(what, sample.numel(), quiet) as progress:
                    ranked = (ranking, peft_model, masks, budget, sample, progress)
                    if learned:
                        warm_start(*ranked)
                    else:
                        solver.lock(one_shot(*ranked, grams=grams))
            if config.compensate and solver.locked:
                compensation(grams)
        signal = None
        if learned:
            signal = MaskSignal(masks, on_first(lambda: first_masks(run, masks)))
            own.append(SignalCallback(signal))
        if settles(config):
            own.append(LockCallback(solver, start_anew))
        trainee: nn.Module = peft_model
        student = difference = None
        if config.train == "weights":
            if checkpoint is not None:
                load_masks_and_solver(checkpoint, masks, solver)
            student, dtypes = cut_student(peft_model, masks, config.arch_fallback)
            if checkpoint is None:
                require_checkpoint_space(run, trained(student))
                difference = prove_cut(peft_model, student, blocks[:4].to(device), core.dtype)
                save_proof(difference, run)
                if config.refine_passes:
                    refinement(student)
            else:
                difference = load_proof(run)
            if config.gradient_checkpointing:
                checkpoint_activations(student)
            trainee = student
        elif config.refine_passes and not learned and checkpoint is None:
            refinement(peft_model)
        if config.train == "adapters" and not learned and not sharded:
            kept_units = KeptUnitsCallback(peft_model, masks)
            own.append(kept_units)
            stack.callback(lambda: kept_units.put_back())
        trainer = PruneTrainer(
            model=trainee,
            args=training_arguments(config, run, steps, device, autocast, sharded),
            train_dataset=Blocks(blocks, order),
            callbacks=[*own, *callbacks, trace],
            masks=masks,
            solver=solver,
            config=config,
            signal=signal,
            teacher=None if student is None else peft_model,
        )
        trace.trainer = trainer
        with quiet_trainer():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Trainer leaves its autocast around forward; the proof must run at full precision.
        trainer.accelerator.unwrap_model(trainee, keep_fp32_wrapper=False)
    residuals = solver.finish()
    peft_model.eval()
    text_config(core.config).use_cache = True
    if student is not None:
        pruned: PreTrainedModel | None = finished(student, dtypes)
    elif sharded:
        pruned = None
    else:
        pruned = export(peft_model, masks, arch_fallback=config.arch_fallback)
    return PruneResult(
        model=pruned,
        masks=masks,
        shape=solver.shape(),
        trace=trace.rows,
        residuals=residuals,
        masked_model=peft_model,
        budget=budget,
        steps=steps,
        difference=difference,
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
