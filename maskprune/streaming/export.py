"""Masks file and checkpoint to a stock checkpoint, tensor by tensor, never building the model.

Its memory does not grow with the checkpoint: two blocks a thread, the masks, and the factors of one
adapted weight. It takes its cuts from the same table as the in-memory exporter
(`maskprune/structured/cuts.py`) and writes the same bytes.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskprune.files import locked, new_folder, output_folder, require_new_folder
from maskprune.hf.checkpoint_files import save_stock, write_stock_files
from maskprune.hf.load import gguf_file, load_model, resolve_model
from maskprune.hf.model_card import model_card
from maskprune.hf.shape import Shape
from maskprune.streaming.move import Mover
from maskprune.streaming.plan import StreamPlan, plan_stream
from maskprune.streaming.progress import ByteProgress
from maskprune.streaming.safetensors_file import INDEX_NAME, index_json, parse_size
from maskprune.structured.export import export, final_shape
from maskprune.structured.masks import Masks, attach_masks, load_masks
from maskprune.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` wrote."""

    path: Path
    shape: Shape
    config: PreTrainedConfig
    bytes_read: int
    bytes_written: int
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.config.model_type}, {self.shape}; "
            f"{self.bytes_written / 1e9:.2f} GB of weights"
        ]
        if self.dropped:
            lines.append(
                f"left out {len(self.dropped)} tensors that the class has no place for, "
                f"first {self.dropped[0]}"
            )
        return "\n".join(lines)


def export_checkpoint(
    src_dir: str | Path,
    masks_file: str | Path,
    out_dir: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    adapter: str | Path | None = None,
    arch_fallback: str = "mistral",
    overwrite: bool = False,
    progress: bool = True,
    backend: str = "auto",
) -> Exported:
    """Fold the masks into a checkpoint's weights and drop the pruned units, from disk to disk.

    A kept weight is (W + scaling * B A) * m in float32 (in float64 where it is stored so), rounded
    once to its stored dtype; what pruning does not touch is copied byte for byte. `out_dir`
    appears whole or not at all.

    Args:
        src_dir: checkpoint folder with safetensors (float64, float32, float16, bfloat16), or a hub
            id. A folder with a GGUF file is read through transformers, in memory.
        masks_file: what `Masks.save` or `maskprune prune` wrote, uniform.
        out_dir: a folder that does not exist yet.
        max_shard_size: of one file of weights, such as `5GB`.
        adapter: folder of a plain PEFT LoRA adapter to merge on the way.
        arch_fallback: see `pruned_class`.
        overwrite: replace an `out_dir` that exists.
        progress: show bytes done, speed and time left on stderr.
        backend: `auto` (C++ where it is built) or `reference`.

    Raises:
        ValueError: a source, adapter or masks file that cannot be read or does not fit; says why.
        OSError: reading or writing failed, or the disk is full.

    Source: MaskPrune (arXiv 2502.14008), section 3.2, with the fold corrected (docs/method.md).
    """
    out = output_folder(out_dir)
    require_new_folder(out, overwrite, (src_dir, masks_file, adapter))
    shard_size = parse_size(max_shard_size)
    masks = load_masks(masks_file)
    shape = final_shape(masks)
    source = source_folder(src_dir)
    try:
        with locked(out):
            if gguf_file(source):
                return _through_memory(
                    source, masks, out, max_shard_size, adapter, arch_fallback, overwrite
                )
            plan = plan_stream(source, masks, shape, shard_size, adapter, arch_fallback)
            _require_space(out, plan.bytes_written)
            with new_folder(out, overwrite) as building:
                card = _card(source, masks, shape, plan.parameters)
                write_stream(plan, building, source, card, progress=progress, backend=backend)
    except OSError as error:
        raise _explained(error, out) from error
    return Exported(
        Path(out_dir), shape, plan.config, plan.bytes_read, plan.bytes_written, plan.dropped
    )


def source_folder(name: str | Path) -> Path:
    """The checkpoint folder that a name means; a hub id is downloaded first.

    Raises:
        ValueError: there is none.
    """
    where = resolve_model(name)
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(where, allow_patterns=patterns))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model {where} is not a local folder and could not be fetched from the hub ({first}); "
            "give a local checkpoint folder"
        ) from None


def write_stream(
    plan: StreamPlan,
    folder: Path,
    source: Path,
    card: str | None = None,
    *,
    progress: bool = True,
    backend: str = "auto",
) -> None:
    """Write the stock checkpoint that `plan` makes of `source` into an existing `folder`.

    card: the text of its README.md.
    """
    _write_weights(plan, folder, progress, backend)
    write_stock_files(folder, plan.config, source=source, model_card=card)


def _write_weights(plan: StreamPlan, folder: Path, progress: bool, backend: str) -> None:
    with ExitStack() as stack:
        bar = stack.enter_context(ByteProgress(plan.work, "export", progress))
        mover = Mover(bar, torch.get_num_threads(), backend)
        sources: dict[Path, int] = {}
        for shard in plan.shards:
            with (folder / shard.file_name).open("xb", buffering=0) as file:
                file.write(shard.header)
                file.truncate(shard.size)
                for tensor in shard.tensors:
                    if tensor.name not in plan.moves:
                        continue
                    move = plan.moves[tensor.name]
                    path = move.source.file
                    if path not in sources:
                        sources[path] = os.open(path, os.O_RDONLY)
                        stack.callback(os.close, sources[path])
                    placed = replace(move, target=tensor)
                    mover.move(placed, sources[path], file.fileno())
                os.fsync(file.fileno())
    if len(plan.shards) > 1:
        (folder / INDEX_NAME).write_text(index_json(plan.shards, plan.parameters), encoding="utf-8")


def _card(source: Path, masks: Masks, shape: Shape, parameters: int) -> str:
    return model_card(
        {
            "base_model": masks.source or source.name,
            "head_unit": masks.head_unit,
            "dense": vars(masks.shape),
            "pruned": vars(shape) | {"parameters": parameters},
            "versions": {"maskprune": __version__},
        }
    )


def _require_space(out: Path, needed: int) -> None:
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free")


def _explained(error: OSError, out: Path) -> OSError:
    """The same error in one line that says where, what is left behind, and what to do."""
    what = error.strerror or str(error)
    if error.filename is not None:
        what = f"{what} ({error.filename})"
    do = {
        errno.ENOSPC: "free space there or choose another folder",
        errno.EROFS: "choose a folder that can be written",
        errno.EACCES: "choose a folder that can be written",
        errno.EPERM: "choose a folder that can be written",
        errno.ENOTDIR: "choose a folder whose parents are folders",
        errno.EEXIST: "choose a folder whose parents are folders",
    }.get(error.errno or 0, "fix that and run it again")
    return OSError(error.errno, f"export to {out} failed, nothing was left there: {what}; {do}")


def _through_memory(
    source: Path,
    masks: Masks,
    out: Path,
    max_shard_size: int | str,
    adapter: str | Path | None,
    arch_fallback: str,
    overwrite: bool,
) -> Exported:
    """GGUF has its own tensor names and block formats: transformers reads and dequantises it."""
    if adapter is not None:
        raise ValueError(
            f"{source} is a GGUF file and an adapter was given; merge the adapter into the "
            "original checkpoint first"
        )
    model, tokenizer = load_model(source)
    attach_masks(model, masks=masks).detach()
    small = export(model, masks, arch_fallback=arch_fallback)
    with new_folder(out, overwrite) as building:
        save_stock(
            small,
            building,
            source=source,
            tokenizer=tokenizer,
            model_card=_card(source, masks, final_shape(masks), small.num_parameters()),
            max_shard_size=str(max_shard_size),
        )
        written = sum(file.stat().st_size for file in building.glob("*.safetensors"))
    read = sum(file.stat().st_size for file in source.glob("*.gguf"))
    return Exported(out, final_shape(masks), small.config, read, written)
