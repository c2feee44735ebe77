"""Memory of each process of a run and time of its steps, over the number of processes.

    python -m benchmarks.scale memory --rows benchmarks/results/scale.jsonl --overwrite
    python -m benchmarks.scale time --rows benchmarks/results/scale.jsonl --overwrite

Starts the processes as torchrun does, on the CPU over gloo, with random models. `memory`: the peak
resident set of the training steps above what the code itself holds after it has trained a tiny
model, the largest of all processes, against what `maskprune plan` says; with one process nothing
is shared, with more `--shard full` shares all. Linux only: the kernel counts. `time`: steps with
the same global batch; all ways run at once and take turns of one step each, in which the others
wait, so that ratios within a round mean something on a machine with other work. Beside the time
stands the processor time of the process that took most of it, which other work changes less.
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
    "step": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, head_dim=64),
}
SETTINGS: dict[str, Any] = dict(steps=20, save_steps=1000, logging_steps=1000, autocast="none")
VOCAB = 512
Row = dict[str, Any]


class Enough(Exception):
    """The steps that are measured are done."""


class Steps(TrainerCallback):
    """Stops after some steps."""

    def __init__(self, count: int) -> None:
        self.left = count

    def on_step_end(self, *_: Any, **kw: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Enough


class Turns(TrainerCallback):
    """A step for each line of standard input, and its seconds as a line of standard output."""

    def on_step_begin(self, *_: Any, **kw: Any) -> None:
        if not sys.stdin.readline():
            raise Enough
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **kw: Any) -> None:
        wall, cpu = (
            now - then
            for now, then in zip(
                (time.perf_counter(), time.process_time()), self.began, strict=True
            )
        )
        print(json.dumps({"step_s": wall, "cpu_s": cpu}), flush=True)


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


def train(kind: str, folder: Path, watch: TrainerCallback, settings: dict[str, Any]) -> int:
    """The steps of a run on the model in `folder` that `watch` lets pass: peak resident bytes."""
    from maskprune.commands.run_folder import load_to_train
    from maskprune.config import PruneConfig, SparsifyConfig
    from maskprune.structured.prune import prune
    from maskprune.training.trainer import BlockTrainer
    from maskprune.two_four.sparsify import sparsify

    peak = 0
    honest = BlockTrainer.train

    def counted(self: BlockTrainer, *args: Any, **kw: Any) -> Any:
        nonlocal peak
        self.add_callback(watch)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        restart_peak()
        try:
            return honest(self, *args, **kw)
        finally:
            peak = status_kib("VmHWM") * 1024

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
    return peak


def work(job: dict[str, Any]) -> None:
    """One process: for memory the code's own by a tiny run, then the run."""
    from maskprune.training.allocator import return_freed_memory
    from maskprune.training.distributed import rank, start

    torch.set_num_threads(1)
    return_freed_memory()
    start("cpu")
    folder, kind, settings = Path(job["folder"]), job["kind"], job["settings"]
    if not job["steps"]:
        train(kind, folder / job["shape"], Turns(), settings)
        return
    train(kind, folder / "tiny", Steps(3), settings)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own = status_kib("VmRSS") * 1024
    peak = train(kind, folder / job["shape"], Steps(job["steps"]), settings)
    Path(job["out"], f"{rank()}.json").write_text(json.dumps({"peak": peak, "own": own}))


def begin(processes: int, job: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Start them, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.scale", "work", "--job", json.dumps(job)]
    network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            command,
            env=os.environ | network | count | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if r else None,
            text=True,
        )
        for r in range(processes)
    ]


def run(processes: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of `processes` processes found."""
    with tempfile.TemporaryDirectory() as out:
        started = begin(processes, job | {"out": out})
        if any([process.wait() for process in started]):
            raise SystemExit(f"{processes} processes: one has failed")
        return [json.loads(Path(out, f"{r}.json").read_text()) for r in range(processes)]


def turn(processes: list[subprocess.Popen[str]]) -> dict[str, float]:
    """One step of a way: its seconds, and the most processor time of a process."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = []
    for process in processes:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{len(processes)} processes: one has failed")
        said.append(json.loads(line))
    return {name: max(one[name] for one in said) for name in said[0]}


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
            job = dict(kind=kind, shape=kind, folder=name, steps=steps, settings=settings)
            for n in counts:
                found = run(n, job)
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


def times(kinds: list[str], rounds: int, seed: int) -> Iterator[Row]:
    ways = [(1, "none"), (2, "none"), (2, "full")]
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), ["step"])
        for kind in kinds:
            found: dict[tuple[int, str], list[dict[str, float]]] = {way: [] for way in ways}
            load = []
            running = {}
            for n, shard in ways:
                settings = SETTINGS | dict(
                    batch_size=8, seq_len=128, shard=shard, steps=max(20, rounds + 1)
                )
                job = dict(kind=kind, shape="step", folder=name, steps=0, settings=settings)
                running[n, shard] = begin(n, job)
            try:
                # The first step makes what the others reuse.
                for way in ways:
                    turn(running[way])
                for number in range(rounds):
                    for way in ways[number % 3 :] + ways[: number % 3]:
                        found[way].append(turn(running[way]))
                        load.append(os.getloadavg()[0])
            finally:
                for process in sum(running.values(), []):
                    process.kill()
                    process.wait()
            for n, shard in ways:
                row: Row = {
                    "op": "scale_time",
                    "provider": kind,
                    **SHAPES["step"],
                    "processes": n,
                    "shard": shard,
                    "tokens": 8 * 128,
                    "rounds": rounds,
                }
                for clock, of_one in (("step_s", "of_one"), ("cpu_s", "cpu_of_one")):
                    own = [one[clock] for one in found[n, shard]]
                    alone = [one[clock] for one in found[1, "none"]]
                    ratios = sorted(a / b for a, b in zip(own, alone, strict=True))
                    row[clock] = round(statistics.median(own), 4)
                    row[of_one] = round(statistics.median(ratios), 3)
                    row[f"{of_one}_quartiles"] = [
                        round(ratios[round(q * (rounds - 1))], 3) for q in (0.25, 0.75)
                    ]
                row["load"] = round(statistics.median(load), 1)
                yield row | environment("cpu", seed) | {"threads": 1}


COLUMNS = {
    "memory": (
        "provider",
        "processes",
        "peak_gb",
        "planned_gb",
        "of_plan",
        "code_gb",
    ),
    "time": ("provider", "processes", "shard", "step_s", "of_one", "cpu_s", "cpu_of_one", "load"),
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
    "of_one",
    "of_one_quartiles",
    "cpu_s",
    "cpu_of_one",
    "cpu_of_one_quartiles",
    "load",
    "cpu",
)


def main(given: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.set_defaults(rounds=9)
    parser.add_argument("what", choices=("memory", "time", "work"))
    parser.add_argument("--kinds", nargs="+", default=["prune", "two-four"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="of each run of `memory`")
    parser.add_argument("--job", help="of a process, by the benchmark itself")
    args = parser.parse_args(given)
    if args.what == "work":
        work(json.loads(args.job))
        return 0
    if args.what == "memory":
        rows = memory(args.kinds, args.processes, args.steps, args.seed)
    else:
        rows = times(args.kinds, args.rounds, args.seed)
    found = []
    for row in rows:
        found.append(row)
        if args.rows:
            write_rows(args.rows, [row], overwrite=args.overwrite, ignore=MEASURED)
    print(show(found, COLUMNS[args.what]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
