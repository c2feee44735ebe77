"""Where runs read and write, and the settings of the commands that train nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskprune.choices import (
    TRAINED,
    require_choices,
    require_least,
    require_positive,
)
from maskprune.config.run import BudgetConfig, require_whole_micro_batches, setting


@dataclass(frozen=True)
class RunFiles:
    """Where a run reads and writes."""

    model: str = field(metadata={"help": "Checkpoint folder, hub id, or smollm2-135m."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to write the stock checkpoint to.", "aliases": ["-o"]},
    )
    data: str | None = setting(
        None,
        "Text or chats to learn from: .txt, .jsonl, .json, .parquet, .csv, a folder of these, or "
        "dataset[:config][:split]; C4 by default.",
    )
    resume: bool = setting(False, "Continue the run in progress, with the same settings.")
    overwrite: bool = setting(False, "Replace an output folder that maskprune wrote.")
    max_shard_size: str = setting("5GB", "Of one file of weights.")


@dataclass(frozen=True)
class PruneFiles(RunFiles):
    """Where `maskprune prune` reads and writes."""

    dry_run: bool = setting(False, "Show the plan and stop.")


@dataclass(frozen=True)
class SparsifyFiles(RunFiles):
    """Where `maskprune sparsify` reads and writes."""

    masks: str | None = setting(
        None, "Apply the masks of this file or run as they are, and learn nothing; needs no data."
    )


@dataclass(frozen=True)
class _Planned:
    model: str = field(metadata={"help": "Folder with config.json, hub id, or smollm2-135m."})


@dataclass(frozen=True)
class PlanConfig(BudgetConfig, _Planned):
    """What `maskprune plan` lays out, from config.json alone."""

    two_four: bool = setting(False, "Plan the memory of `sparsify`, which changes no shape.")
    train: str = setting("adapters", "With --gpus: adapters or weights, see `prune`.")
    gpus: int | None = setting(
        None, "Also show the memory that training takes on each of this many devices."
    )
    gpu_memory: float = setting(80.0, "GB of one device, with --gpus.")
    batch_size: int = setting(16, "With --gpus: sequences per step, over all devices.")
    gradient_accumulation: int = setting(1, "With --gpus: micro-batches per step.")
    seq_len: int = setting(512, "With --gpus: tokens per sequence.")
    lora_r: int = setting(8, "With --gpus: rank of the adapters.")
    output_r: int = setting(128, "With --gpus: rank of the adapters of W_O and W_down.")
    gradient_checkpointing: bool = setting(False, "With --gpus: trade time for memory.")
    shard: str = setting("auto", "With --gpus: none, full, or auto, see `prune`.")
    optimizer_bits: int = setting(32, "With --gpus: bits of AdamW's moments, 32 or 8.")

    def __post_init__(self) -> None:
        names = ("gpus", "batch_size", "gradient_accumulation", "seq_len", "lora_r", "output_r")
        require_choices(self, shard=("auto", "none", "full"), train=TRAINED)
        require_least(self, **dict.fromkeys(names, 1))
        require_positive(self, "gpu_memory")
        require_whole_micro_batches(self.batch_size, self.gradient_accumulation)
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
    adapter: str | None = setting(
        None, "PEFT LoRA adapter to merge on the way: its folder, or the run's."
    )
    arch_fallback: str = setting("mistral", "mistral, divisor or error.")
    max_shard_size: str = setting("5GB", "Of one file of weights.")
    overwrite: bool = setting(False, "Replace an output folder that maskprune wrote.")


@dataclass(frozen=True)
class ConvertConfig:
    """What `maskprune convert` writes: one GGUF file."""

    folder: str = field(metadata={"help": "Checkpoint folder."})
    output: str = field(metadata={"help": "GGUF file to write.", "aliases": ["-o"]})
    quantize: str | None = setting(None, "Q8_0, Q4_K_M, ...; 16 bits as stored without it.")
    overwrite: bool = setting(False, "Replace the file.")


@dataclass(frozen=True)
class CheckConfig:
    """What `maskprune check` looks at."""

    folder: str = field(metadata={"help": "Checkpoint folder."})
    against: str | None = setting(None, "The original model, to compare logits with.")
    masks: str | None = setting(
        None, "Masks to apply to --against: a file or a run's folder; the checkpoint's own, if any."
    )
    targets: str | None = setting(
        None, "Of vllm,llama.cpp,openvino,ct2,ort,mlx,sglang,awq128,fp8,tp=4."
    )


@dataclass(frozen=True)
class ReportConfig:
    """Which run `maskprune report` draws."""

    run: str = field(metadata={"help": "Folder that `maskprune prune` wrote."})


@dataclass(frozen=True)
class EvalConfig:
    """What `maskprune eval` measures."""

    model: str = field(metadata={"help": "Checkpoint folder, hub id, or smollm2-135m."})
    ppl: str | None = setting(
        None,
        "Text for perplexity: .txt, .jsonl, .json, .parquet, .csv, or dataset[:config][:split].",
    )
    seq_len: int = setting(2048, "Tokens per perplexity window.")
    tasks: str | None = setting(
        None, "lm-eval tasks, comma-separated: names, YAML files, folders of them."
    )
    limit: int | None = setting(None, "At most this many windows, and documents per task.")
    num_fewshot: int | None = setting(
        None, "Few-shot examples in a prompt; by default the task's own number."
    )
    batch_size: int = setting(1, "Windows or requests per forward pass.")
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    json: str | None = setting(None, "Write the results to this file.")
    trust_remote_code: bool = setting(False, "Let code from the model's repository run.")

    def __post_init__(self) -> None:
        if not self.ppl and not self.tasks:
            raise ValueError("nothing to evaluate; give --ppl FILE, --tasks NAMES, or both")
        require_least(self, seq_len=2, batch_size=1, limit=1)
