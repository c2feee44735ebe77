"""The output of a sharded run: one process writes it from disk to disk, all prove it together."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from maskprune.config import PruneConfig
from maskprune.files import OWN_FOLDER
from maskprune.hf.equality import TOLERANCE, Difference, compare_logits, require_equal
from maskprune.hf.families import family_of
from maskprune.hf.load import gguf_file, load_model
from maskprune.hf.shape import shape_of
from maskprune.streaming.export import source_folder, write_stream
from maskprune.streaming.lora import TORCH_DTYPES
from maskprune.streaming.plan import plan_stream, plan_two_four
from maskprune.streaming.safetensors_file import parse_size, read_checkpoint
from maskprune.structured.masks import MASKS_FILE, Masks
from maskprune.structured.prune import PruneResult
from maskprune.training.distributed import on_first
from maskprune.training.sharding import adapter_weights, device_of_run, shard_blocks


def require_streamable(name: str, config: PreTrainedConfig, settings: PruneConfig) -> None:
    """Refuse, before training, a MODEL that cannot be written tensor by tensor.

    Raises:
        ValueError: says why.
    """
    source = require_safetensors(name)
    shape = shape_of(config)
    masks = Masks(shape, settings.head_unit, family_of(config).model_type)
    plan_stream(source, masks, shape, parse_size("5GB"), None, settings.arch_fallback)


def require_two_four_streamable(name: str) -> None:
    """The same for `sparsify`.

    Raises:
        ValueError: says why.
    """
    plan_two_four(require_safetensors(name), {}, parse_size("5GB"))


def require_safetensors(name: str) -> Path:
    """The folder of MODEL, if it is a checkpoint of safetensors.

    Raises:
        ValueError: it is a GGUF file.
    """
    source = source_folder(name)
    if gguf_file(source):
        raise ValueError(
            f"--shard full reads and writes weights tensor by tensor, and {name} is a GGUF file; "
            "take the safetensors checkpoint it was made from, or use --shard none"
        )
    return source


def write_pruned(
    result: PruneResult, name: str, folder: Path, max_shard_size: str, arch_fallback: str
) -> PreTrainedConfig:
    """Write masks, adapter and the stock checkpoint that they make of MODEL; returns its config.

    Every process calls it; rank 0 writes.
    """
    adapter = adapter_weights(result.masked_model)

    def write() -> PreTrainedConfig:
        own, source = folder / OWN_FOLDER, source_folder(name)
        own.mkdir()
        result.masks.save(own / MASKS_FILE)
        result.masked_model.save_pretrained(own / "adapter", state_dict=adapter)
        size = parse_size(max_shard_size)
        plan = plan_stream(source, result.masks, result.shape, size, own / "adapter", arch_fallback)
        write_stream(plan, folder, source)
        return plan.config

    return on_first(write)


def write_two_four(
    masks: dict[str, torch.Tensor], name: str, folder: Path, max_shard_size: str
) -> None:
    """On rank 0, write the stock checkpoint that the masks make of MODEL."""

    def write() -> None:
        source = source_folder(name)
        write_stream(plan_two_four(source, masks, parse_size(max_shard_size)), folder, source)

    on_first(write)


def prove(masked: PreTrainedModel, folder: Path, ids: torch.Tensor) -> Difference:
    """Compare the logits of the model under its masks with those of the checkpoint in `folder`.

    Every process calls it, and holds its part of both.

    Args:
        ids: (n, T) token ids on the model's device.

    Raises:
        RuntimeError: they are further apart than rounding in the stored dtype explains.
    """
    device = device_of_run(masked, True)
    stored = {TORCH_DTYPES.get(t.dtype, masked.dtype) for t in read_checkpoint(folder).values()}
    dtype = str(masked.dtype).removeprefix("torch.")
    exported, _ = load_model(folder, dtype=dtype, device="cpu")
    shard_blocks(exported.requires_grad_(False), device)
    difference = compare_logits(masked, exported, ids)
    require_equal(difference, max(stored | {masked.dtype}, key=TOLERANCE.__getitem__))
    return difference
