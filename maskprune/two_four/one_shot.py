"""2:4 masks in one pass over calibration text: magnitude, Wanda and SparseGPT.

Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) go block by block, each block reading
the outputs of the pruned blocks before it. Letters: W (O, I) weight, X (I, tokens) its inputs over
n sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from maskprune.choices import TWO_FOUR_ONE_SHOT, require_choice
from maskprune.hf.families import layers_of
from maskprune.training.activations import add_gram, add_squares
from maskprune.training.distributed import own_share, sum_shares
from maskprune.training.layer_by_layer import Walk
from maskprune.two_four.matrices import (
    full_float32,
    inverse_factor,
    prune_columns,
    wanda_scores,
)
from maskprune.two_four.patterns import Linear, hard_mask, oriented, prunable

# The memory of a block's activations and attention scores grows with it.
TOKENS_AT_ONCE = 2048

# Linears that read the same tensor, and the sum over tokens of x^2 (I,) or x x^T (I, I).
Group = tuple[list[str], torch.Tensor]


@torch.no_grad()
def one_shot_masks(
    model: nn.Module,
    method: str,
    blocks: torch.Tensor | None = None,
    *,
    update: bool = False,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """A 2:4 mask for every prunable linear: magnitude |W|, Wanda |W_ij| ||X_j||, or SparseGPT.

    Block by block, as both papers do: the inputs of a block's linears are observed while the block
    is dense, then all of them are pruned, and the next block reads the pruned block's output.
    Active adapters take part in the forward; the base layers are pruned. Under torch.distributed
    all ranks pass the same blocks, and each reads its share of them. In memory are the hidden
    states of all tokens and the statistics of one block.

    With `device` the model stays where it is, in the host's memory or mapped from its files, and
    each block computes on the device, on a copy of its weights made for its turn; before and
    between the turns as `training.layer_by_layer.Walk` says. Results are, to the bit, those of a
    model that is whole on the device.

    Args:
        model: transformers causal LM of a known family, or a PEFT model around one.
        method: sparsegpt, wanda or magnitude.
        blocks: (n, T) int64 token ids on the CPU or the model's device; magnitude needs none.
        update: SparseGPT only: also write the updated weights W_hat.
        progress: called after each block with (blocks done, blocks in all); not by magnitude.
        device: where to compute, a block at a time; None: where the model is. Magnitude, which
            reads each weight once, always computes where the model is.

    Returns:
        (O, I) bool by the names of `prunable(model)`, on the model's device, exactly 2 of every 4
        kept. Without `update` the model is as before, bit for bit, after an error too; with it, an
        error leaves the weights of the blocks that were done updated and all others as before.

    Raises:
        ValueError: an unknown method, blocks that do not fit, a model that has no 2:4 pattern, NaN
            among the weights, or an H without a usable inverse.
        FloatingPointError: activations that are not finite; names the linear that reads them.
    """
    _require(method, blocks, update)
    linears = prunable(model)
    masks: dict[str, torch.Tensor] = {}
    if blocks is None or method == "magnitude":
        for name, module in linears.items():
            with _named(name):
                masks[name] = hard_mask(oriented(module).abs())
        return masks
    layers = layers_of(model)
    with _undisturbed(model, device):
        at_once = max(1, TOKENS_AT_ONCE // blocks.shape[1])
        walk = Walk(model, own_share(blocks).split(at_once), device, progress=progress)
        for index, layer in enumerate(layers):
            inside = set(layer.modules())
            own = {name: module for name, module in linears.items() if module in inside}
            updated = [module.weight for module in own.values() if update]
            # Of copies on a device nothing is left after the turn.
            pruned = own if device is None else {}
            with walk.turn(index, updated), _restored(pruned, keep=update):
                read = partial(walk.run, index, replace=False)
                found = _prune_block(method, own, read, blocks, update)
                masks |= {name: mask.to(walk.home) for name, mask in found.items()}
                # Nothing reads the last block's output.
                if layer is not layers[-1]:
                    walk.run(index, replace=True)
    return {name: masks[name] for name in linears}


def _require(method: str, blocks: torch.Tensor | None, update: bool) -> None:
    require_choice("method", method, TWO_FOUR_ONE_SHOT)
    if update and method != "sparsegpt":
        raise ValueError(f"update=True with {method}; only sparsegpt updates weights")
    if method == "magnitude":
        return
    given = None if blocks is None else (blocks.dtype, tuple(blocks.shape))
    if blocks is None or blocks.dtype != torch.int64 or blocks.dim() != 2 or not blocks.numel():
        raise ValueError(
            f"{method}: blocks are {given}; expected token ids, torch.int64 (n, T) with n, T >= 1"
        )


def _prune_block(
    method: str,
    linears: dict[str, Linear],
    run: Callable[[], None],
    blocks: torch.Tensor,
    update: bool,
) -> dict[str, torch.Tensor]:
    """Prune the linears of a block that `run` runs, in place; returns their masks."""
    masks: dict[str, torch.Tensor] = {}
    for names, total in _statistics(linears, run, blocks, method == "sparsegpt"):
        masks |= _prune(method, {n: linears[n] for n in names}, total, len(blocks), update)
    return masks


def _prune(
    method: str, linears: dict[str, Linear], total: torch.Tensor, n: int, update: bool
) -> dict[str, torch.Tensor]:
    """Prune linears that read the same inputs, in place; returns their masks."""
    masks = {}
    with _named(next(iter(linears))):
        factor = inverse_factor(2 / n * total) if method == "sparsegpt" else None
    for name, module in linears.items():
        W = oriented(module)
        with _named(name):
            if factor is None:
                masks[name] = hard_mask(wanda_scores(W, (total / n).sqrt()))
            else:
                W_hat, masks[name], _ = prune_columns(W, *factor, update)
                if update:
                    W.copy_(W_hat)
        W.masked_fill_(~masks[name], 0.0)
    return masks


def _statistics(
    linears: dict[str, Linear], run: Callable[[], None], blocks: torch.Tensor, gram: bool
) -> list[Group]:
    """The groups of linears, each with its sum over the tokens of all ranks."""
    owner: dict[str, str] = {}
    sums: dict[str, torch.Tensor] = {}
    last: tuple[Any, str] = (None, "")

    def see(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if name not in owner:
            owner[name] = owner[last[1]] if x is last[0] else name
        last = (x, name)
        if owner[name] == name:
            sums[name] = (add_gram if gram else add_squares)(sums.get(name), x)

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if name not in owner:
            raise RuntimeError(f"{name} did not run; give the model without what bypasses it")
    groups: dict[str, list[str]] = {}
    for name in linears:
        groups.setdefault(owner[name], []).append(name)
    sum_shares(blocks, *sums.values())
    for name, total in sums.items():
        if not bool((total.diagonal() if gram else total).isfinite().all()):
            raise FloatingPointError(
                f"the inputs of {name} are not finite on the calibration text; the model overflows "
                "in this dtype: load it in float32"
            )
    return [(names, sums[name]) for name, names in groups.items()]


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """No dropout, no autocast and no TF32; every module's mode is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    device = device or next(model.parameters()).device
    try:
        model.eval()
        # Autocast would keep using copies that it cast before the weights were pruned.
        with torch.autocast(device.type, enabled=False), full_float32():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _restored(linears: dict[str, Linear], keep: bool) -> Iterator[None]:
    """Put the weights back as they were; with `keep` only if the context ends with an error."""
    before = {name: oriented(module).clone() for name, module in linears.items()}
    done = False
    try:
        yield
        done = keep
    finally:
        if not done:
            for name, module in linears.items():
                oriented(module).copy_(before[name])


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
