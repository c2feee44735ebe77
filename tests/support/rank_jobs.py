"""What the ranks of the tests of several processes do; also run by one process, to compare."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from checkpoints_on_disk import tiny_tokenizer
from models import VOCAB, tiny_model

from maskprune.cli import main
from maskprune.config import PruneConfig, SparsifyConfig
from maskprune.structured import compensation, trainer
from maskprune.structured.distill import DistillLoss, distill
from maskprune.structured.prune import PruneResult, prune
from maskprune.training.checkpoints import newest
from maskprune.training.distributed import barrier, rank
from maskprune.training.sharding import own_part, whole
from maskprune.two_four.sparsify import SparsifyTrainer, sparsify

COMMON: dict[str, Any] = dict(batch_size=4, seq_len=16, logging_steps=20, autocast="none")
PRUNE = COMMON | dict(
    method="maskprune",
    sparsity=0.3,
    steps=40,
    warm_start_blocks=8,
    lora_r=2,
    output_r=4,
    multiple_of=4,
    save_steps=20,
)
# The ways of pruning that are compared; the first has checkpoints to resume from.
WAYS: dict[str, dict[str, Any]] = {
    "plain": dict(gradient_accumulation=2),
    "hidden": dict(alpha=0.04),
    "hidden-checkpointed": dict(
        alpha=0.04, gradient_checkpointing=True, warm_start="wanda-sp", steps=20
    ),
    "ffn-only": dict(family="gpt2", sparsity=0.15, steps=20, refine_passes=1),
    "weights": dict(
        method="taylor",
        train="weights",
        lora_r=8,
        learning_rate=1e-3,
        steps=20,
        refine_passes=2,
        self_text=0.3,
    ),
}
SHARDED = ("plain", "hidden", "hidden-checkpointed")
SPARSIFY = COMMON | dict(steps=20, calibration_blocks=8, gradient_accumulation=2)
# Of the 2:4 runs that are resumed.
TWO_FOUR: dict[str, Any] = dict(save_steps=10)


def blocks() -> torch.Tensor:
    return torch.randint(3, VOCAB, (24, 16), generator=torch.Generator().manual_seed(1))


def prune_one(
    run: Path | None, resume: bool = False, family: str = "llama", **changes: Any
) -> PruneResult:
    config = PruneConfig(**(PRUNE | changes))
    model = tiny_model(family, num_hidden_layers=2)
    return prune(model, tiny_tokenizer(), blocks(), config, run_dir=run, resume=resume)


def trained(result: PruneResult) -> dict[str, torch.Tensor]:
    """Masks and adapters or weights of a run, and what its trace says of the masks' signal."""
    named = result.masked_model.named_parameters()
    adapters = {name: whole(p.detach()).clone() for name, p in named if "lora_" in name}
    if result.difference is not None:
        adapters |= {f"own {name}": p.detach() for name, p in result.model.named_parameters()}
    of_signal = [
        value
        for row in result.trace
        for name, value in sorted(row.items())
        if name.startswith(("moved_", "signal_"))
    ]
    masks = {"head": result.masks.head.detach(), "ffn": result.masks.ffn.detach()}
    return adapters | masks | {"signal": torch.tensor(of_signal)}


def sparsify_one(
    method: str,
    run: Path | None = None,
    resume: bool = False,
    sizes: dict[str, int] | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """The masks that a method chooses, and with maskllm the logits behind them.

    Of moments in eight bits, the bytes that this process holds.
    """
    logits: dict[str, torch.Tensor] = {}
    honest = SparsifyTrainer.train

    def train(self: SparsifyTrainer, *args: Any, **kw: Any) -> Any:
        done = honest(self, *args, **kw)
        own = self.masks.named_parameters().items()
        logits.update({f"logits {n}": whole(p.detach()) for n, p in own})
        for state in self.optimizer.state.values():
            for n, moment in state.items():
                if hasattr(codes := own_part(moment), "codes"):
                    logits[f"{n} {len(logits)}"] = codes.codes
        return done

    SparsifyTrainer.train = train  # type: ignore[method-assign]
    try:
        config = SparsifyConfig(method=method, **(SPARSIFY | changes))
        model = tiny_model("llama", num_hidden_layers=2, **(sizes or {}))
        result = sparsify(model, None, blocks(), config, run_dir=run, resume=resume)
    finally:
        SparsifyTrainer.train = honest  # type: ignore[method-assign]
    return result.masks | logits


def unfinished(run: Path, to: Path) -> Path:
    """A copy of a run's folder from which its last checkpoint is gone."""
    shutil.copytree(run, to)
    shutil.rmtree(newest(to) or to)
    return to


def train_all(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every way of pruning, and of 2:4."""
    found = {}
    for name, way in WAYS.items():
        found[name] = trained(prune_one(folder / "plain" if name == "plain" else None, **way))
    found["maskllm"] = sparsify_one("maskllm", folder / "maskllm", **TWO_FOUR)
    return found | {method: sparsify_one(method) for method in ("sparsegpt", "wanda")}


def go_on(name: str, source: Path, folder: Path) -> Path:
    """A copy, named `name`, of a run whose last checkpoint is gone; made by rank 0."""
    if rank() == 0:
        unfinished(source, folder / name)
    barrier()
    return folder / name


def train_and_resume(folder: Path, alone: Path) -> None:
    """On two ranks: everything, and the runs of two ranks and of one gone on with by two."""
    found = train_all(folder)
    for name, source in (("2 to 2", folder / "plain"), ("1 to 2", alone / "plain")):
        run = go_on(name, source, folder)
        found[name] = trained(prune_one(run, resume=True, **WAYS["plain"]))
    torch.save(found, folder / f"found.{rank()}")
    dist.destroy_process_group()


def train_sharded(folder: Path, alone: Path) -> None:
    """The same with the model spread over the two ranks."""
    found = {}
    for name in SHARDED:
        run = folder / "plain" if name == "plain" else None
        found[name] = trained(prune_one(run, shard="full", **WAYS[name]))
    settings = TWO_FOUR | dict(shard="full", gradient_checkpointing=True)
    found["maskllm"] = sparsify_one("maskllm", folder / "maskllm", **settings)
    for name, source in (("2 to 2", folder), ("1 to 2", alone)):
        run = go_on(name, source / "plain", folder)
        found[name] = trained(prune_one(run, resume=True, shard="full", **WAYS["plain"]))
        run = go_on(f"maskllm {name}", source / "maskllm", folder)
        found[run.name] = sparsify_one("maskllm", run, resume=True, **settings)
    torch.save(found, folder / f"found.{rank()}")
    dist.destroy_process_group()


def refused(**changes: Any) -> str:
    """What a run says whose ranks were given different models."""
    model = tiny_model("llama", seed=rank())
    try:
        prune(model, None, blocks(), PruneConfig(**(PRUNE | changes)))
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


def sparsify_in_eight_bits(folder: Path) -> None:
    """On two ranks: 2:4 with sharded moments in eight bits, at once and gone on with."""
    # torchao's compilation takes longer than the run.
    torch.compiler.set_stance("force_eager")
    sizes = dict(hidden_size=128, num_attention_heads=16)
    settings = TWO_FOUR | dict(shard="full", optimizer_bits=8, sizes=sizes)
    found = {"at once": sparsify_one("maskllm", folder / "run", **settings)}
    again = go_on("again", folder / "run", folder)
    found["again"] = sparsify_one("maskllm", again, resume=True, **settings)
    torch.save(found, folder / f"found.{rank()}")
    dist.destroy_process_group()


def train_on_four(folder: Path) -> None:
    """On four ranks: one way, what is refused, and which bytes DDP sends when it starts."""
    sent = []
    honest = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *more: Any) -> None:
        sent.extend(tensors)
        honest(group, tensors, *more)

    dist._broadcast_coalesced = counted
    found: dict[str, Any] = trained(prune_one(None, **WAYS["hidden"]))
    found["refused"] = refused()
    found["sent"] = sum(tensor.nbytes for tensor in sent)
    with patch.object(compensation, "GRAM_BYTES", 1000 + rank()):
        found["room"] = compensation._gram_bytes(torch.device("cpu"))
    torch.save(found, folder / f"found.{rank()}")
    dist.destroy_process_group()


def train_on_one(folder: Path) -> None:
    """One process that torchrun started."""
    found = trained(prune_one(None, **WAYS["hidden"]))
    assert not dist.is_initialized()
    torch.save(found, folder / "found")


def command_with_nan(folder: Path, arguments: list[str]) -> None:
    """A command line on every rank; the loss of rank 1 is NaN from the first step on."""

    def broken(*args: Any, **kw: Any) -> DistillLoss:
        loss = distill(*args, **kw)
        return DistillLoss(loss.total * float("nan"), loss.kl * float("nan"), loss.layer, loss.lm)

    if os.environ["RANK"] == "1":
        patch.object(trainer, "distill", broken).start()
    command(folder, arguments)


def script(folder: Path, path: Path, place: Path, arguments: list[str]) -> None:
    """A Python file run on every rank, as torchrun runs it."""
    os.chdir(place)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def command(folder: Path, arguments: list[str]) -> None:
    """A command line on every rank."""
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
