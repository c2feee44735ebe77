"""What the training loops share: token blocks on the Hugging Face Trainer, and its arguments."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from maskprune.choices import LEAST_STEPS
from maskprune.config import RunConfig
from maskprune.files import JsonObject
from maskprune.hf.families import text_config
from maskprune.hf.quiet import quiet_transformers
from maskprune.hf.shape import require_positions
from maskprune.training.checkpoints import mark_complete, remove_old
from maskprune.training.data import token_blocks
from maskprune.training.distributed import (
    barrier,
    mean,
    on_first,
    require_same_weights,
    start,
    world_size,
)
from maskprune.training.documents import Source
from maskprune.training.interrupt import StopCallback, training_loop
from maskprune.training.sharding import (
    has_states,
    is_sharded,
    load_moments,
    save_states,
    spread_moments,
)
from maskprune.training.speed import bfloat16_is_faster

# What DDP reads on a model: names of the parameters that are none of its business.
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks in the order in which the steps read them."""

    def __init__(self, blocks: torch.Tensor, order: torch.Tensor) -> None:
        self.blocks, self.order = blocks, order.flatten()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[self.order[index]]}


class BlockTrainer(Trainer):
    """`Trainer` over `Blocks` in their order, that stops at a loss which is not finite."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        assert isinstance(self.model, nn.Module)
        self.core: nn.Module = self.model
        self.sharded = is_sharded(self.core)
        self.model_accepts_loss_kwargs = False
        self.last_loss: dict[str, torch.Tensor] = {}
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(StopCallback())

    def train(self, *args: Any, **kw: Any) -> TrainOutput:
        """`Trainer.train`; a signal ends it after a checkpoint.

        Raises:
            Interrupted: a signal came, see `stop_on_signals`.
        """
        # DDP would send what is frozen, which is the same on all processes, in copies.
        frozen = {name for name, p in self.core.named_parameters() if not p.requires_grad}
        vars(self.core)[_NOT_SENT] = frozen
        try:
            with training_loop():
                return super().train(*args, **kw)
        finally:
            del vars(self.core)[_NOT_SENT]

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        assert isinstance(self.train_dataset, Blocks)
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.require_finite()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.sharded:
            self._save_sharded(folder)
        else:
            super()._save_checkpoint(model, trial)
        barrier()
        if self.is_world_process_zero():
            self.save_whole(folder)
            mark_complete(folder)

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """The run's autocast for a whole loss; Trainer's own ends with the model's forward."""
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def trace_row(self, optimizer: Optimizer) -> JsonObject:
        """What the trace says of the run beside `last_loss`."""
        return {}

    def save_whole(self, folder: Path) -> None:
        """On rank 0, write what a checkpoint of either format holds beside weights and moments."""

    def _save_sharded(self, folder: Path) -> None:
        on_first(lambda: folder.mkdir(exist_ok=True))
        self._save_rng_state(str(folder))
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        save_states(folder, self.core, self.optimizer.optimizer)
        if self.is_world_process_zero():
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))
            remove_old(folder.parent, self.args.save_total_limit)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.sharded or has_states(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        assert isinstance(self.optimizer, AcceleratedOptimizer) and self.lr_scheduler is not None
        optimizer = self.optimizer.optimizer
        if has_states(folder):
            load_moments(folder, self.core, optimizer)
        else:
            saved = torch.load(folder / "optimizer.pt", mmap=True, weights_only=True)
            optimizer.load_state_dict(spread_moments(saved, optimizer))
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def require_finite(self) -> None:
        """Raise on a NaN or infinite loss of any rank; synchronises with all and the device.

        Leaves in `last_loss` the means over the ranks.
        """
        if self.last_loss:
            means = mean(torch.stack([value.float() for value in self.last_loss.values()]))
            self.last_loss = dict(zip(self.last_loss, means, strict=True))
        if self.last_loss and not torch.isfinite(self.last_loss["loss"]):
            raise FloatingPointError(
                f"the loss is {self.last_loss['loss'].item()} at step {self.state.global_step}; "
                "start again with a lower --learning-rate, for --resume would only meet it again"
            )


def as_blocks(
    data: Source | torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    model: PreTrainedModel,
) -> torch.Tensor:
    """(n, seq_len) int64 token blocks: `data` itself, or made of a text source by the settings.

    Raises:
        ValueError: the model has no such positions or tokens; or see `token_blocks`.
    """
    require_positions(model.config, config.seq_len)
    if isinstance(data, torch.Tensor):
        blocks = data
    elif data is None or tokenizer is None:
        raise ValueError(
            "there is no text, or no tokenizer for it; give both, or (n, seq_len) token blocks"
        )
    else:
        blocks = on_first(
            lambda: token_blocks(
                data, tokenizer, config.seq_len, num_tokens=config.max_tokens, seed=config.seed
            )
        )
    require_known_tokens(model, blocks)
    return blocks


def require_known_tokens(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        ValueError: the tokenizer is another model's.
    """
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if ids.numel() and int(ids.max()) >= rows:
        raise ValueError(
            f"the text has token {int(ids.max())} and the model embeds {rows} tokens; the "
            "tokenizer is of another model: copy the files of its own"
        )


def require_trainable_dtype(model: PreTrainedModel) -> None:
    """Refuse float16, below whose smallest number most gradients of activations lie.

    Raises:
        ValueError: the model is in float16.
    """
    # Of the distillation loss's gradient 94 % of the entries became 0.
    if model.dtype == torch.float16:
        raise ValueError(
            "the model is in float16, whose range most gradients fall below; train in bfloat16, "
            "which takes the same memory, or float32, which keeps the weights exactly: --dtype "
            "bfloat16 or float32, or model.to(torch.bfloat16)"
        )


def total_steps(config: RunConfig, n_blocks: int, epochs: float = 7.0) -> int:
    """Optimizer steps of a run on `n_blocks` blocks: the settings' `steps`, `epochs`, or these."""
    if config.steps is not None:
        return int(config.steps)
    epochs = config.epochs or epochs
    steps = int(epochs * n_blocks / config.batch_size)
    if steps < LEAST_STEPS:
        raise ValueError(
            f"{epochs} epochs of {n_blocks} blocks are {steps} steps of {config.batch_size}; the "
            f"schedule needs at least {LEAST_STEPS}: give more data or --steps"
        )
    return steps


def checkpoint_activations(model: PreTrainedModel) -> None:
    # transformers renamed it within version 5.
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def keep_activations(model: PreTrainedModel) -> None:
    """Undo `checkpoint_activations`."""
    new, old = "activation_checkpointing_disable", "gradient_checkpointing_disable"
    getattr(model, new if hasattr(model, new) else old)()


def use_autocast(config: RunConfig, model: PreTrainedModel, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as asked, else where it is faster on this machine."""
    if config.autocast != "auto":
        return config.autocast == "bfloat16"
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    # Measured once: ranks that measured for themselves could differ.
    return on_first(
        lambda: bfloat16_is_faster(text_config(model.config).hidden_size, config.seq_len)
    )


def join_run(config: RunConfig, model: nn.Module) -> None:
    """Join the process group of a run that torchrun started; nothing for a single process.

    Raises:
        ValueError: a micro-batch that does not divide over the processes, or models that differ.
    """
    micro, world = config.batch_size // config.gradient_accumulation, world_size()
    if micro % world:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.gradient_accumulation} micro-batches is "
            f"{micro} sequences each, which {world} processes do not divide; choose a batch_size "
            f"that is a multiple of {config.gradient_accumulation * world}"
        )
    start(next(model.parameters()).device.type)
    require_same_weights(model)


def training_arguments(
    config: RunConfig,
    run: Path,
    steps: int,
    device: torch.device,
    autocast: bool,
    sharded: bool = False,
) -> TrainingArguments:
    micro = config.batch_size // config.gradient_accumulation
    # Else each process would hold the gradient of the whole model until the last micro-batch.
    accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=micro // world_size(),
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=0.0,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        # Trainer knows no other checkpoint of a sharded model; `BlockTrainer` writes its own.
        save_only_model=sharded,
        accelerator_config=accumulation if sharded else None,
        logging_strategy="no",
        report_to=[],
        log_level_replica="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=False,
        ddp_backend="gloo" if device.type == "cpu" and world_size() > 1 else None,
        ddp_find_unused_parameters=False,
    )
    # A process that sees several GPUs would be given DataParallel, whose copies have no masks.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextlib.contextmanager
def quiet_trainer() -> Iterator[None]:
    """Trainer's own notes and bars of checkpoints would tear the progress bar."""
    noisy = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    before = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with quiet_transformers():
            yield
    finally:
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)
