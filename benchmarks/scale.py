"""Memory of each process of a run and time of its steps, over the number of processes.

    python -m benchmarks.scale memory --rows benchmarks/results/scale.jsonl --overwrite
    python -m benchmarks.scale time --rows benchmarks/results/scale.jsonl --overwrite

Starts the processes as torchrun does, on the CPU over gloo, with random models. `memory`: the peak
resident set of the training steps above what the code itself holds after it has trained a tiny
model, the largest of all processes, against what `maskprune plan` says; with one process nothing
is shared, with more `--shard full` shares all. Linux only: the kernel counts. `time`: median of
steps with the same global batch, in rounds that take the ways in turn.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, TrainerCallback

from benchmarks.harness import Parser, environment, show, write_rows
from benchmarks.harness.memory import restart_peak, status_kib

# Blocks that are small against the whole, and a vocabulary and text that are small against both.
SHAPES: dict[str, dict[str, int]] = {
    "prune": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, head_dim=128),
    "two-four": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, head_dim=64),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=8),
    "step": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, head_dim=64),
}
SETTINGS: dict[str, Any] = dict(steps=20, save_steps=1000, logging_steps=1000, autocast="none")
VOCAB = 512
Row = dict[str, Any]


class Enough(Exception):
    """The steps that are measured are done."""


class Steps(TrainerCallback):
    """Notes when each step ends, and stops after the last one."""

    def __init__(self, count: int) -> None:
        self.count, self.ends = count, [time.perf_counter()]

    def on_step_end(self, *_: Any, **kw: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > self.count:
            raise Enough


def config_of(shape: str) -> LlamaConfig:
    sizes = SHAPES[shape]
    heads = sizes["hidden_size"] // sizes["head_dim"]
    return LlamaConfig(
        vocab_size=VOCAB,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        tie_word_embeddings=False,
        dtype="float32",
        **sizes,
    )


def train(kind: str, folder: Path, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a run on the model in `folder`: peak resident bytes, seconds of each step."""
    from maskprune.commands.run_folder import load_to_train
    from maskprune.config import PruneConfig, SparsifyConfig
    from maskprune.structured.prune import prune
    from maskprune.training.trainer import BlockTrainer
    from maskprune.two_four.sparsify import sparsify

    found: dict[str, Any] = {}
    honest = BlockTrainer.train

    def counted(self: BlockTrainer, *args: Any, **kw: Any) -> Any:
        watch = Steps(steps)
        self.add_callback(watch)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        restart_peak()
        try:
            return honest(self, *args, **kw)
        finally:
            found["peak"] = status_kib("VmHWM") * 1024
            found["seconds"] = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, VOCAB, (256, settings["seq_len"]), generator=generator)
    BlockTrainer.train = counted  # type: ignore[method-assign]
    sharded = settings["shard"] == "full" and int(os.environ["WORLD_SIZE"]) > 1
    model, _ = load_to_train(str(folder), "float32", "cpu", sharded)
    try:
        if kind == "two-four":
            config = SparsifyConfig(prior="none", **settings)
            sparsify(model, None, blocks, config, quiet=True)
        else:
            config = PruneConfig(
                sparsity=0.3,
                warm_start="wanda-sp",
                warm_start_blocks=4,
                compensate=False,
                multiple_of=8,
                **settings,
            )
            prune(model, None, blocks, config, quiet=True)
    except Enough:
        pass
    finally:
        BlockTrainer.train = honest  # type: ignore[method-assign]
    return found


def work(job: dict[str, Any]) -> None:
    """One process: the code's own memory by a tiny run, then the run."""
    from maskprune.training.allocator import return_freed_memory
    from maskprune.training.distributed import rank, start

    torch.set_num_threads(job["threads"])
    return_freed_memory()
    start("cpu")
    folder = Path(job["folder"])
    train(job["kind"], folder / "tiny", 3, job["settings"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own = status_kib("VmRSS") * 1024
    found = train(job["kind"], folder / job["shape"], job["steps"], job["settings"])
    Path(job["out"], f"{rank()}.json").write_text(json.dumps(found | {"own": own}))


def run(processes: int, job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What each of `processes` processes found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        given = json.dumps(job | {"folder": str(folder), "out": out})
        command = [sys.executable, "-m", "benchmarks.scale", "work", "--job", given]
        network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        started = [
            subprocess.Popen(
                command,
                env=os.environ | network | count | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stderr=subprocess.DEVNULL if r else None,
            )
            for r in range(processes)
        ]
        if any([process.wait() for process in started]):
            raise SystemExit(f"{processes} processes: one has failed")
        return [json.loads(Path(out, f"{r}.json").read_text()) for r in range(processes)]


def write_models(folder: Path, shapes: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    for shape in shapes:
        LlamaForCausalLM(config_of(shape)).save_pretrained(folder / shape)
        tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
            folder / shape
        )


def memory(kinds: list[str], counts: list[int], steps: int, seed: int) -> Iterator[Row]:
    from maskprune.training.memory_plan import Load, memory_parts

    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), [*kinds, "tiny"])
        for kind in kinds:
            settings = SETTINGS | dict(batch_size=4, seq_len=8, shard="full")
            if kind == "prune":
                settings |= dict(lora_r=32, output_r=64)
            job = dict(kind=kind, shape=kind, steps=steps, settings=settings, threads=1)
            for n in counts:
                found = run(n, job, Path(name))
                own = max(one["own"] for one in found)
                above = max(one["peak"] - one["own"] for one in found)
                load = Load(
                    two_four=kind == "two-four",
                    batch_size=4,
                    seq_len=8,
                    lora_r=32,
                    output_r=64,
                    sharded=True,
                    computed=4,
                )
                parts = memory_parts(config_of(kind), load, n)
                planned = sum(parts.values())
                yield (
                    {
                        "op": "scale_memory",
                        "provider": kind,
                        **SHAPES[kind],
                        "processes": n,
                        "peak_gb": round(above / 1e9, 3),
                        "planned_gb": round(planned / 1e9, 3),
                        "of_plan": round(above / planned, 3),
                        "code_gb": round(own / 1e9, 3),
                        "parts_gb": {name: round(v / 1e9, 4) for name, v in parts.items()},
                    }
                    | environment("cpu", seed)
                    | {"threads": 1}
                )


def times(kinds: list[str], rounds: int, steps: int, seed: int) -> Iterator[Row]:
    ways = [(1, "none"), (2, "none"), (2, "full")]
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), ["step", "tiny"])
        for kind in kinds:
            seconds: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
            for number in range(rounds):
                for n, shard in ways[number % 3 :] + ways[: number % 3]:
                    settings = SETTINGS | dict(batch_size=8, seq_len=128, shard=shard)
                    job = dict(kind=kind, shape="step", steps=steps, settings=settings, threads=1)
                    found = run(n, job, Path(name))
                    # The first step makes what the others reuse.
                    seconds[n, shard] += found[0]["seconds"][1:]
            alone = statistics.median(seconds[1, "none"])
            for n, shard in ways:
                median = statistics.median(seconds[n, shard])
                yield (
                    {
                        "op": "scale_time",
                        "provider": kind,
                        **SHAPES["step"],
                        "processes": n,
                        "shard": shard,
                        "tokens": 8 * 128,
                        "step_s": round(median, 4),
                        "of_one_process": round(median / alone, 3),
                        "steps": len(seconds[n, shard]),
                        "rounds": rounds,
                    }
                    | environment("cpu", seed)
                    | {"threads": 1}
                )


COLUMNS = {
    "memory": (
        "provider",
        "processes",
        "peak_gb",
        "planned_gb",
        "of_plan",
        "code_gb",
    ),
    "time": ("provider", "processes", "shard", "step_s", "of_one_process"),
}
MEASURED = (
    "id",
    "date",
    "commit",
    "peak_gb",
    "planned_gb",
    "of_plan",
    "code_gb",
    "parts_gb",
    "step_s",
    "of_one_process",
    "cpu",
)


def main(given: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.set_defaults(rounds=3)
    parser.add_argument("what", choices=("memory", "time", "work"))
    parser.add_argument("--kinds", nargs="+", default=["prune", "two-four"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="of each run")
    parser.add_argument("--job", help="of a process, by the benchmark itself")
    args = parser.parse_args(given)
    if args.what == "work":
        work(json.loads(args.job))
        return 0
    if args.what == "memory":
        rows = memory(args.kinds, args.processes, args.steps, args.seed)
    else:
        rows = times(args.kinds, args.rounds, args.steps, args.seed)
    found = []
    for row in rows:
        found.append(row)
        if args.rows:
            write_rows(args.rows, [row], overwrite=args.overwrite, ignore=MEASURED)
    print(show(found, COLUMNS[args.what]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
