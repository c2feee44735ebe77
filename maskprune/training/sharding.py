"""A model whose blocks are spread over the processes of a run, by torch's FSDP2.

Of every weight of a block, adapters and 2:4 logits included, each process keeps its rows, their
gradient and their moments; a block is gathered while it runs. The embedding, the last norm, the
head and the masks of `attach_masks` stay whole on every process: they are small, and code outside
the blocks reads them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from maskprune.config import PruneConfig, SparsifyConfig
from maskprune.files import JsonObject
from maskprune.hf.families import layers_of, stock_model
from maskprune.training.distributed import on_first, rank, world_size
from maskprune.training.memory_plan import does_not_fit, load_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from transformers import PreTrainedConfig

DCP_FOLDER = "dcp"


def shards(config: PruneConfig | SparsifyConfig, model_config: PreTrainedConfig) -> bool:
    """Whether a run spreads the model over its processes: as `config.shard` says, `auto` where by
    `maskprune plan`'s arithmetic the whole run does not fit each GPU.

    Raises:
        ValueError: what is installed cannot do it.
    """
    if world_size() == 1 or config.shard == "none":
        return False
    if config.shard == "auto":
        if dist.get_backend() != "nccl":
            return False
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        load = load_of(config)
        if not on_first(lambda: does_not_fit(model_config, load, world_size(), memory)):
            return False
        if load.train == "weights":
            raise ValueError(
                "train is weights, which every process holds whole, and by `maskprune plan` they "
                f"do not fit {memory / 1e9:.0f} GB; give --train adapters, or --shard none to try"
            )
        if isinstance(config, PruneConfig) and config.refine_passes:
            raise ValueError(
                f"refine_passes is {config.refine_passes}, in which every process holds whole "
                f"blocks, and by `maskprune plan` they do not fit {memory / 1e9:.0f} GB; give "
                "--refine-passes 0, or --shard none to try"
            )
        if isinstance(config, PruneConfig) and config.self_text:
            raise ValueError(
                f"self_text is {config.self_text}, which every process writes with the whole "
                f"model, and by `maskprune plan` a run does not fit {memory / 1e9:.0f} GB; give "
                "--self-text 0, or --shard none to try"
            )
    require_shardable()
    return True


def require_shardable() -> None:
    """Refuse a torch or transformers that is too old to shard what is trained here.

    Raises:
        ValueError: says which.
    """
    from transformers import Trainer

    try:
        from torch.distributed.fsdp import fully_shard

        known = "ignored_params" in inspect.signature(fully_shard).parameters
    except ImportError:
        known = False
    if not known:
        raise ValueError(
            f"--shard full needs torch 2.7 or newer, and this is {torch.__version__}; update it "
            "or use --shard none"
        )
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        import transformers

        raise ValueError(
            f"--shard full needs a transformers whose Trainer averages what is not sharded (5.24 "
            f"or newer), and this is {transformers.__version__}; update it or use --shard none"
        )


def device_of_run(model: nn.Module, sharded: bool) -> torch.device:
    """Where a run computes; a model to be sharded may wait in the host's memory."""
    if sharded and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return next(model.parameters()).device


class Sharder:
    """Spreads a model over the processes, a block at a time: see `shard_blocks`."""

    def __init__(self, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.device = device
        self.mesh = init_device_mesh(device.type, (world_size(),))

    def block(self, block: nn.Module) -> None:
        """Keep this process's part of a block. Logits (6, O, I / 4) are cut along O."""
        from torch.distributed.fsdp import fully_shard

        fully_shard(
            block, mesh=self.mesh, shard_placement_fn=lambda p: Shard(1 if p.dim() == 3 else 0)
        )
        assert isinstance(block, FSDPModule)
        # Whether a weight gets a gradient is settled when it is first gathered.
        block.unshard()
        block.reshard()

    def rest(self, model: nn.Module) -> None:
        """After all blocks: what is around them stays whole and goes to the device."""
        from torch.distributed.fsdp import fully_shard

        outside = {p for p in model.parameters() if not isinstance(p, DTensor)}
        fully_shard(model, mesh=self.mesh, ignored_params=outside)
        for tensor in (*outside, *model.buffers()):
            # A copy: what was read from a file's pages would keep them all in memory.
            tensor.data = tensor.data.to(self.device, copy=True)
        # Trainer then neither moves nor wraps it, and averages the gradient of what is whole.
        stock_model(model)._is_distributed_loading_by_transformers = True


def shard_blocks(model: nn.Module, device: torch.device) -> None:
    """Spread the blocks of a stock model, or of the PEFT model around it, over the processes.

    Adapters and masks are on it already.
    """
    sharder = Sharder(device)
    for block in layers_of(model):
        sharder.block(block)
    sharder.rest(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_blocks` has spread the model."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; then every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, itself, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_whole(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, which every process has, into a tensor that may be sharded."""
    own_part(target).copy_(own_part(like_sharded(value, target)))


def like_sharded(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return value
    mesh, placements = target.device_mesh, target.placements
    value = value.detach().to(own_part(target).device)
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale gradients so that the norm of all together is at most `max_norm`."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    # One kernel cannot take sharded and whole tensors at once.
    trained = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    kinds = [kind for kind in kinds if kind]
    norms = [whole(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, torch.stack(norms).norm())


def save_states(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what is trained and its moments as a checkpoint of torch.distributed.checkpoint.

    Raises:
        RuntimeError: a process could not write its part.
    """
    import torch.distributed.checkpoint as dcp

    _attempt(
        f"the checkpoint {folder} could not be written",
        lambda: dcp.save(
            _trained(model) | _moments(model, optimizer), checkpoint_id=folder / DCP_FOLDER
        ),
    )


def has_states(folder: Path) -> bool:
    """Whether `save_states` wrote this checkpoint."""
    return (folder / DCP_FOLDER).is_dir()


def load_trained(folder: Path, model: nn.Module) -> None:
    """Set what is trained to what `save_states` wrote, sharded in whatever way here and there.

    Raises:
        RuntimeError: it cannot be read.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    state = _read(folder, _trained(model))
    set_model_state_dict(model, state, options=_options(strict=False))


def load_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state to what `save_states` wrote, sharded in whatever way.

    Raises:
        RuntimeError: it cannot be read.
    """
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _read(folder, _moments(model, optimizer))
    set_optimizer_state_dict(model, optimizer, state, options=_options())


def spread_moments(saved: JsonObject, optimizer: torch.optim.Optimizer) -> JsonObject:
    """The whole state of an optimizer, as one process saves it, for one of sharded tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        p = parameters[index]
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                state[name] = like_sharded(value, p)
    return saved


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole LoRA weights of a PEFT model by name, on the CPU; empty on ranks other than 0."""
    found = {}
    for name, p in model.named_parameters():
        if ".lora_" in name:
            value = whole(p.detach())
            if rank() == 0:
                found[name] = value.cpu()
    return found


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Set the LoRA weights of a sharded PEFT model to what one process has saved."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name, p in model.named_parameters():
            if ".lora_" in name:
                set_whole(p, file.get_tensor(name.replace(".default.", ".")))


def _options(strict: bool = True) -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(
        ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=strict
    )


def _trained(model: nn.Module) -> JsonObject:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_options())


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> JsonObject:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=_options())


def _read(folder: Path, state: JsonObject) -> JsonObject:
    import torch.distributed.checkpoint as dcp

    _attempt(
        f"the checkpoint {folder} could not be read",
        lambda: dcp.load(state, checkpoint_id=folder / DCP_FOLDER, no_dist=world_size() == 1),
    )
    return state


def _attempt(what: str, action: Callable[[], object]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # That one process reads what several wrote is as it should be.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            action()
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        line = str(first).strip().partition("\n")[0] or type(first).__name__
        raise RuntimeError(f"{what} ({line})") from None
