"""What a streaming export will do, tensor by tensor, checked before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskprune.hf.families import FAMILIES, Family, family_of
from maskprune.hf.pruned_config import target_config, zero_tensors
from maskprune.hf.shape import Shape, shape_of
from maskprune.streaming.lora import TORCH_DTYPES, Lora, read_adapter
from maskprune.streaming.move import Move
from maskprune.streaming.safetensors_file import (
    Planned,
    Shard,
    Stored,
    byte_size,
    plan_shards,
    read_checkpoint,
)
from maskprune.structured.cuts import Cut
from maskprune.structured.export import cuts_by_name
from maskprune.structured.masks import Masks, require_same_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


QUANTISED_ENDINGS = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
)


@dataclass(frozen=True)
class StreamPlan:
    """Where every tensor of the result comes from, and the files it goes into.

    A tensor of a shard that no move fills is zeros.
    """

    shape: Shape
    config: PreTrainedConfig
    moves: dict[str, Move]
    shards: list[Shard]
    parameters: int
    dropped: tuple[str, ...]

    @property
    def bytes_written(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that are read: pruned rows are skipped."""
        return sum(move.bytes_read for move in self.moves.values())

    @property
    def work(self) -> int:
        """What the progress counts: bytes of tensors, read and written."""
        return self.bytes_read + sum(move.target.size for move in self.moves.values())


def plan_stream(
    source: Path,
    masks: Masks,
    shape: Shape,
    shard_size: int,
    adapter: str | Path | None,
    arch_fallback: str,
) -> StreamPlan:
    """Check that checkpoint, masks and adapter belong together, and lay out the result.

    Raises:
        ValueError: they do not, or the checkpoint is quantised, damaged or not a known family.
    """
    config = _read_config(source)
    stored = _read_stored(source)
    require_same_model(masks, config, str(source))
    small = target_config(config, shape, arch_fallback)
    layout = _Layout.of(small, stored, family_of(config))
    tensors = layout.tensors
    cuts, whole = cuts_by_name(masks, small.model_type), _whole_sizes(masks, tensors)
    zeros = set(zero_tensors(config, small))
    loras = read_adapter(Path(adapter)) if adapter is not None else {}
    _require_fitting_adapter(adapter, loras, tensors)
    moves: dict[str, Move] = {}
    planned: list[Planned] = []
    used = set()
    for name, shape_out in layout.expected.items():
        if name in zeros:
            dtype = planned[-1].dtype  # of the weight that this is the bias of
            planned.append(Planned(name, dtype, shape_out, byte_size(dtype, list(shape_out))))
            continue
        cut = cuts.get(name)
        given = cut.source if cut is not None and cut.source else name
        if not layout.has(source, given, name):
            continue
        target = _result(tensors[given], name, cut, whole.get(given), shape_out)
        target = replace(target, name=layout.written_as(name))
        planned.append(target)
        moves[target.name] = Move(tensors[given], target, cut, loras.get(given))
        used.add(given)
    dropped = tuple(sorted(set(tensors) - used))
    shards = plan_shards(planned, shard_size)
    return StreamPlan(shape, small, moves, shards, layout.parameters, dropped)


def plan_two_four(source: Path, masks: Mapping[str, torch.Tensor], shard_size: int) -> StreamPlan:
    """Lay out a checkpoint whose masked weights become 0 and whose other bytes stay.

    Args:
        masks: (O, I) bool by the name of the linear; an empty dict checks the rest alone.

    Raises:
        ValueError: checkpoint and masks do not belong together, or the checkpoint is quantised,
            damaged or not a known family.
    """
    config = _read_config(source)
    family = family_of(config)
    layout = _Layout.of(config, _read_stored(source), family)
    waiting = {f"{name}.weight": m.T if family.transposed else m for name, m in masks.items()}
    moves: dict[str, Move] = {}
    planned: list[Planned] = []
    for name, shape in layout.expected.items():
        if not layout.has(source, name, name):
            continue
        tensor, mask = layout.tensors[name], waiting.pop(name, None)
        if mask is not None and (tuple(mask.shape) != shape or tensor.dtype not in TORCH_DTYPES):
            raise ValueError(
                f"the mask of {name} is {tuple(mask.shape)} and the weight {tensor.dtype} "
                f"{list(shape)} in {source}; use masks that were made for this model"
            )
        target = replace(_result(tensor, name, None, None, shape), name=layout.written_as(name))
        planned.append(target)
        moves[target.name] = Move(tensor, target, mask=mask)
    if waiting:
        raise ValueError(
            f"there is a mask of {next(iter(waiting))}, which {source} does not have; use masks "
            "that were made for this model"
        )
    shards = plan_shards(planned, shard_size)
    return StreamPlan(shape_of(config), config, moves, shards, layout.parameters, ())


@dataclass(frozen=True)
class _Layout:
    """The tensors that a model of some config needs, and where a checkpoint has them.

    expected: shapes by the model's own names, in the order in which they are written. tensors: the
    checkpoint's tensors by these names. disk_names: what it calls them.
    """

    family: Family
    expected: dict[str, tuple[int, ...]]
    tensors: dict[str, Stored]
    disk_names: dict[str, str]
    tied: dict[str, str]
    parameters: int

    @staticmethod
    def of(config: PreTrainedConfig, stored: dict[str, Stored], family: Family) -> _Layout:
        """Of a model of `config`, whose architecture is noted in it."""
        skeleton = _skeleton(config)
        config.architectures = [type(skeleton).__name__]
        expected = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        tied = dict(getattr(skeleton, "all_tied_weights_keys", None) or {})
        disk_names = _disk_names(stored, expected, skeleton.base_model_prefix, family)
        tensors = {name: stored[on_disk] for name, on_disk in disk_names.items()}
        _keep_tied(tensors, tied)
        # The order of transformers where names on disk differ from the model's.
        if family.on_disk:
            expected = {name: expected[name] for name in sorted(expected, key=_natural)}
        return _Layout(family, expected, tensors, disk_names, tied, int(skeleton.num_parameters()))

    def has(self, source: Path, given: str, name: str) -> bool:
        """Whether there is a tensor `given`, from which `name` is made; a tied one may be missing.

        Raises:
            ValueError: it is not.
        """
        if given not in self.tensors and name not in self.tied:
            raise ValueError(
                f"{source} lacks tensor {given}; its config.json promises it; the checkpoint is "
                "half-written or of another architecture: fetch it again"
            )
        return given in self.tensors

    def written_as(self, name: str) -> str:
        """The name of a tensor in the result."""
        return self.disk_names.get(name, name) if self.family.on_disk else name


def _read_stored(source: Path) -> dict[str, Stored]:
    stored = read_checkpoint(source)
    _refuse_quantised(source, stored)
    return stored


def _read_config(source: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    path = source / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        quantisation = content.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        raise ValueError(
            f"{path} is not a readable JSON object; fetch the checkpoint again"
        ) from None
    if quantisation:
        method = quantisation.get("quant_method") or quantisation.get("quant_algo") or "quantised"
        raise ValueError(
            f"{source} is quantised ({method}): masks cannot be folded into it exactly; export "
            "from the float16 or bfloat16 original, then quantise the result"
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a config transformers reads ({first})") from None
    family_of(config)
    return config


def _refuse_quantised(source: Path, stored: dict[str, Stored]) -> None:
    for name, tensor in stored.items():
        if name.endswith(QUANTISED_ENDINGS) or tensor.dtype.startswith(("F8", "F6_", "F4")):
            raise ValueError(
                f"{source} holds quantised weights ({name}, {tensor.dtype}): masks cannot be "
                "folded into them exactly; export from the float16 or bfloat16 original, then "
                "quantise the result"
            )


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model without storage: the names, shapes and order of its tensors."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _disk_names(
    stored: Iterable[str], expected: Mapping[str, tuple[int, ...]], prefix: str, family: Family
) -> dict[str, str]:
    """The names that a checkpoint gives its tensors, by the model's own names.

    Older checkpoints leave the name of the base model out (`h.0` for `transformer.h.0`).
    """

    def stock(name: str) -> str:
        candidates = (name, *family.stock_names(name), f"{prefix}.{name}")
        return next((n for n in candidates if n in expected), name)

    return {stock(name): name for name in stored}


def _natural(name: str) -> list[tuple[int, str, int]]:
    """A sort key by the parts of a name, numbers by value: in_proj, layers.2, layers.10, norm1."""

    def key(part: str) -> tuple[int, str, int]:
        stem = part.rstrip("0123456789")
        return bool(stem), stem, int(part[len(stem) :] or -1)

    return [key(part) for part in name.split(".")]


def _keep_tied(tensors: dict[str, Stored], tied: dict[str, str]) -> None:
    """One copy of weights that the config ties, under the name that transformers writes."""
    for copy, original in tied.items():
        if copy not in tensors:
            continue
        if original not in tensors:
            tensors[original] = tensors.pop(copy)
        elif _same_bytes(tensors[copy], tensors[original]):
            del tensors[copy]


def _same_bytes(a: Stored, b: Stored) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as one, b.file.open("rb") as two:
        one.seek(a.start)
        two.seek(b.start)
        left = a.size
        while left:
            n = min(left, 1 << 20)
            if one.read(n) != two.read(n):
                return False
            left -= n
    return True


def _whole_sizes(masks: Masks, names: Iterable[str]) -> dict[str, int]:
    """The size of each tensor along its cut, before it is cut: what masks of 1 keep."""
    layer = Masks(replace(masks.shape, layers=1), masks.head_unit, masks.family)
    first = {name: cut.keep.numel() for name, cut in cuts_by_name(layer).items()}
    stem = FAMILIES[masks.family].layers + "."
    sizes = {}
    for name in names:
        number, _, rest = name.removeprefix(stem).partition(".")
        if number.isdigit() and f"{stem}0.{rest}" in first:
            sizes[name] = first[f"{stem}0.{rest}"]
    return sizes


def _require_fitting_adapter(
    adapter: str | Path | None, loras: dict[str, Lora], tensors: dict[str, Stored]
) -> None:
    for name, lora in loras.items():
        if name not in tensors or tensors[name].shape != lora.shape:
            has = f"is {list(tensors[name].shape)} there" if name in tensors else "is not there"
            raise ValueError(
                f"adapter {adapter} changes {name} {list(lora.shape)}, which {has}; use the "
                "adapter that was trained on this model"
            )


def _result(
    tensor: Stored, name: str, cut: Cut | None, whole: int | None, expected: tuple[int, ...]
) -> Planned:
    shape = list(tensor.shape)
    if cut is not None and whole is not None:
        if tensor.dtype not in TORCH_DTYPES:
            raise ValueError(
                f"{tensor.file}: {name} is {tensor.dtype}; expected F64, F32, F16 or BF16 weights"
            )
        if cut.dim >= len(shape) or len(shape) > 2 or shape[cut.dim] != whole:
            raise ValueError(
                f"{tensor.file}: {name} is {shape}; config.json promises {whole} "
                f"along dimension {cut.dim}; the checkpoint is damaged or of another model"
            )
        shape[cut.dim] = cut.keep.numel()
    if tuple(shape) != expected:
        raise ValueError(
            f"{tensor.file}: {name} becomes {shape}; config.json promises {list(expected)}; the "
            "checkpoint is damaged or of another model"
        )
    return Planned(name, tensor.dtype, tuple(shape), byte_size(tensor.dtype, shape))
