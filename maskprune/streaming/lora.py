"""A PEFT LoRA adapter as low-rank factors per weight, to be merged block by block of rows.

W + scaling * B A in float32, or float64 as stored (LoRA, arXiv 2106.09685, section 4.1), the
arithmetic of PEFT's merge.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from maskprune.files import JsonObject, own_file
from maskprune.hf.adapters import unmergeable
from maskprune.streaming.safetensors_file import Stored, read_header
from maskprune.structured.masks import MASKS_FILE

ADAPTER_NAME = "adapter_model.safetensors"
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Lora:
    """The factors of one weight: A (r, I), B (O, r); `transposed` where the weight is (I, O)."""

    a: Stored
    b: Stored
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that this belongs to."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(O', r) and (r, I') whose product, times `scaling`, is added to the weight.

        float32, or float64 where the adapter is.
        """
        a, b = load_tensor(self.a), load_tensor(self.b)
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        return (a.T, b.T) if self.transposed else (b, a)


def load_tensor(stored: Stored) -> torch.Tensor:
    """One tensor, read with a plain read so that a file cut short is an error, not a crash."""
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        raw = bytearray(file.read(stored.size))
    if len(raw) != stored.size:
        raise ValueError(f"{stored.file} ends inside tensor {stored.name}; fetch it again")
    if not raw:
        return torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[stored.dtype]).reshape(stored.shape)


def read_adapter(folder: Path) -> dict[str, Lora]:
    """The adapter's factors by the name of the weight they change.

    Args:
        folder: the adapter's, or one that `maskprune prune` wrote.

    Raises:
        ValueError: no plain LoRA adapter in safetensors; says what to do.
    """
    if not (folder / "adapter_config.json").is_file():
        if own_file(folder, "adapter").is_dir():
            folder = own_file(folder, "adapter")
        elif own_file(folder, MASKS_FILE).is_file():
            raise ValueError(
                f"{folder} holds masks but no adapter; a run with --train weights keeps none, and "
                "its own checkpoint is the result: copy that"
            )
    config = _read_config(folder)
    path = folder / ADAPTER_NAME
    if not path.is_file():
        raise ValueError(
            f"adapter {folder} has no {ADAPTER_NAME}; expected safetensors; load it with peft "
            "where you trust it and save_pretrained(...) it again"
        )
    halves: dict[str, dict[str, Stored]] = {}
    for name, stored in read_header(path).items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", name)
        if not match or len(stored.shape) != 2 or stored.dtype not in TORCH_DTYPES:
            raise ValueError(
                f"adapter {folder} holds {name} ({stored.dtype} {list(stored.shape)}); expected "
                "the lora_A and lora_B matrices of linear layers; merge it with peft first"
            )
        halves.setdefault(match[1], {})[match[2]] = stored
    adapted = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"adapter {folder}: the two factors of {module} do not fit together")
        scaling = _scaling(config, module, pair["A"].shape[0])
        transposed = bool(config.get("fan_in_fan_out"))
        adapted[f"{module}.weight"] = Lora(pair["A"], pair["B"], scaling, transposed)
    return adapted


def _read_config(folder: Path) -> JsonObject:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _ = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"adapter {folder} has no readable adapter_config.json; expected a folder that peft's "
            "save_pretrained wrote"
        ) from None
    if reason := unmergeable(config):
        raise ValueError(f"adapter {folder} {reason}")
    return config


def _scaling(config: JsonObject, module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
