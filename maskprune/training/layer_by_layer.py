"""A model's blocks one after the other over all calibration text, for models larger than a device.

What sums over activations needs one block at a time where it computes. The weights stay in the
host's memory, or mapped from their files, and each block's travel to the device once a pass.
accelerate's offload hooks would move them once a batch, and put other parameters in their place.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from maskprune.hf.families import layers_of, stock_model
from maskprune.training.progress import Report

# Hidden states stay on the device up to this share of its free memory, else in the host's.
STATES_SHARE = 0.25

Call = tuple[tuple[Any, ...], dict[str, Any]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor on the device; all weights that travel come through here."""
    return tensor.to(device, copy=True)


@contextlib.contextmanager
def lent(
    tensors: Iterable[torch.Tensor],
    device: torch.device | None,
    keep: Iterable[torch.Tensor] = (),
) -> Iterator[None]:
    """Within the context parameters and buffers, the same objects, hold copies on the device.

    Their own memory is not touched, but for `keep`: what these hold at the end is copied back,
    unless the context ends with an error. With None nothing moves, and what is done to them stays.
    """
    if device is None:
        yield
        return
    kept = {id(t) for t in keep}
    homes = [(t, t.data) for t in tensors]
    try:
        for t, home in homes:
            t.data = place(home, device)
        yield
        for t, home in homes:
            if id(t) in kept:
                home.copy_(t.data)
    finally:
        for t, home in homes:
            t.data = home
        # Autocast keeps what it cast of trained weights until its end.
        torch.clear_autocast_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, or held by torch and unused; no limit on other devices."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class Walk:
    """The blocks of a model, each in its turn run on all batches.

    Between two turns it holds the hidden states of all tokens: on the device up to `STATES_SHARE`
    of its free memory, else in the host's. What is not in a block (embeddings, what makes the
    blocks' other arguments, the last norm, the head) is on the device at the beginning and for
    `top`. So results equal, to the bit, those of a model that is whole on the device.

    Args:
        model: transformers causal LM of a known family in eval mode, or a PEFT model around one.
        parts: batches (B, T) of token ids, all of one T.
        device: where to compute, on copies, also where the model is on that device; None: where
            the model is, in place.
        depths: sets of hidden states that are held at once.
        progress: called after each turn with (turns done, turns in all).
        passes: turns of each block, for the progress.

    Attributes:
        hidden: (B, T, d) of each batch, the inputs of the block whose turn it is.

    Raises:
        ValueError: with a device, a model without weights here, or spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Iterable[torch.Tensor],
        device: torch.device | None = None,
        *,
        depths: int = 1,
        progress: Report | None = None,
        passes: int = 1,
    ) -> None:
        # The transformers version decides whether a block returns a tuple.
        self._tuples: bool | None = None
        self.base: Any = stock_model(model)
        self.layers = layers_of(model)
        if device is not None:
            _require_here(self.base)
        self.home = next(self.base.parameters()).device
        self.device = self.home if device is None else device
        self._lent_to = device
        self.ids = [ids.to(self.device) for ids in parts]
        self.depths, self.progress, self.passes = depths, progress, passes
        self.turns = 0
        self.hidden: list[torch.Tensor] = []
        self.calls: dict[int, list[Call]] = {}
        with self._around():
            for ids in self.ids:
                self._enter(ids)

    @contextlib.contextmanager
    def turn(self, index: int, keep: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        """Within the context a block is on the device.

        Args:
            keep: parameters of the block whose new values are copied back, see `lent`.
        """
        with lent(_tensors(self.layers[index]), self._lent_to, keep):
            yield
        self.turns += 1
        if self.progress is not None:
            self.progress(self.turns, self.passes * len(self.layers))

    def run(self, index: int, *, replace: bool) -> None:
        """Run a block on all batches; with `replace` its outputs take the place of its inputs.

        Where gradients are on, as in `down`: kernels that torch chooses by that are the same.
        """
        for i, x in enumerate(self.hidden):
            out = self.block(index, self._arriving(x)).detach()
            if replace:
                self.hidden[i] = out.to(x.device)

    def up(self) -> list[list[torch.Tensor]]:
        """Every block in its turn on all batches; returns each block's inputs."""
        inputs = []
        for index in range(len(self.layers)):
            inputs.append(list(self.hidden))
            with self.turn(index):
                self.run(index, replace=True)
        return inputs

    def top(self, loss: Loss) -> list[torch.Tensor]:
        """The gradient of each batch's loss(logits, ids) for the last block's output, `hidden`."""
        gradients = []
        with self._around():
            for ids, h in zip(self.ids, self.hidden, strict=True):
                x = self._arriving(h)
                with self._instead(lambda *_, x=x, **__: x):
                    logits = self.base(input_ids=ids, use_cache=False).logits
                loss(logits, ids).backward()
                gradients.append(_gradient(x).to(h.device))
        return gradients

    def down(
        self,
        inputs: list[list[torch.Tensor]],
        gradients: list[torch.Tensor],
        done: Callable[[int], None],
    ) -> None:
        """Every block in its turn, from the last: run again, and its backward, on all batches.

        Args:
            inputs: of every block, from `up`; used up.
            gradients: of the last block's output by batch, from `top`; used up.
            done: called with a block's index, in its turn, when all batches are through.
        """
        for index in reversed(range(len(self.layers))):
            with self.turn(index):
                for i, h in enumerate(inputs.pop()):
                    x = self._arriving(h)
                    self.block(index, x).backward(gradients[i].to(x.device))
                    gradients[i] = _gradient(x).to(h.device)
                done(index)

    def _arriving(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().to(self.device).requires_grad_(torch.is_grad_enabled())

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """A block's output of one batch, in its turn; with the graph where gradients are on."""
        args, kwargs = self.calls[len(x)][index]
        out = self.layers[index](x, *args, **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _around(self) -> contextlib.AbstractContextManager[None]:
        """All that is not in a block, on the device."""
        inside = {id(t) for layer in self.layers for t in _tensors(layer)}
        return lent([t for t in _tensors(self.base) if id(t) not in inside], self._lent_to)

    def _enter(self, ids: torch.Tensor) -> None:
        """Keep a batch's input of block 0, and each block's other arguments, by batch size."""
        calls: list[Call] = []
        # The other arguments depend on the batch's shape alone: one pass a shape to the last block.
        wanted = 1 if len(ids) in self.calls else len(self.layers)
        first = self.layers[0].forward

        def see(index: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                self.hidden.append(x.detach().to(self._where_states_stay(x)))
            if self._tuples is None:
                with lent(_tensors(self.layers[0]), self._lent_to):
                    self._tuples = isinstance(first(x, *args, **kwargs), tuple)
            calls.append((args, kwargs))
            if len(calls) == wanted:
                raise _Enough
            return x

        with contextlib.suppress(_Enough), self._instead(see):
            self.base(input_ids=ids, use_cache=False)
        self.calls.setdefault(len(ids), calls)

    def _where_states_stay(self, x: torch.Tensor) -> torch.device:
        if self.hidden:
            return self.hidden[0].device
        tokens = sum(ids.numel() for ids in self.ids)
        needed = self.depths * tokens * x.shape[-1] * x.element_size()
        fits = needed <= STATES_SHARE * free_bytes(self.device)
        return self.device if fits else torch.device("cpu")

    @contextlib.contextmanager
    def _instead(self, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Within the context forward(index, hidden, ...) -> hidden takes every block's place."""

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            out = forward(index, *args, **kwargs)
            return (out,) if self._tuples else out

        before = [vars(layer).get("forward") for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                vars(layer)["forward"] = partial(stand_in, index)
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                del vars(layer)["forward"]
                if own is not None:
                    vars(layer)["forward"] = own


class _Enough(Exception):
    """Ends a forward once the last block that is needed has been reached."""


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def _require_here(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_meta or isinstance(tensor, DTensor):
            where = "on the meta device" if tensor.is_meta else "spread over processes"
            raise ValueError(
                f"a device is given for blocks one by one, and {name} is {where}; load the model "
                "whole into the host's memory: from_pretrained without device_map"
            )
