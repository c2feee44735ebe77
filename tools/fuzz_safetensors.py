"""Fuzz the safetensors reader and the streaming loop, bounded in time; made for AddressSanitizer.

    CFLAGS="-fsanitize=address -g" LDFLAGS="-fsanitize=address" \
        python setup.py build_ext --build-lib build/asan --build-temp build/asan-objects
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) \
        $(gcc -print-file-name=libstdc++.so)" \
        python tools/fuzz_safetensors.py --seconds 60 --extension build/asan/maskprune/_C*.so

Each round damages a good file at random. A header that is refused must be refused with a
ValueError; what one accepts must lie inside the file, and every tensor of it is then streamed
through random cuts by the C++ loop and by the Python loop, which must agree to the byte. With
`--extension` the operations come from that build instead of the installed one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path


def load_extension(path: str) -> None:
    """Put the given build in the place of `maskprune._C`."""
    spec = importlib.util.spec_from_file_location("maskprune._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["maskprune._C"] = module
    spec.loader.exec_module(module)


def good_file(rng: random.Random) -> bytes:
    import torch
    from safetensors.torch import save

    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)
    tensors = {}
    for i in range(rng.randint(0, 4)):
        shape = [rng.choice((0, 1, 2, 7, 33, 70)) for _ in range(rng.randint(0, 3))]
        raw = torch.randint(0, 100, shape, dtype=torch.int8)
        tensors[f"t{i}"] = raw.to(rng.choice(dtypes))
    return save(tensors, metadata={"format": "pt"})


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some of: flipped bytes, digits replaced, a cut, an insertion, another header length."""
    data = bytearray(content)
    for _ in range(rng.randint(0, 3)):
        kind, place = rng.randint(0, 4), rng.randrange(len(data))
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789-.e")
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        else:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, rng.randrange(2**64))))
        if len(data) < 8:
            break
    return bytes(data)


def random_cut(shape: tuple[int, ...], rng: random.Random):
    import torch

    from maskprune.structured.cuts import Cut

    dim = 0 if len(shape) == 1 else rng.randint(0, 1)
    if rng.random() < 0.1 or not shape[dim]:
        return None
    kept = sorted(rng.sample(range(shape[dim]), rng.randint(0, shape[dim])))
    folded = len(shape) == 2 and rng.random() < 0.6
    scale = torch.tensor([rng.choice((0.0, 1.0, rng.random())) for _ in range(shape[dim])])
    return Cut(dim, torch.tensor(kept, dtype=torch.int64), scale if folded else None)


def stream_all(path: Path, rng: random.Random) -> int:
    """Stream every tensor of a file that was accepted; how many."""
    import maskprune.streaming.move as ts
    from maskprune.streaming.progress import ByteProgress
    from maskprune.streaming.safetensors_file import Planned, byte_size, read_header

    tensors = read_header(path)
    size = path.stat().st_size
    ts.BLOCK_BYTES = rng.choice((1, 100, 5000, 1 << 19))
    ts.PIECE_BYTES = rng.choice((1000, 1 << 26))
    source = os.open(path, os.O_RDONLY)
    outs = [path.with_suffix(f".{i}") for i in range(2)]
    for tensor in tensors.values():
        assert tensor.start + tensor.size <= size, tensor
        cuttable = tensor.dtype in ts.TORCH_DTYPES and len(tensor.shape) in (1, 2)
        cut = random_cut(tensor.shape, rng) if cuttable and tensor.size else None
        shape = list(tensor.shape)
        if cut is not None:
            shape[cut.dim] = cut.keep.numel()
        at = rng.choice((0, 8, 13))
        target = Planned(
            tensor.name, tensor.dtype, tuple(shape), byte_size(tensor.dtype, shape), at
        )
        for out, backend in zip(outs, ("auto", "reference"), strict=True):
            with out.open("wb", buffering=0) as file:
                mover = ts.Mover(ByteProgress(0, "", False), rng.randint(1, 3), backend)
                mover.move(ts.Move(tensor, target, cut), source, file.fileno())
        assert outs[0].read_bytes() == outs[1].read_bytes(), (tensor, cut)
    os.close(source)
    return len(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extension", help="a build of maskprune._C to load")
    args = parser.parse_args()
    if args.extension:
        load_extension(args.extension)
    from maskprune.ops.backend import extension

    if extension() is None:
        sys.exit("fuzz_safetensors: the C++ extension is not built")
    end = time.monotonic() + args.seconds
    rounds = accepted = streamed = 0
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        while time.monotonic() < end:
            rng = random.Random(args.seed * 1_000_003 + rounds)
            content = good_file(rng)
            path.write_bytes(damaged(content, rng) if rng.random() < 0.7 else content)
            try:
                streamed += stream_all(path, rng)
                accepted += 1
            except ValueError as error:
                assert str(path) in str(error), error
            except BaseException:
                print(f"fuzz_safetensors: seed {args.seed}, round {rounds}", file=sys.stderr)
                raise
            rounds += 1
    print(f"{rounds} files, {accepted} accepted, {streamed} tensors streamed: ok")


if __name__ == "__main__":
    main()
