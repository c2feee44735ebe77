"""The settings of each command: flat dataclasses that flags, YAML files and Python share.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TypeVar

from maskprune.choices import (
    KL_DIRECTIONS,
    LEAST_STEPS,
    MASK_RATES,
    MODES,
    ONE_SHOT,
    TRAINED,
    TWO_FOUR_ONE_SHOT,
    WARM_STARTS,
    require_choices,
    require_least,
    require_positive,
    require_reach,
)

T = TypeVar("T")


def _setting(default: T, text: str) -> T:
    return field(default=default, metadata={"help": text})


def _require_whole_micro_batches(config: RunConfig | PlanConfig) -> None:
    if config.batch_size % config.gradient_accumulation:
        raise ValueError(
            f"gradient_accumulation {config.gradient_accumulation} does not divide batch_size "
            f"{config.batch_size}"
        )


@dataclass(frozen=True)
class BudgetConfig:
    """The shape that is asked for; `Budget` checks the values."""

    sparsity: float | None = _setting(
        None, "Share of the attention and FFN weights to remove, like 0.2."
    )
    head_sparsity: float | None = _setting(
        None, "With --ffn-sparsity, fixes the split by hand: share of head units to remove."
    )
    ffn_sparsity: float | None = _setting(None, "Share of the FFN units to remove, by hand.")
    head_unit: str = _setting(
        "kv_group", "kv_group (a KV head with its query heads) or query_head (of every group)."
    )
    multiple_of: int | None = _setting(
        None, "FFN widths are multiples of it; 256, 64 below 4096, 8 below 512."
    )
    arch_fallback: str = _setting(
        "mistral", "mistral: the class that most engines run; divisor, error: the original's."
    )
    targets: str | None = _setting(
        None, "Of vllm,llama.cpp,openvino,ct2,ort,mlx,sglang,awq128,fp8,tp=4."
    )


@dataclass(frozen=True)
class RunConfig:
    """How long a run trains, on what, where, and how often it saves."""

    steps: int | None = _setting(None, "Optimizer steps; or give --epochs.")
    epochs: float | None = _setting(
        None, "Passes over the data; where neither is given 7 to prune, 1 to learn 2:4 masks."
    )
    batch_size: int = _setting(16, "Sequences per step, over all devices.")
    gradient_accumulation: int = _setting(1, "Micro-batches per step, each batch_size / this.")
    seq_len: int = _setting(512, "Tokens per sequence.")
    max_tokens: int | None = _setting(10_240_000, "Read at most this many tokens of the data.")
    gradient_checkpointing: bool = _setting(False, "Trade time for memory.")
    dtype: str = _setting(
        "auto", "auto (float32 weights on CPU, as stored on GPU), float32, bfloat16 or float16."
    )
    autocast: str = _setting(
        "auto", "Compute type: auto (bfloat16 where measured faster), bfloat16 or none."
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.")
    shard: str = _setting(
        "auto",
        "Under torchrun: none, every process holds the whole model; full, each its part of the "
        "blocks (FSDP2); auto, full where the plan says that a GPU cannot hold the whole model.",
    )
    optimizer_bits: int = _setting(32, "Bits of AdamW's two moments: 32, or 8 with torchao.")
    seed: int = _setting(
        0, "Of the data order and all that is random; CPU runs repeat bit for bit."
    )
    save_steps: int = _setting(100, "Steps between checkpoints: the most that a killed run loses.")
    logging_steps: int = _setting(10, "Steps between rows of the trace.")

    def __post_init__(self) -> None:
        require_choices(self, autocast=("auto", "bfloat16", "none"), shard=("auto", "none", "full"))
        require_least(
            self,
            steps=LEAST_STEPS,
            batch_size=1,
            gradient_accumulation=1,
            seq_len=8,
            max_tokens=1,
            seed=0,
            save_steps=1,
            logging_steps=1,
        )
        require_positive(self, "epochs")
        if self.optimizer_bits not in (8, 32):
            raise ValueError(f"optimizer_bits is {self.optimizer_bits}; expected 8 or 32")
        _require_whole_micro_batches(self)


# Settings of adapters alone.
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_targets")
ADAPTER_RATE = 1e-3
# Times the hidden size.
WEIGHT_RATE = 0.15

# Settings of learned masks: giving one of them selects `maskprune` under `--method auto`.
OF_MASKS = ("mode", "warm_start", "reach", "eta1", "interval", "mask_lr", "mask_optimizer")


@dataclass(frozen=True)
class PruneConfig(RunConfig, BudgetConfig):
    """How to prune; the defaults need no tuning from 100 to 10,000 steps."""

    method: str = _setting(
        "auto",
        "maskprune learns the masks; taylor, wanda-sp and random choose at once, then train the"
        " rest. auto is taylor, the best measured, or maskprune where a setting of masks is given.",
    )
    mode: str = _setting(
        "minimax", "minimax learns the split; scheduled prunes heads and FFN in equal fractions."
    )
    warm_start: str = _setting(
        "taylor", "Ranking that the masks start from: none (the paper), wanda-sp or taylor."
    )
    warm_start_blocks: int = _setting(32, "Blocks of seq_len tokens that the ranking reads.")
    reach: float | None = _setting(
        None,
        "Share of the steps after which the budget is reached; 0.1, or 0.6 without warm start.",
    )
    eta1: float | None = _setting(None, "Decay rate of pruned masks at the first step.")
    interval: int | None = _setting(
        None, "Steps between two prox calls on FFN masks, falling to 1; 10 from 2000 steps on."
    )
    train: str = _setting(
        "adapters",
        "What a model whose units went at once is trained by: adapters, merged at the end; or"
        " weights, all of its blocks, cut before: takes the memory of full fine-tuning.",
    )
    learning_rate: float | None = _setting(
        None,
        "Learning rate, 1e-3 for adapters, for weights 0.15 over the hidden size; falls linearly"
        " to 0.",
    )
    warmup: float = _setting(0.03, "Share of the steps over which the learning rate rises.")
    mask_optimizer: str = _setting(
        "auto",
        "adam, the paper's, moves each mask by up to the rate, whatever its gradient; adam-mini in"
        " proportion to the gradients. auto is adam-mini for masks that start at 1 without a rate"
        " given, else adam.",
    )
    mask_lr: float | None = _setting(
        None,
        "Learning rate of the masks, 2e-3 with adam (the paper: 1e-2), 0.2 with adam-mini; falls"
        " linearly to 0 once the budget is reached.",
    )
    lora_r: int = _setting(8, "Rank of the adapters.")
    output_r: int = _setting(
        128, "Rank of the adapters of W_O and W_down where their inputs are pruned; scale 1."
    )
    compensate: bool = _setting(
        True, "Start those adapters at the least-squares compensation once the shape is final."
    )
    compensation_tokens: int | None = _setting(
        None, "Tokens that the compensation is fitted to; 32 per FFN unit of a layer by default."
    )
    lora_alpha: int = _setting(8, "Scale of the adapters is lora_alpha / lora_r.")
    lora_targets: str = _setting(
        "all-linear",
        "Modules with adapters, comma-separated, or all-linear; q_proj,v_proj are the paper's.",
    )
    alpha: float = _setting(0.0, "Weight of the hidden-state loss; 0.04 is the ancestors'.")
    lm_weight: float = _setting(
        0.3,
        "Share of the loss that is the cross entropy of the text's next tokens, up to 1; the rest"
        " is distillation.",
    )
    kl_direction: str = _setting(
        "teacher_student", "teacher_student, or student_teacher as the paper prints it."
    )
    max_grad_norm: float = _setting(1.0, "Clip of the gradient; that of masks is not clipped.")

    @property
    def mask_adam(self) -> str:
        """`mask_optimizer`, with auto decided."""
        if self.mask_optimizer != "auto":
            return self.mask_optimizer
        from_one = self.warm_start == "none" and self.mask_lr is None
        return "adam-mini" if from_one else "adam"

    @property
    def mask_rate(self) -> float:
        """`mask_lr`, or the default of the masks' optimizer."""
        return self.mask_lr or MASK_RATES[self.mask_adam]

    def rate(self, hidden_size: int) -> float:
        """`learning_rate`, or the default of what is trained."""
        of_train = {"adapters": ADAPTER_RATE, "weights": WEIGHT_RATE / hidden_size}
        return self.learning_rate or of_train[self.train]

    @property
    def chooser(self) -> str:
        """`method`, with auto decided."""
        if self.method != "auto":
            return self.method
        given = (getattr(self, f.name) != f.default for f in fields(self) if f.name in OF_MASKS)
        return "maskprune" if any(given) else "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(
            self,
            method=("auto", "maskprune", *ONE_SHOT),
            mode=MODES,
            warm_start=WARM_STARTS,
            mask_optimizer=("auto", *MASK_RATES),
            train=TRAINED,
            kl_direction=KL_DIRECTIONS,
        )
        require_least(
            self,
            warm_start_blocks=1,
            lora_r=1,
            lora_alpha=1,
            output_r=1,
            compensation_tokens=1,
            interval=1,
            alpha=0,
            lm_weight=0,
            warmup=0,
        )
        require_positive(self, "learning_rate", "mask_lr", "eta1", "max_grad_norm")
        if self.reach is not None:
            require_reach(self.reach)
        if self.lm_weight > 1:
            raise ValueError(f"lm_weight is {self.lm_weight}; expected a share from 0 to 1")
        if self.warmup > 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of the run up to 1")
        if self.train == "weights":
            self._require_trainable_weights()

    def _require_trainable_weights(self) -> None:
        if self.chooser == "maskprune":
            raise ValueError(
                "train is weights, of a model that is cut before it is trained, and learned masks "
                f"cut it at the end; choose at once, --method {', '.join(ONE_SHOT)}, or --train "
                "adapters"
            )
        if self.shard == "full":
            raise ValueError(
                "train is weights, which every process holds whole, and shard is full; give "
                "--shard none, or --train adapters"
            )
        defaults = {f.name: f.default for f in fields(self)}
        if given := [n for n in OF_ADAPTERS if getattr(self, n) != defaults[n]]:
            raise ValueError(
                f"train is weights, and {', '.join(given)} of adapters; leave out one of the two"
            )


@dataclass(frozen=True)
class SparsifyConfig(RunConfig):
    """How to make a model 2:4 sparse; the defaults are MaskLLM's, fitted to the number of steps."""

    method: str = _setting(
        "maskllm",
        "maskllm learns the masks; one-shot baselines: sparsegpt, wanda, magnitude.",
    )
    prior: str = _setting(
        "sparsegpt",
        "What the learning starts from: sparsegpt, wanda, magnitude, none, or masks of a run.",
    )
    prior_strength: float = _setting(
        8.0, "How far the prior moves the logits, in their standard deviations (the paper: 3)."
    )
    update_weights: bool = _setting(
        False, "With --method sparsegpt: also adjust the weights that stay, as published."
    )
    calibration_blocks: int = _setting(
        128, "Blocks of seq_len tokens that sparsegpt and wanda read."
    )
    learning_rate: float | None = _setting(
        None,
        "Learning rate of the logits, by default 1 / steps, at most 5e-3; falls to a tenth by a"
        " cosine.",
    )
    weight_decay: float = _setting(0.1, "AdamW's weight decay of the logits.")
    kappa_start: float = _setting(100.0, "Scale of the logits in the softmax at the first step.")
    kappa_end: float = _setting(500.0, "The same at the last step; linear between.")
    tau_start: float = _setting(2.0, "Temperature of the softmax at the first step (the paper: 4).")
    tau_end: float = _setting(0.05, "The same at the last step; linear between.")
    logit_std: float = _setting(0.01, "Standard deviation of the logits before the prior.")
    loss: str = _setting(
        "lm", "lm, the language-model loss; or kl, against the dense model: one more forward."
    )
    regulariser: str = _setting(
        "relative",
        "Reward for large kept weights: relative (norms over the dense ones), or sum (the paper's "
        "sum of squares, which depends on the model's size).",
    )
    regulariser_weight: float | None = _setting(
        None, "Weight of that reward at the first step, falling to 0; 1500 relative, 1e-5 sum."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choices(
            self,
            method=("maskllm", *TWO_FOUR_ONE_SHOT),
            loss=("lm", "kl"),
            regulariser=("relative", "sum"),
        )
        if self.prior not in (*TWO_FOUR_ONE_SHOT, "none") and not (
            self.prior.endswith(".safetensors") or os.path.isdir(self.prior)
        ):
            raise ValueError(
                f"prior is {self.prior!r}; expected sparsegpt, wanda, magnitude, none, or a masks "
                "file or output folder of another run"
            )
        if self.update_weights and self.method != "sparsegpt":
            raise ValueError(
                f"update_weights is for --method sparsegpt; {self.method} leaves the weights that "
                "stay as they are"
            )
        if self.shard == "full" and self.method != "maskllm":
            raise ValueError(
                f"shard is full, which spreads what is trained, and {self.method} trains nothing; "
                "use --shard none: the text is shared out among the processes anyway"
            )
        require_least(
            self,
            calibration_blocks=1,
            prior_strength=0,
            weight_decay=0,
            regulariser_weight=0,
        )
        require_positive(
            self,
            *("learning_rate", "kappa_start", "kappa_end", "tau_start", "tau_end", "logit_std"),
        )


@dataclass(frozen=True)
class EvalConfig:
    """What `maskprune eval` measures."""

    model: str = field(metadata={"help": "Checkpoint folder, hub id, or smollm2-135m."})
    ppl: str | None = _setting(
        None,
        "Text for perplexity: .txt, .jsonl, .json, .parquet, .csv, or dataset[:config][:split].",
    )
    seq_len: int = _setting(2048, "Tokens per perplexity window.")
    tasks: str | None = _setting(
        None, "lm-eval tasks, comma-separated: names, YAML files, folders of them."
    )
    limit: int | None = _setting(None, "At most this many windows, and documents per task.")
    num_fewshot: int | None = _setting(
        None, "Few-shot examples in a prompt; by default the task's own number."
    )
    batch_size: int = _setting(1, "Windows or requests per forward pass.")
    dtype: str = _setting("auto", "auto (as stored), float32, bfloat16 or float16.")
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.")
    json: str | None = _setting(None, "Write the results to this file.")
    trust_remote_code: bool = _setting(False, "Let code from the model's repository run.")

    def __post_init__(self) -> None:
        if not self.ppl and not self.tasks:
            raise ValueError("nothing to evaluate; give --ppl FILE, --tasks NAMES, or both")
        require_least(self, seq_len=2, batch_size=1, limit=1)


@dataclass(frozen=True)
class RunFiles:
    """Where a run reads and writes."""

    model: str = field(metadata={"help": "Checkpoint folder, hub id, or smollm2-135m."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to write the stock checkpoint to.", "aliases": ["-o"]},
    )
    data: str | None = _setting(
        None,
        "Text or chats to learn from: .txt, .jsonl, .json, .parquet, .csv, a folder of these, or "
        "dataset[:config][:split]; C4 by default.",
    )
    resume: bool = _setting(False, "Continue the run in progress, with the same settings.")
    overwrite: bool = _setting(False, "Replace an output folder that maskprune wrote.")
    max_shard_size: str = _setting("5GB", "Of one file of weights.")


@dataclass(frozen=True)
class PruneFiles(RunFiles):
    """Where `maskprune prune` reads and writes."""

    dry_run: bool = _setting(False, "Show the plan and stop.")


@dataclass(frozen=True)
class SparsifyFiles(RunFiles):
    """Where `maskprune sparsify` reads and writes."""

    masks: str | None = _setting(
        None, "Apply the masks of this file or run as they are, and learn nothing; needs no data."
    )


@dataclass(frozen=True)
class _Planned:
    model: str = field(metadata={"help": "Folder with config.json, hub id, or smollm2-135m."})


@dataclass(frozen=True)
class PlanConfig(BudgetConfig, _Planned):
    """What `maskprune plan` lays out, from config.json alone."""

    two_four: bool = _setting(False, "Plan the memory of `sparsify`, which changes no shape.")
    train: str = _setting("adapters", "With --gpus: adapters or weights, see `prune`.")
    gpus: int | None = _setting(
        None, "Also show the memory that training takes on each of this many devices."
    )
    gpu_memory: float = _setting(80.0, "GB of one device, with --gpus.")
    batch_size: int = _setting(16, "With --gpus: sequences per step, over all devices.")
    gradient_accumulation: int = _setting(1, "With --gpus: micro-batches per step.")
    seq_len: int = _setting(512, "With --gpus: tokens per sequence.")
    lora_r: int = _setting(8, "With --gpus: rank of the adapters.")
    output_r: int = _setting(128, "With --gpus: rank of the adapters of W_O and W_down.")
    gradient_checkpointing: bool = _setting(False, "With --gpus: trade time for memory.")
    shard: str = _setting("auto", "With --gpus: none, full, or auto, see `prune`.")
    optimizer_bits: int = _setting(32, "With --gpus: bits of AdamW's moments, 32 or 8.")

    def __post_init__(self) -> None:
        names = ("gpus", "batch_size", "gradient_accumulation", "seq_len", "lora_r", "output_r")
        require_choices(self, shard=("auto", "none", "full"), train=TRAINED)
        require_least(self, **dict.fromkeys(names, 1))
        require_positive(self, "gpu_memory")
        _require_whole_micro_batches(self)
        if self.train == "weights" and (self.two_four or self.shard == "full"):
            what = "2:4 masks train none" if self.two_four else "every process holds them whole"
            raise ValueError(f"train is weights, and {what}; leave out one of the two")
        if self.two_four and self.gpus is None:
            raise ValueError("--two-four plans memory only; give --gpus N too")


@dataclass(frozen=True)
class ExportConfig:
    """What `maskprune export` folds and writes, from disk to disk."""

    model: str = field(metadata={"help": "Checkpoint folder or hub id."})
    masks: str = field(metadata={"help": "Masks file, or output folder of `maskprune prune`."})
    output: str = field(metadata={"help": "Folder to write.", "aliases": ["-o"]})
    adapter: str | None = _setting(
        None, "PEFT LoRA adapter to merge on the way: its folder, or the run's."
    )
    arch_fallback: str = _setting("mistral", "mistral, divisor or error.")
    max_shard_size: str = _setting("5GB", "Of one file of weights.")
    overwrite: bool = _setting(False, "Replace an output folder that maskprune wrote.")


@dataclass(frozen=True)
class ConvertConfig:
    """What `maskprune convert` writes: one GGUF file."""

    folder: str = field(metadata={"help": "Checkpoint folder."})
    output: str = field(metadata={"help": "GGUF file to write.", "aliases": ["-o"]})
    quantize: str | None = _setting(None, "Q8_0, Q4_K_M, ...; 16 bits as stored without it.")
    overwrite: bool = _setting(False, "Replace the file.")


@dataclass(frozen=True)
class CheckConfig:
    """What `maskprune check` looks at."""

    folder: str = field(metadata={"help": "Checkpoint folder."})
    against: str | None = _setting(None, "The original model, to compare logits with.")
    masks: str | None = _setting(
        None, "Masks to apply to --against: a file or a run's folder; the checkpoint's own, if any."
    )
    targets: str | None = _setting(
        None, "Of vllm,llama.cpp,openvino,ct2,ort,mlx,sglang,awq128,fp8,tp=4."
    )


@dataclass(frozen=True)
class ReportConfig:
    """Which run `maskprune report` draws."""

    run: str = field(metadata={"help": "Folder that `maskprune prune` wrote."})
