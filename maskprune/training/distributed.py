"""Runs of several processes, as torchrun starts them: who speaks, who writes, what is shared.

Each rank trains on its part of every batch and holds the whole model; gradients are averaged, so
all ranks take the same steps. Every function here is a plain one for a single process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")

# How gloo, NCCL and torch say that another process of the group is gone.
_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_STORE: list[dist.Store] = []
_TOLD = "maskprune/told"
# Seconds that rank 0 waits, after an error, for the other ranks to learn that it is told.
LINGER = 2.0


def world_size() -> int:
    """Processes of this run: of torch's process group, or those that torchrun announced."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0; rank 0 alone prints and writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def start(device: str) -> None:
    """Join the run's process group, unless there is one process or the group is made already.

    Args:
        device: `auto`, `cuda` or `cpu`; on CUDA each process takes the GPU of its LOCAL_RANK.

    Raises:
        ValueError: one GPU for all processes, or more processes than GPUs.
    """
    if world_size() == 1:
        # accelerate takes this of torchrun's for several processes, and wraps the model in DDP.
        os.environ.pop("LOCAL_RANK", None)
        return
    if rank() > 0:
        _silence()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    joined = dist.is_initialized()
    if not joined:
        # First of all, since by it the processes agree on who tells an error.
        store, number, size = next(dist.rendezvous("env://"))
        _STORE[:] = [store]
    if on_gpu:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if ":" in device or local >= gpus:
            raise ValueError(
                f"device is {device!r} for process {local} of this machine, which has {gpus} GPUs; "
                "under torchrun use --device cuda, and as many processes as GPUs"
            )
        torch.cuda.set_device(local)
    if not joined:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=number, world_size=size
        )


def _silence() -> None:
    """No warnings and no bars from this process: rank 0 shows the same ones."""
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.getLogger("maskprune").setLevel(logging.ERROR)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


@contextlib.contextmanager
def session() -> Iterator[None]:
    """A command run by all processes, of which one tells an error and all end.

    Raises:
        SystemExit: with code 2, where another process has told the error.
        RuntimeError: another process is gone.
    """
    try:
        yield
    except Exception as error:
        if not _first_to_tell():
            sys.exit(2)
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST):
            raise RuntimeError(
                f"another process of this run is gone, so rank {rank()} of {world_size()} stops "
                "too; start all again with --resume"
            ) from None
        raise
    # After an error the others may be gone, and saying goodbye to them would wait.
    if dist.is_initialized():
        dist.destroy_process_group()
    _STORE.clear()


def _first_to_tell() -> bool:
    if not _STORE:
        return rank() == 0
    try:
        first = int(_STORE[0].add(_TOLD, 1)) == 1
    except RuntimeError:  # The process that kept the store is the one that is gone.
        return True
    # Without torchrun rank 0 keeps the store; let those ask that fail just as it does.
    until = time.monotonic() + LINGER
    while rank() == 0 and time.monotonic() < until:
        if int(_STORE[0].add(_TOLD, 0)) >= world_size():
            break
        time.sleep(0.01)
    return first


def on_first(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, given to every rank by pickle, as its error is."""
    if world_size() == 1:
        return function()
    told: list[object] = [None, None]
    if rank() == 0:
        try:
            told[0] = function()
        except Exception as raised:
            told[1] = raised
    dist.broadcast_object_list(told, src=0)
    value, error = told
    if isinstance(error, Exception):
        raise error
    return cast(T, value)


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks, in place; not finite anywhere means not finite everywhere."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def least(value: int, device: torch.device) -> int:
    """The least value of all ranks; what decides which collectives follow must be one value."""
    if world_size() == 1:
        return value
    of_all = torch.tensor(value, device=device)
    dist.all_reduce(of_all, dist.ReduceOp.MIN)
    return int(of_all)


def require_same_weights(model: nn.Module) -> None:
    """Refuse processes that were given models of different weights.

    Raises:
        ValueError: names the first tensor that differs.
    """
    if world_size() == 1:
        return
    everyone: list[dict[str, int]] = [{}] * world_size()
    dist.all_gather_object(everyone, {n: _checksum(p) for n, p in model.named_parameters()})
    for other, sums in enumerate(everyone):
        for name, value in sums.items():
            if everyone[0].get(name) != value:
                raise ValueError(
                    f"the weights of {name} differ between rank 0 and rank {other}; give every "
                    "process the same model: one folder that all see, or one seed"
                )


def _checksum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes, eight at a time; the same in whatever order they are added."""
    data = tensor.detach().flatten().view(torch.uint8)
    eights = len(data) // 8 * 8 if data.storage_offset() % 8 == 0 else 0
    return int(data[:eights].view(torch.int64).sum()) + int(data[eights:].sum())


def own_share(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks that this rank reads of a calibration sample, every n-th; all of a tiny sample."""
    size = world_size()
    return blocks[rank() :: size] if len(blocks) >= size > 1 else blocks


def own_batches(blocks: torch.Tensor, most: int) -> list[torch.Tensor]:
    """`own_share(blocks)` in batches of about `most`, on every rank the same number of them.

    Of a sharded model every forward is one of all ranks.
    """
    own, size = own_share(blocks), world_size()
    if size == 1:
        return list(own.split(most))
    least = len(blocks) // size if len(blocks) >= size else len(blocks)
    return list(own.tensor_split(-(-least // most)))


def sum_shares(blocks: torch.Tensor, *sums: torch.Tensor) -> None:
    """Add up, in place, what each rank summed over its `own_share(blocks)`."""
    if len(blocks) >= world_size() > 1:
        for total in sums:
            dist.all_reduce(total)


def as_forward(
    wrapper: nn.Module, core: nn.Module, function: Callable[[torch.Tensor], T], ids: torch.Tensor
) -> T:
    """`function(ids)`, run as the forward of the wrapper that DDP or FSDP2 has put around `core`.

    A loss runs the model more than once, as student and as teacher, and may call its parts; the
    wrapper must see it as one forward, or it would not average the gradient of its backward.
    """
    if wrapper is core:
        return function(ids)
    state: dict[str, object] = vars(core)
    own = {"forward": state["forward"]} if "forward" in state else {}

    def restore() -> None:
        state.pop("forward", None)
        state.update(own)

    def forward(ids: torch.Tensor) -> T:
        restore()
        return function(ids)

    state["forward"] = forward
    try:
        out: T = wrapper(ids)
        return out
    finally:
        restore()
