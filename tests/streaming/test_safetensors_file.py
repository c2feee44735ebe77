"""Safetensors headers: checked in full, and written as the format's own library writes them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from maskprune.streaming.safetensors_file import (
    Planned,
    byte_size,
    index_json,
    parse_size,
    plan_shards,
    read_checkpoint,
    read_header,
)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_of_the_format_s_own_library_is_read(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.arange(4, dtype=torch.int64),
        "none": torch.empty(0, 5),
        "scalar": torch.tensor(3.0),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    found = read_header(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert stored.shape == tuple(tensor.shape)
        raw = path.read_bytes()[stored.start : stored.start + stored.size]
        assert raw == tensor.flatten().view(torch.uint8).numpy().tobytes()


def test_the_written_header_is_the_library_s_to_the_byte():
    tensors = {
        "z": torch.zeros(2, 3, dtype=torch.bfloat16),
        "m.é": torch.zeros(5),
        "a": torch.zeros(2, dtype=torch.float16),
        "i": torch.zeros(1, dtype=torch.int64),
        "q": torch.zeros(3, dtype=torch.bool),
        "d": torch.zeros(1, dtype=torch.float64),
    }
    names = {
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.bool: "BOOL",
        torch.float64: "F64",
    }
    planned = [
        Planned(n, names[t.dtype], tuple(t.shape), t.numel() * t.element_size())
        for n, t in tensors.items()
    ]
    (shard,) = plan_shards(planned, 10**9)
    assert shard.header == save(tensors, metadata={"format": "pt"})[: len(shard.header)]
    assert shard.size == len(save(tensors, metadata={"format": "pt"}))


def test_shards_are_those_of_the_hub_library():
    from huggingface_hub import split_torch_state_dict_into_shards

    generator = torch.Generator().manual_seed(0)
    for limit in (100, 400, 1000):
        sizes = torch.randint(1, 120, (30,), generator=generator).tolist()
        state = {f"t{i}": torch.zeros(n) for i, n in enumerate(sizes)}
        expected = split_torch_state_dict_into_shards(state, max_shard_size=limit)
        shards = plan_shards(
            [Planned(n, "F32", tuple(t.shape), 4 * t.numel()) for n, t in state.items()], limit
        )
        found = {t.name: s.file_name for s in shards for t in s.tensors}
        assert found == expected.tensor_to_filename
        index = json.loads(index_json(shards, 7))
        assert index["metadata"]["total_size"] == expected.metadata["total_size"]


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [1, 2])}


@pytest.mark.parametrize(
    "header, data, length, text",
    [
        (b"", b"", 2**63, "claims 9223372036854775808 bytes"),
        (b"{}", b"", 100, "it is cut short"),
        (b"\xff\xfe{}", b"", None, "not UTF-8"),
        (b"{", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        (b"[]", b"", None, "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", None, "'a' twice"),
        ({"a": {"dtype": "F32"}}, b"", None, "expected dtype, shape and data_offsets"),
        ({"a": entry(0, 8, [2], "F33")}, b"\0" * 8, None, "has dtype 'F33'"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, None, "whole numbers >= 0"),
        ({"a": entry(-8, 0, [2])}, b"\0" * 8, None, "whole numbers >= 0"),
        ({"a": entry(0, 8, [2.0])}, b"\0" * 8, None, "whole numbers >= 0"),
        ({"a": entry(0, 8, [True, 2])}, b"\0" * 8, None, "whole numbers >= 0"),
        ({"a": entry(0, 8, [2**62, 2**62])}, b"\0" * 8, None, "data_offsets span 8 bytes"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, None, "data_offsets span 8 bytes"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, None, "data_offsets span -8 bytes"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, None, "'b' overlaps 'a'"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, b"\0" * 20, None, "gap after 'a'"),
        (GOOD, b"\0" * 15, None, "promises 16 bytes of tensors, the file has 15: it is cut short"),
        (GOOD, b"\0" * 17, None, "it has bytes beyond them"),
        ({"__metadata__": {"a": 1}}, b"", None, "__metadata__ is not an object of strings"),
        ({"__metadata__": 3}, b"", None, "__metadata__ is not an object of strings"),
        (
            b'{"\\ud800": {"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
            b"\0" * 4,
            None,
            "Unicode",
        ),
    ],
)
def test_a_header_that_lies_is_named(tmp_path, header, data, length, text):
    path = write(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(ValueError, match=text) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_shorter_than_its_length_field_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (b"", b"\x01\x02"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected at least 8"):
            read_header(path)


def test_every_prefix_of_a_file_is_refused(tmp_path):
    whole = save({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    path = tmp_path / "x.safetensors"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError):
            read_header(path)
    path.write_bytes(whole)
    assert len(read_header(path)) == 2


SCRATCH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WHOLE = save({"a": torch.ones(3), "b": torch.ones(2, 2).half()}, metadata={"format": "pt"})


def require_inside(path: Path) -> None:
    """Whatever the bytes: a ValueError, or tensors that lie inside the file and do not overlap."""
    try:
        found = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    at = 0
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.start + t.size)):
        assert tensor.start >= at and tensor.size == byte_size(tensor.dtype, tensor.shape)
        at = tensor.start + tensor.size
    assert at <= path.stat().st_size


@SCRATCH
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_are_read_or_refused(tmp_path, content, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content)
    require_inside(path)


@SCRATCH
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6))
def test_any_flipped_bytes_are_read_or_refused(tmp_path, changes):
    content = bytearray(WHOLE)
    for place, value in changes:
        content[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    require_inside(path)


NUMBERS = st.one_of(
    st.integers(-3, 20), st.sampled_from([2**31, 2**63, 2**64, 10**30]), st.floats()
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "nope", 3, None]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), st.none(), st.text(max_size=3)),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.none()),
    }
)


@SCRATCH
@given(st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4), st.integers(0, 40))
def test_any_json_header_is_read_or_refused(tmp_path, header, size):
    path = tmp_path / "x.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * size)
    require_inside(path)


def sharded(folder: Path, weight_map: object) -> Path:
    (folder / "one.safetensors").write_bytes(save({"a": torch.ones(2)}))
    (folder / "two.safetensors").write_bytes(save({"b": torch.ones(2)}))
    index = {"weight_map": weight_map} if not isinstance(weight_map, str) else weight_map
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_shards_are_read_through_their_index(tmp_path):
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    found = read_checkpoint(folder)
    assert {n: t.file.name for n, t in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    "weight_map, text",
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "names three.safetensors, which is"),
        ({"a": "two.safetensors"}, "says tensor a is in two.safetensors; it is not"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "says tensor c is in two.safetensors"),
        ({"a": "../one.safetensors"}, "expected a plain file name"),
        ({"a": 3}, "expected a plain file name"),
        ([], "not an index with a weight_map"),
        ("{", "not an index with a weight_map"),
        ("[" * 100_000, "not an index with a weight_map"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, weight_map, text):
    with pytest.raises(ValueError, match=text):
        read_checkpoint(sharded(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    (folder / "two.safetensors").write_bytes(save({"a": torch.ones(2), "b": torch.ones(2)}))
    with pytest.raises(ValueError, match="tensor a is in one.safetensors and in two.safetensors"):
        read_checkpoint(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a safetensors checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5GiB", 3 * 2**29), (77, 77), ("20 kb", 20_000)],
)
def test_sizes_are_parsed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 bananas"])
def test_texts_that_are_not_sizes_are_refused(text):
    with pytest.raises(ValueError, match="expected a size such as '5GB'"):
        parse_size(text)
