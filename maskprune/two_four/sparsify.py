"""Learning 2:4 masks on the Hugging Face Trainer: MaskLLM's loop, and the one-shot methods.

Legend: W weight - m soft mask of a step - kappa, tau scale and temperature - t step of T.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from maskprune.choices import TWO_FOUR_ONE_SHOT
from maskprune.config import SparsifyConfig
from maskprune.files import JsonObject
from maskprune.hf.equality import (
    Difference,
    difference_of,
    hidden_states_of,
    require_equal,
)
from maskprune.hf.families import text_config
from maskprune.hf.head import head_of, last_hidden_states
from maskprune.training.checkpoints import (
    open_run,
    require_checkpoint_space,
    temporary_folder,
)
from maskprune.training.data import block_order
from maskprune.training.distributed import as_forward, on_first, rank, world_size
from maskprune.training.documents import Source
from maskprune.training.losses import hidden_cross_entropy, hidden_kl
from maskprune.training.optimizer import adamw, require_optimizer
from maskprune.training.progress import note, reporting
from maskprune.training.sharding import (
    Sharder,
    device_of_run,
    has_states,
    load_trained,
    set_whole,
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
from maskprune.two_four.masks import TwoFourMasks, attach_two_four
from maskprune.two_four.one_shot import one_shot_masks
from maskprune.two_four.patterns import CANDIDATES, apply_masks, load_masks, oriented, prunable

LOGITS_FILE = "logits.safetensors"
# Rates that move a logit by 1.5 times the noise in one step (at kappa 100) broke short runs.
MAX_RATE = 5e-3
REGULARISER_WEIGHTS = {"relative": 1500.0, "sum": 1e-5}


@dataclass
class SparsifyResult:
    """What `sparsify` returns.

    Where no process holds all of the model (`--shard full`), it stays dense under its hard masks,
    only rank 0 has masks, and the difference is None.

    Attributes:
        model: the given model, masked-out weights set to +0.0.
        masks: (O, I) bool by name of the linear, True = kept.
        difference: of its logits from those under the learned masks; None for a one-shot method.
        trace: a row per logged step.
        steps: optimizer steps of the whole run; 0 for a one-shot method.
    """

    model: PreTrainedModel
    masks: dict[str, torch.Tensor]
    difference: Difference | None
    trace: list[JsonObject]
    steps: int


class SparsifyTrainer(BlockTrainer):
    """`Trainer` that learns the logits of 2:4 masks, and whose checkpoints hold no weights."""

    def __init__(self, *args: Any, masks: TwoFourMasks, config: SparsifyConfig, **kw: Any):
        super().__init__(*args, **kw)
        self.masks, self.config = masks, config
        self.dense_norm = masks.dense_norm()
        chosen = config.regulariser_weight
        self.reward = REGULARISER_WEIGHTS[config.regulariser] if chosen is None else chosen
        self.drawn = (-1, 0)
        self.head = head_of(self.core)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            rate = self.config.learning_rate or min(MAX_RATE, 1.0 / self.args.max_steps)
            self.optimizer = adamw(
                self.masks.parameters(),
                self.config.optimizer_bits,
                lr=rate,
                betas=(0.9, 0.95),
                eps=1e-5,
                weight_decay=self.config.weight_decay,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        if self.lr_scheduler is None:

            def cosine(step: int) -> float:
                return 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / num_training_steps))

            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), cosine)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> torch.Tensor | tuple[torch.Tensor, JsonObject]:
        config, t = self.config, self.state.global_step
        done = t / self.args.max_steps
        self.masks.schedule(
            config.kappa_start + done * (config.kappa_end - config.kappa_start),
            config.tau_start + done * (config.tau_end - config.tau_start),
        )
        micro = self.drawn[1] + 1 if self.drawn[0] == t else 0
        self.drawn = (t, micro)
        # One sample for all ranks: what the logits learn does not depend on how many there are.
        self.masks.draw(t * config.gradient_accumulation + micro)
        core = self.core

        def forward(ids: torch.Tensor) -> torch.Tensor:
            fit = self.fit(core, ids)
            total, squares = self.masks.kept_norms()
            kept = total / self.dense_norm
            reward = squares if config.regulariser == "sum" else kept
            self.last_loss = {"loss": fit.detach(), "kept_norm": kept.detach()}
            return fit - self.reward * (1 - done) * reward

        with self.computing():
            loss = as_forward(model, core, forward, inputs["input_ids"])
        return (loss, {}) if return_outputs else loss

    def fit(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The loss on the text: language model or KL; 0-dim float32."""
        if self.config.loss == "kl":
            training = model.training
            with torch.no_grad(), self.masks.seen_as("off"):
                teacher = last_hidden_states(model.eval(), ids)
            model.train(training)
            return hidden_kl(self.head, last_hidden_states(model, ids), teacher)
        hidden = last_hidden_states(model, ids)[:, :-1]
        return hidden_cross_entropy(self.head, hidden.flatten(0, 1), ids[:, 1:].flatten())

    def trace_row(self, optimizer: Optimizer) -> JsonObject:
        return self.masks.statistics() | {
            "kappa": float(self.masks.kappa),
            "tau": float(self.masks.tau),
            "lr": float(optimizer.param_groups[0]["lr"]),
        }

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        from safetensors.torch import save_file

        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        logits = self.masks.named_parameters()
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in logits.items()}, folder / LOGITS_FILE
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if has_states(folder):
            load_trained(folder, self.core)
        else:
            self._load_logits(folder / LOGITS_FILE)
        # The choice that the next row's `changed` compares with.
        self.masks.statistics()

    def _load_logits(self, path: Path) -> None:
        from safetensors import safe_open

        own = self.masks.named_parameters()
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if {name: tuple(p.shape) for name, p in own.items()} != stored:
                raise ValueError(
                    f"{path.parent} holds logits of another model; resume with the model that the "
                    "run began with"
                )
            for name, parameter in own.items():
                set_whole(parameter, file.get_tensor(name))


def sparsify(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Source | torch.Tensor | None,
    config: SparsifyConfig,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    device: torch.device | None = None,
) -> SparsifyResult:
    """Make every linear in a model's blocks 2:4 sparse: learn the masks, or choose them at once.

    The weights that stay are those of the model (with `update_weights`, adjusted); shapes do not
    change, so the result is a stock model with half of these weights at zero.

    Args:
        model: a transformers causal LM of a known family, without adapters; changed in place.
        tokenizer: its tokenizer; not used when `data` is token blocks already.
        data: a text source as `token_blocks` takes it, or (n, seq_len) int64 token blocks; not
            used by `magnitude`.
        config: the settings.
        run_dir: where checkpoints and the trace go; a temporary folder where None.
        resume: continue from the newest whole checkpoint in `run_dir`.
        quiet: show no progress.
        device: of a one-shot method: where it computes, a block at a time, while the model stays
            where it is; see `one_shot_masks`.

    Raises:
        ValueError: settings, masks or data that cannot work, before any training.
        FloatingPointError: the loss diverged; names the step. The checkpoints remain.

    Source: MaskLLM, arXiv 2409.17481, sections 3.2 and 3.3; the rates are those of its code.
    """
    core = cast(PreTrainedModel, model)
    join_run(config, core)
    quiet = quiet or rank() > 0
    magnitude = config.method == "magnitude"
    blocks = torch.empty(0, config.seq_len)
    if not magnitude:
        blocks = as_blocks(data, tokenizer, config, core)
    set_seed(config.seed)
    text = text_config(core.config)
    cached, text.use_cache = text.use_cache, False
    sample = blocks[: config.calibration_blocks]
    try:
        if config.method == "maskllm":
            return _learn(core, blocks, sample, config, run_dir, resume, quiet)
        update = config.update_weights
        masks = choose_masks(core, config.method, sample, update=update, quiet=quiet, device=device)
        apply_masks(core, masks)
        return SparsifyResult(core, masks, None, [], 0)
    finally:
        text.use_cache = cached


def _learn(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    sample: torch.Tensor,
    config: SparsifyConfig,
    run_dir: str | Path | None,
    resume: bool,
    quiet: bool,
) -> SparsifyResult:
    require_trainable_dtype(model)
    require_optimizer(config.optimizer_bits)
    sharded = shards(config, model.config)
    if sharded:
        require_even(model)
    device = device_of_run(model, sharded)
    proof = blocks[: min(4, len(blocks))].to(device)
    steps = total_steps(config, len(blocks), epochs=1.0)
    order = block_order(len(blocks), config.batch_size, steps, config.seed, seq_len=config.seq_len)
    with contextlib.ExitStack() as stack:
        if run_dir is None:
            run_dir = stack.enter_context(temporary_folder())
        run = Path(run_dir)
        checkpoint = on_first(lambda: open_run(run, resume))
        if checkpoint is None:
            weights = (m.get_parameter("weight") for m in prunable(model).values())
            trained = (torch.empty(len(CANDIDATES), w.numel() // 4, device="meta") for w in weights)
            require_checkpoint_space(run, trained)
        masks = attach_two_four(
            model,
            None if checkpoint else find_prior(model, sample, config, quiet, device),
            strength=config.prior_strength,
            std=config.logit_std,
            seed=config.seed,
            sharder=Sharder(device) if sharded else None,
        )
        if not sharded:
            stack.callback(masks.detach)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.loss == "kl" and (obstacle := head_of(model).obstacle):
            note(f"{obstacle}: the loss needs whole logits, and their memory", quiet)
        autocast = use_autocast(config, model, device)
        trace = TraceCallback(run / "trace.jsonl", config, quiet, _progress_line)
        trainer = SparsifyTrainer(
            model=model,
            args=training_arguments(config, run, steps, device, autocast, sharded),
            train_dataset=Blocks(blocks, order),
            callbacks=[trace],
            masks=masks,
            config=config,
        )
        trace.trainer = trainer
        with quiet_trainer():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # Trainer leaves its autocast around forward; the proof must run at full precision.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model.eval()
        chosen = masks.choice()
        if sharded:
            masks.mode = "hard"
            return SparsifyResult(model, chosen, None, trace.rows, steps)
        with masks.seen_as("hard"):
            masked = hidden_states_of(model, proof)
    apply_masks(model, chosen)
    head = head_of(model)
    difference = difference_of(masked, hidden_states_of(model, proof), head, head)
    require_equal(difference, model.dtype)
    return SparsifyResult(model, chosen, difference, trace.rows, steps)


def require_even(model: PreTrainedModel) -> None:
    """Refuse a weight whose outputs cannot be shared evenly among the processes of a sharded run.

    Raises:
        ValueError: names the first such weight.
    """
    for name, module in prunable(model).items():
        outputs = oriented(module).shape[0]
        if outputs % world_size():
            raise ValueError(
                f"--shard full cuts the logits of 2:4 masks along a weight's outputs, and {name} "
                f"has {outputs}, which {world_size()} processes do not divide; use another number "
                "of processes, or --shard none"
            )


def find_prior(
    model: PreTrainedModel,
    blocks: torch.Tensor,
    config: SparsifyConfig,
    quiet: bool = True,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor] | None:
    """The prior masks that the settings name, chosen on `blocks` or read; None for `none`.

    A model that waits elsewhere than on `device` goes there a block at a time.
    """
    if config.prior == "none":
        return None
    if config.prior in TWO_FOUR_ONE_SHOT:
        waits = device is not None and device != next(model.parameters()).device
        on = device if waits else None
        return choose_masks(model, config.prior, blocks, quiet=quiet, device=on)
    masks, _ = load_masks(config.prior)
    return masks


def choose_masks(
    model: PreTrainedModel,
    method: str,
    blocks: torch.Tensor,
    *,
    update: bool = False,
    quiet: bool = False,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """`one_shot_masks` with its progress shown, a block of the model at a time."""
    if method == "magnitude":
        note("choosing 2:4 masks by magnitude", quiet)
        return one_shot_masks(model, method)
    with reporting(f"choosing 2:4 masks by {method}", blocks.numel(), quiet, "block") as progress:
        options: Any = {"update": update, "progress": progress, "device": device}
        return one_shot_masks(model, method, blocks, **options)


def _progress_line(row: JsonObject) -> str:
    """Loss on the text, kept norm, mean probability of the choice, share that changed, tokens/s."""
    return (
        f"loss {row['loss']:.3f} kept {row['kept_norm']:.3f} max p {row['max_prob']:.3f} "
        f"changed {row['changed']:.4f} {row['tokens_per_s']:.0f} tok/s"
    )
