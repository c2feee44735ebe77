"""Safetensors without loading: headers checked in full, shards planned and written in order.

A file is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype,
shape and byte range, and the bytes. A header may lie: whatever is wrong with it ends in a
ValueError that names the file, never in a read outside it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from maskprune.files import JsonObject

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The limit of the format's own library.
MAX_HEADER_BYTES = 100_000_000

# Bits of one element, in the order in which the format's own library sorts the tensors of a file.
DTYPE_BITS = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_DTYPE_ORDER = {name: place for place, name in enumerate(DTYPE_BITS)}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: `size` bytes from byte `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class Planned:
    """One tensor to be written, `size` bytes from byte `start` of its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int = 0


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its header, and its tensors in the order of their bytes."""

    file_name: str
    header: bytes
    tensors: tuple[Planned, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


def byte_size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a known dtype."""
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name, with their byte ranges checked.

    Raises:
        ValueError: not a safetensors file, cut short, or a header that contradicts itself or the
            file: says what is wrong and where.
    """
    try:
        header, available = _load_header(path)
        tensors = {name: _stored(path, name, entry, header[1]) for name, entry in header[0]}
        _require_no_gaps(tensors.values(), header[1], available)
    except _Wrong as wrong:
        raise ValueError(f"{path}: {wrong}; download or save the file again") from None
    return tensors


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder: one `model.safetensors`, or shards with their index.

    Raises:
        ValueError: no safetensors there, shards missing, tensors missing or in two shards.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return read_header(folder / SINGLE_NAME)
        raise ValueError(
            f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; "
            "expected a safetensors checkpoint"
        )
    weight_map = _read_index(index)
    tensors: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not path.is_file():
            raise ValueError(f"{index} names {file_name}, which is not there; download it again")
        for name, stored in read_header(path).items():
            if name in tensors:
                raise ValueError(
                    f"{index}: tensor {name} is in {tensors[name].file.name} and in {file_name}; "
                    "expected it once; save the checkpoint again"
                )
            tensors[name] = stored
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{index} says tensor {name} is in {file_name}; it is not")
    return tensors


def plan_shards(tensors: Iterable[Planned], max_shard_size: int) -> list[Shard]:
    """Tensors to files of at most `max_shard_size` bytes of tensors (one tensor may be larger).

    Filled in the given order, as transformers does; sorted within a file by dtype and name, as the
    format's own library does; so the files are theirs, byte for byte.
    """
    groups: list[list[Planned]] = []
    current: list[Planned] = []
    filled = 0
    for tensor in tensors:
        if tensor.size > max_shard_size:
            groups.append([tensor])
            continue
        if filled + tensor.size > max_shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.size
    if current or not groups:
        groups.append(current)
    names = [SINGLE_NAME]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def index_json(shards: Sequence[Shard], total_parameters: int) -> str:
    """The content of `model.safetensors.index.json`, as transformers writes it."""
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.size for shard in shards for tensor in shard.tensors)
    content = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": weight_map,
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def parse_size(size: int | str) -> int:
    """Bytes of `5GB`, `200MB`, `1.5GiB` or a plain number.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", str(size), re.IGNORECASE)
    if match:
        unit = (match[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        count = int(float(match[1]) * base ** "_KMGT".index(unit[:1] or "_"))
        if count > 0:
            return count
    raise ValueError(f"max_shard_size is {size!r}; expected a size such as '5GB' or '500MB'")


class _Wrong(Exception):
    """What is wrong with a file; the caller adds its name."""


def _load_header(path: Path) -> tuple[tuple[list[tuple[str, object]], int], int]:
    """((tensor entries, first byte of the data), bytes of the data)."""
    with path.open("rb") as file:
        total = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        if len(head) < 8:
            raise _Wrong(f"{total} bytes are not a safetensors file; expected at least 8")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER_BYTES:
            raise _Wrong(f"the header claims {length} bytes; expected at most {MAX_HEADER_BYTES}")
        if 8 + length > total:
            raise _Wrong(f"the header claims {length} bytes, the file has {total}: it is cut short")
        raw = file.read(length)
    if len(raw) != length:
        raise _Wrong("the file shrank while it was read")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise _Wrong(f"the header is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _Wrong("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong("__metadata__ is not an object of strings")
    return (list(header.items()), 8 + length), total - 8 - length


def _no_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    unique: JsonObject = {}
    for name, value in pairs:
        if name in unique:
            raise _Wrong(f"the header has {name[:80]!r} twice")
        unique[name] = value
    return unique


def _stored(path: Path, name: str, entry: object, data_at: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"tensor {name!r}: expected dtype, shape and data_offsets")
    if name.encode("utf-8", "replace").decode() != name:
        raise _Wrong(f"tensor name {name!r} is not Unicode text")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Wrong(
            f"tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(DTYPE_BITS)}"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _Wrong(
            f"tensor {name!r} has shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}; "
            "expected whole numbers >= 0, two offsets"
        )
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        raise _Wrong(
            f"tensor {name!r}: data_offsets span {end - begin} bytes; "
            f"{dtype} {str(shape)[:80]} takes {bits} bits"
        )
    return Stored(name, dtype, tuple(shape), path, data_at + begin, end - begin)


def _naturals(values: object) -> bool:
    # Bounded, so that a product of them stays cheap.
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _require_no_gaps(tensors: Iterable[Stored], data_at: int, available: int) -> None:
    reached, before = data_at, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.start, t.start + t.size)):
        if tensor.start != reached:
            word = "overlaps" if tensor.start < reached else "leaves a gap after"
            raise _Wrong(f"tensor {tensor.name!r} {word} {before!r}")
        reached, before = tensor.start + tensor.size, tensor.name
    if reached - data_at != available:
        state = "it is cut short" if reached - data_at > available else "it has bytes beyond them"
        raise _Wrong(
            f"the header promises {reached - data_at} bytes of tensors, the file has {available}: "
            f"{state}"
        )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes().decode("utf-8"))["weight_map"]
        well_formed = isinstance(weight_map, dict) and weight_map
    except (ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{index} is not an index with a weight_map; download it again")
    for name, file_name in weight_map.items():
        # A name with a folder in it could point anywhere on the disk.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ValueError(f"{index} puts {name} into {file_name!r}; expected a plain file name")
    return weight_map


def _shard(file_name: str, group: list[Planned]) -> Shard:
    ordered = sorted(group, key=lambda t: (_DTYPE_ORDER[t.dtype], t.name.encode()))
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    at, ranges = 0, []
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        ranges.append(at)
        at += tensor.size
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = struct.pack("<Q", len(raw)) + raw
    placed = tuple(
        Planned(t.name, t.dtype, t.shape, t.size, len(raw) + begin)
        for t, begin in zip(ordered, ranges, strict=True)
    )
    return Shard(file_name, raw, placed)
