"""Fold, gather and the streaming export: against torch, against `cp`, and in memory.

    python -m benchmarks.ops.fold ops
    python -m benchmarks.ops.fold stream --gb 4
    python -m benchmarks.ops.fold memory --gb 1 4 8

`ops` times one 4096 x 11008 weight. `stream` exports a synthetic sharded Llama from tmpfs to tmpfs
and copies it with `cp -r`, in turn; both speeds count bytes read plus bytes written. `memory` runs
one export per size in a process of its own: what the process holds after its imports is its own
(`rss_base_mb`), the peak above that is the export's. The page cache is not counted.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    Parser,
    environment,
    fix_threads,
    interleaved,
    measure,
    show,
    write_rows,
)
from maskprune import ops
from maskprune.hf.shape import Shape
from maskprune.streaming.safetensors_file import (
    Planned,
    byte_size,
    index_json,
    plan_shards,
    read_checkpoint,
)
from maskprune.structured.masks import Masks, load_masks

O, I = 4096, 11008  # noqa: E741
KEPT = 0.6
COLUMNS = ("op", "provider", "threads", "median_ms", "p10_ms", "p90_ms", "gb_s", "speedup")


def with_speedup(rows: list[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """Each row with how many times faster than the provider `base` it is."""
    slow = next((row["median_ms"] for row in rows if row["provider"] == base), None)
    return [row | {"speedup": round(slow / row["median_ms"], 3) if slow else None} for row in rows]


def ops_rows(threads: int, seed: int, rounds: int) -> list[dict[str, Any]]:
    """fold_columns on W_down and gather_rows on W_up, alone and together, per thread count."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(O, I, generator=generator).bfloat16()
    up = torch.randn(I, O, generator=generator).bfloat16()
    scale = torch.rand(I, generator=generator)
    narrow = scale.bfloat16()
    keep = torch.randperm(I, generator=generator)[: int(KEPT * I)].sort().values
    folded, rows = ops.fold_columns(down, scale, keep, backend="reference"), up[keep]
    fold_bytes = 2 * (down.numel() + folded.numel())
    gather_bytes = 2 * 2 * rows.numel()
    cases: list[tuple[str, dict[str, Callable[[], Any]], Any, int]] = [
        (
            "fold_columns",
            {
                "torch (W * s)[:, keep]": lambda: (down * scale)[:, keep],
                "torch (W * s.bfloat16())[:, keep]": lambda: (down * narrow)[:, keep],
                "torch (W.float() * s).bfloat16()[:, keep]": lambda: (
                    down.float() * scale
                ).bfloat16()[:, keep],
                "cpp": lambda: ops.fold_columns(down, scale, keep, backend="cpp"),
                "reference": lambda: ops.fold_columns(down, scale, keep, backend="reference"),
            },
            folded,
            fold_bytes,
        ),
        (
            "gather_rows",
            {
                "torch W[keep]": lambda: up[keep],
                "cpp": lambda: ops.gather_rows(up, keep, backend="cpp"),
            },
            rows,
            gather_bytes,
        ),
        (
            "fold_columns + gather_rows",
            {
                "torch (W * s)[:, keep], W[keep]": lambda: ((down * scale)[:, keep], up[keep]),
                "cpp": lambda: (
                    ops.fold_columns(down, scale, keep, backend="cpp"),
                    ops.gather_rows(up, keep, backend="cpp"),
                ),
            },
            (folded, rows),
            fold_bytes + gather_bytes,
        ),
    ]
    every = []
    for op, providers, expected, moved in cases:

        def check(name: str, output: Any, expected: Any = expected) -> None:
            exact = name in ("cpp", "reference") or "float()" in name or name == "torch W[keep]"
            tolerance = 0.0 if exact else 2**-6
            torch.testing.assert_close(
                output, expected, rtol=tolerance, atol=0.0, check_dtype=False
            )

        measured = measure(
            op,
            providers,
            check=check,
            sizes={"O": O, "I": I, "K": keep.numel(), "dtype": "bfloat16"},
            bytes_moved=moved,
            seed=seed,
            rounds=rounds,
            warmup=1,
        )
        every += with_speedup(measured, next(iter(providers)))
    return every


def synthetic(folder: Path, size: float, seed: int = 0) -> tuple[Path, Path, int]:
    """A sharded bfloat16 Llama of about `size` bytes, and masks that keep 60 % of it.

    Returns (checkpoint folder, masks file, bytes of the checkpoint's tensors).
    """
    d, F, H, V = (4096, 11008, 32, 32000) if size >= 9e8 else (1024, 2816, 16, 8000)
    layer = 2 * (4 * d * d + 3 * d * F)
    layers = max(1, round((size - 2 * 2 * V * d) / layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": F,
        "num_attention_heads": H,
        "num_key_value_heads": H,
        "num_hidden_layers": layers,
        "vocab_size": V,
        "head_dim": d // H,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, d)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = (d, d)
        for name, shape in (("gate", (F, d)), ("up", (F, d)), ("down", (d, F))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (d,)
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (V, d)}
    planned = [Planned(n, "BF16", s, byte_size("BF16", s)) for n, s in shapes.items()]
    shards = plan_shards(planned, int(min(5e9, max(size / 4, 1e7))))
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 22, generator=generator).bfloat16().view(torch.uint8).numpy().tobytes()
    for shard in shards:
        with (source / shard.file_name).open("wb") as file:
            file.write(shard.header)
            left = sum(tensor.size for tensor in shard.tensors)
            while left:
                left -= file.write(block[: min(left, len(block))])
    if len(shards) > 1:
        (source / "model.safetensors.index.json").write_text(index_json(shards, 0))
    masks = Masks(Shape(layers, H, H, d // H, F), "kv_group", "llama")
    with torch.no_grad():
        for m in (masks.head, masks.ffn):
            m.uniform_(0.1, 1.0, generator=generator)
            gone = torch.rand(m.shape, generator=generator).argsort(dim=1)
            m.scatter_(1, gone[:, int(KEPT * m.shape[1]) :], 0.0)
    masks.save(folder / "masks.safetensors")
    return source, folder / "masks.safetensors", sum(tensor.size for tensor in planned)


def require_right(source: Path, masks_file: Path, out: Path) -> None:
    """Check a folded, a gathered and a copied tensor of `out`; raises AssertionError."""
    from maskprune.streaming.lora import load_tensor

    before, after, masks = read_checkpoint(source), read_checkpoint(out), load_masks(masks_file)
    m = masks.ffn[0].detach()
    keep = m.nonzero().flatten()

    def both(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return load_tensor(before[name]), load_tensor(after[name])

    w, given = both("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(given, ops.fold_columns(w, m, keep, backend="reference"))
    w, given = both("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(given, w[keep])
    w, given = both("model.norm.weight")
    assert torch.equal(given, w)


def stream_rows(gb: float, where: Path, threads: int, seed: int, rounds: int) -> list[dict]:
    """The streaming export and `cp -r` of its source, in turn, each into a new folder."""
    from maskprune.streaming.export import export_checkpoint

    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        source, masks_file, size = synthetic(folder, gb * 1e9, seed)
        out, copy = folder / "out", folder / "copy"

        def clear() -> None:
            for made in (out, copy):
                shutil.rmtree(made, ignore_errors=True)

        def export() -> Any:
            return export_checkpoint(source, masks_file, out, progress=False)

        def copy_all() -> None:
            subprocess.run(["cp", "-r", str(source), str(copy)], check=True)

        done = export()
        require_right(source, masks_file, out)
        times = interleaved(
            {"cp": copy_all, "stream": export}, before=clear, rounds=rounds, warmup=1
        )
    moved = {"cp": 2 * size, "stream": done.bytes_read + done.bytes_written}
    every = []
    for provider, taken in times.items():
        speed = moved[provider] / taken.quantile(0.5) / 1e6
        sizes = {"gb": gb, "bytes_moved": moved[provider], "where": str(where)}
        row = {"op": "export_checkpoint", "provider": provider, **sizes, **taken.row()}
        every.append(row | {"gb_s": round(speed, 3), "checked": True} | environment("cpu", seed))
    share = every[1]["gb_s"] / every[0]["gb_s"]
    every[1]["share_of_cp"] = round(share, 3)
    return every


MEASURE_MEMORY = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from maskprune.streaming.export import export_checkpoint

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

source, masks, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=1))
Path("/proc/self/clear_refs").write_text("5")
base = kilobytes("VmRSS")
export_checkpoint(source, masks, out, progress=False)
print(json.dumps({"rss_base_mb": base / 1e3, "rss_peak_mb": kilobytes("VmHWM") / 1e3}))
"""


def memory_rows(sizes: Iterable[float], where: Path, threads: int, seed: int) -> list[dict]:
    """Peak resident memory of one export per size, above what the imports take."""
    every = []
    for gb in sizes:
        with tempfile.TemporaryDirectory(dir=where) as name:
            folder = Path(name)
            source, masks_file, _ = synthetic(folder, gb * 1e9, seed)
            arguments = [str(source), str(masks_file), str(folder / "out"), str(threads)]
            done = subprocess.run(
                [sys.executable, "-c", MEASURE_MEMORY, *arguments],
                check=True,
                capture_output=True,
                text=True,
            )
            require_right(source, masks_file, folder / "out")
        row = json.loads(done.stdout.splitlines()[-1])
        row["rss_above_mb"] = round(row["rss_peak_mb"] - row["rss_base_mb"], 1)
        row = {"op": "export_checkpoint", "provider": "memory", "gb": gb, **row, "checked": True}
        every.append(row | environment("cpu", seed))
    return every


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ops", "stream", "memory"))
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0], help="checkpoint sizes")
    parser.add_argument("--where", type=Path, default=Path("/dev/shm"), help="folder to work in")
    args = parser.parse_args()
    most = fix_threads(args.threads)
    rows: list[dict[str, Any]] = []
    if args.what == "ops":
        counts = [args.threads] if args.threads else sorted({1, *range(2, most, 2), most})
        for threads in counts:
            fix_threads(threads)
            rows += ops_rows(threads, args.seed, args.rounds)
        print(show(rows, COLUMNS))
    elif args.what == "stream":
        for gb in args.gb:
            rows += stream_rows(gb, args.where, most, args.seed, min(args.rounds, 5))
        print(show(rows, ("provider", "gb", "threads", "median_ms", "gb_s", "share_of_cp")))
    else:
        rows = memory_rows(args.gb, args.where, most, args.seed)
        print(show(rows, ("gb", "rss_base_mb", "rss_peak_mb", "rss_above_mb")))
    if args.rows:
        write_rows(args.rows, rows, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
