"""What a run writes beside the weights: its record, its model card, and a proof of the weights."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskprune.commands.report import read_info
from maskprune.config import PruneConfig, SparsifyConfig
from maskprune.files import OWN_FOLDER, JsonObject, adapter_beside, replace_file, write_json
from maskprune.hf.checkpoint_files import save_stock
from maskprune.hf.demo_model import BASE, LICENSE, MODEL_NAME
from maskprune.hf.equality import Difference, compare_logits
from maskprune.hf.families import text_config
from maskprune.hf.load import resolve_model
from maskprune.hf.model_card import model_card
from maskprune.hf.quiet import quiet_transformers
from maskprune.structured.plan import Cost

PACKAGES = ("maskprune", "torch", "transformers", "peft", "accelerate", "triton", "safetensors")
RECORD_FILE = "maskprune.json"


@dataclass
class RunRecord:
    """A run, as `maskprune.json` and the model card describe it.

    Attributes:
        format: `maskprune-run` or `maskprune-two-four`.
        difference: of the masked model's logits from the exported one's, on `tokens_compared`
            tokens; None where no mask was trained.
        dense, pruned: shape and cost before and after.
        details: keys of the file that only this kind of run has.
        card_only: keys of `model_card` that the file has elsewhere.
        summary: what the command prints.
    """

    format: str
    model: str
    method: str | None
    data: str | None
    settings: PruneConfig | SparsifyConfig | None
    model_class: str
    seed: int = 0
    steps: int = 0
    tokens: int = 0
    difference: Difference | None = None
    tokens_compared: int = 0
    dense: JsonObject = field(default_factory=dict)
    pruned: JsonObject = field(default_factory=dict)
    perplexity: JsonObject | None = None
    details: JsonObject = field(default_factory=dict)
    card_only: JsonObject = field(default_factory=dict)
    summary: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    machine: str = field(default_factory=lambda: machine())

    def content(self) -> JsonObject:
        """The content of `maskprune.json`, without empty parts."""
        known = {f: getattr(self, f) for f in ("format", "model", "method", "data")}
        known["settings"] = asdict(self.settings) if self.settings else None
        for name in ("seed", "steps", "versions", "machine", "model_class"):
            known[name] = getattr(self, name)
        for name in ("dense", "pruned", "perplexity"):
            if value := getattr(self, name):
                known[name] = value
        if self.difference is not None:
            known["logits_masked_against_exported"] = vars(self.difference) | {
                "relative": self.difference.relative,
                "tokens": self.tokens_compared,
            }
        return known | self.details

    def card(self) -> str:
        """The text of README.md."""
        data = Path(self.data).name if self.data and Path(self.data).exists() else self.data
        if share := getattr(self.settings, "self_text", 0):
            data = f"{data}; {share:.0%} of the text was written by the original model"
        known = {
            "base_model": self.model,
            "method": self.method,
            "steps": self.steps or None,
            "tokens": self.tokens or None,
            "data": data,
            "seed": self.seed,
            "dense": self.dense,
            "pruned": self.pruned,
            "model_class": self.model_class,
            "perplexity": self.perplexity,
            "versions": self.versions,
        }
        if self.model == MODEL_NAME:
            known |= {"base_model": BASE, "license": LICENSE}
        if self.difference is not None:
            known["difference"] = vars(self.difference) | {"tokens": self.tokens_compared}
        return model_card(known | self.card_only)

    def save(self, folder: Path) -> None:
        """Write `maskprune/maskprune.json` and README.md into a result's folder."""
        (folder / OWN_FOLDER).mkdir(exist_ok=True)
        write_json(folder / OWN_FOLDER / RECORD_FILE, self.content())
        replace_file(folder / "README.md", self.card())


def left_out(masks: str | Path) -> str | None:
    """What an export of a run's masks alone lacks of the run; None where nothing is known.

    Args:
        masks: the run's folder, or the masks file in it.
    """
    if adapter := adapter_beside(Path(masks)):
        return (
            f"what the run trained is in its adapter, {adapter}, and was left out; to merge it: "
            f"--adapter {masks if Path(masks).is_dir() else adapter}"
        )
    info = read_info(Path(masks)) if Path(masks).is_dir() else {}
    if (info.get("settings") or {}).get("train") == "weights":
        return f"the run trained its weights, which are not in its masks: {masks} is the result"
    return None


def sizes(cost: Cost) -> JsonObject:
    """A cost under the keys of the record and the card."""
    return vars(cost.shape) | {
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "flops_per_token": cost.flops_per_token,
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def machine() -> str:
    """The device that a result was made on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads"


def proof_tokens(model: PreTrainedModel, blocks: torch.Tensor | None) -> torch.Tensor:
    """(n, T) int64 ids that logits are compared on: the first blocks of the data.

    Random ones where no data was read.
    """
    if blocks is not None:
        ids = blocks[:4]
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, text_config(model.config).vocab_size, (2, 64), generator=generator)
    return ids.to(model.device)


def save_proven(
    model: PreTrainedModel,
    folder: Path,
    ids: torch.Tensor,
    record: RunRecord,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_size: int | str,
) -> None:
    """Write a stock checkpoint of `model`, prove it by reading it back, and write its record.

    Raises:
        RuntimeError: the reloaded model's logits differ in any bit.
    """
    where = Path(resolve_model(record.model))
    save_stock(
        model,
        folder,
        source=where if where.is_dir() else _hub_folder(record.model),
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
    )
    again = compare_logits(model, _reload(folder, model), ids)
    if again.largest != 0:
        raise RuntimeError(
            f"the reloaded checkpoint's logits differ from the exported model's by "
            f"{again.largest:.2e}; nothing was written; please report this"
        )
    record.save(folder)


def _hub_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _reload(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
    return again.to(like.device).eval()
