"""Loads MODEL of the command line: a folder, a hub id or the demo's name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maskprune.files import JsonObject
from maskprune.hf.demo_model import MODEL_NAME, demo_model_dir, gguf_options
from maskprune.hf.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def resolve_model(name: str | Path) -> str:
    """The folder or hub id that `name` means; fetches the embedded demo model on first use.

    Raises:
        ValueError: a folder that is not a whole safetensors or GGUF checkpoint; says what to do.
    """
    if str(name) == MODEL_NAME and not Path(name).exists():
        return str(demo_model_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        check_checkpoint(path)
        return str(path)
    looks_local = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1
    if path.exists() or looks_local:
        raise ValueError(f"model {name} is not a folder; expected a checkpoint folder or a hub id")
    return str(name)


def gguf_file(folder: Path) -> str | None:
    """Name of the GGUF file in a folder without safetensors; None where there is none.

    Raises:
        ValueError: there are several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} GGUF files, {', '.join(files)}; keep one")
    return files[0] if files else None


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder from which no weights can be read safely.

    Raises:
        ValueError: no config, pickled weights only, no weights, or shards that are missing.
    """
    if gguf_file(folder):
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a checkpoint folder or a hub id")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(s for s in shards if not (folder / s).is_file())
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; the "
                "checkpoint is half-written: fetch it again"
            )
        return
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read; "
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...) writes safetensors"
        )
    raise ValueError(f"{folder} holds no weights (*.safetensors or *.gguf); fetch it again")


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    where = resolve_model(name)
    options: JsonObject = {"trust_remote_code": trust_remote_code}
    if Path(where).is_dir() and (gguf := gguf_file(Path(where))):
        options["gguf_file"] = gguf
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"no tokenizer could be read from {where} ({_first_line(error)}); copy the original "
            "model's tokenizer files (tokenizer.json, tokenizer_config.json) there"
        ) from None


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer) of a folder, a hub id, or the embedded demo's name.

    Args:
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        device: `auto` (CUDA where there is one), or a torch device.

    Raises:
        ValueError: not a model that can be read, or one without tokenizer; says what to do.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    on = torch_device(device)
    where = resolve_model(name)
    tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
    options: JsonObject = {"dtype": torch_dtype(dtype), "trust_remote_code": trust_remote_code}
    if Path(where).is_dir() and (gguf := gguf_file(Path(where))):
        options |= gguf_options(gguf)
    else:
        options["use_safetensors"] = True
    # A download shows its progress.
    quiet = quiet_transformers() if Path(where).is_dir() else contextlib.nullcontext()
    try:
        with quiet:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, output_loading_info=True, **options
            )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"model {where}: its config.json names other shapes than its weights have; fetch both "
            "again"
        ) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"model {where} could not be read ({_first_line(error)}); expected a folder with "
            "config.json and whole safetensors files, or a hub id that has them"
        ) from None
    model, info = loaded
    # transformers only warns, and fills them with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {where} lacks {len(missing)} tensors, first {missing[0]}; the checkpoint is "
            "half-written or of another architecture than its config.json: fetch it again"
        )
    return model.to(on).eval(), tokenizer


@torch.no_grad()
def require_finite_weights(model: PreTrainedModel, name: str | Path) -> None:
    """Refuse NaN or infinite weights.

    Raises:
        ValueError: there are some; names the first tensor.
    """
    for key, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"model {name}: {key} holds NaN or infinite values as "
                f"{str(tensor.dtype).removeprefix('torch.')}; fetch the checkpoint again, or "
                "load it in a wider --dtype"
            )


def torch_dtype(name: str) -> torch.dtype | str:
    """torch's dtype of a name; `auto` stays `auto`.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """torch's device of a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise ValueError(f"device is {name!r}, but torch sees {seen} CUDA devices here; use cpu")
    return device


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
