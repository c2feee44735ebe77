"""Each block in turn learns to give the dense block's output, before the whole model trains.

Block-wise reconstruction, which BRECQ (Li et al., arXiv 2102.05426) does for quantised models: with
h_l (d,) the dense model's hidden state of a token after block l and h'_l the pruned one's, block l
is trained to minimise the sum over tokens of || block'_l(h'_{l-1}) - h_l ||^2 / || h_l ||^2, the
error as the next norm sees it: in many models a few tokens have states a thousand times larger than
others. A block reads what the blocks refined before it give, so it also makes up for what they
still lack. It takes no logits, and memory for one block's training and the hidden states of all
tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from maskprune.training.distributed import own_share, sum_shares, world_size
from maskprune.training.layer_by_layer import Walk
from maskprune.training.optimizer import adamw
from maskprune.training.progress import Report

# Share of a block's steps over which the learning rate rises.
WARMUP = 0.1
# Held at once: a block's inputs in both models, and the dense one's outputs.
DEPTHS = 3


def refine(
    student: nn.Module,
    teacher: nn.Module,
    teaching: Callable[[], contextlib.AbstractContextManager[None]],
    blocks: torch.Tensor,
    *,
    passes: int,
    learning_rate: float,
    batch_size: int,
    gradient_accumulation: int = 1,
    seed: int = 0,
    progress: Report | None = None,
) -> list[tuple[float, float]]:
    """Train what asks for gradients in each block of the student, one block after the other.

    By AdamW without weight decay; the rate rises over the first tenth of a block's steps and then
    falls linearly to 0. No gradients are left behind. The hidden states of the text are on the
    device up to a share of its free memory, else in the host's (see `Walk`).

    Args:
        student: the pruned model: cut, or the PEFT model under its masks.
        teacher: the dense model, or the same PEFT model.
        teaching: a context in which `teacher` is the dense model, without gradients.
        blocks: (n, T) int64 tokens on the models' device, n at least 1. Every rank is given all
            of them; each batch is shared out among the ranks.
        passes: over `blocks`, of each of the model's blocks.
        learning_rate: its peak.
        batch_size: sequences of a step over all ranks; an incomplete last batch is left out.
        gradient_accumulation: parts of a rank's batch, computed one after the other.
        seed: of the order of the batches, another one in each pass.
        progress: called after each of the model's blocks with (blocks done, blocks in all).

    Returns:
        The loss of each block, in the mean over its first pass and at the end, over what it would
        be if the dense block did nothing: || h_{l-1} - h_l ||^2 in place of the error.

    Raises:
        FloatingPointError: the loss of a block is not finite; names it.
    """
    size = min(batch_size, len(blocks))
    batches = blocks[: len(blocks) // size * size].split(size)
    shares = [own_share(batch) for batch in batches]
    rows = -(-len(shares[0]) // gradient_accumulation)
    parts = [part for share in shares for part in share.split(rows)]
    generator = torch.Generator().manual_seed(seed)
    was_training = student.training
    student.eval()
    own = Walk(student, parts, depths=DEPTHS, progress=progress)
    with teaching():
        dense = Walk(teacher, parts, depths=DEPTHS)

    def mean_distance(states: list[torch.Tensor]) -> torch.Tensor:
        """From the dense outputs, of a batch of all ranks in the mean."""
        pairs = zip(states, dense.hidden, strict=True)
        each = [_distance(h.to(own.device), wanted) for h, wanted in pairs]
        total = torch.stack(each).sum() / len(batches)
        sum_shares(batches[0], total)
        return total

    def learn(index: int, trained: list[nn.Parameter], unit: torch.Tensor) -> torch.Tensor:
        """Train a block; returns its loss in the first pass."""
        optimizer = adamw(trained, 32, lr=learning_rate)
        per_batch = len(parts) // len(batches)
        first = torch.zeros_like(unit)
        for done in range(passes):
            for k, i in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
                rate = _rate((done + k / len(batches)) / passes)
                optimizer.param_groups[0]["lr"] = learning_rate * rate
                sums = [torch.zeros_like(p) for p in trained]
                for part in range(i * per_batch, (i + 1) * per_batch):
                    output = own.block(index, own.hidden[part].to(own.device))
                    loss = _distance(output, dense.hidden[part]) / unit
                    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
                    for total, gradient in zip(sums, gradients, strict=True):
                        total += gradient
                    if done == 0:
                        first += loss.detach() / len(batches)
                sum_shares(batches[i], *sums)
                for p, total in zip(trained, sums, strict=True):
                    p.grad = total
                optimizer.step()
                optimizer.zero_grad()
                # Autocast keeps what it cast of the weights before the step.
                torch.clear_autocast_cache()
        for p in trained:
            if world_size() > 1:
                # Where ranks share nothing out, they may differ by rounding.
                dist.broadcast(p.data, 0)
        sum_shares(batches[0], first)
        return first

    losses = []
    for index, block in enumerate(own.layers):
        inputs = dense.hidden[:]
        with teaching():
            dense.run(index, replace=True)
        unit = mean_distance(inputs)
        del inputs
        # The dense block may be the identity, as in models that were made deeper.
        unit = torch.where(unit > 0, unit, 1.0)
        trained = [p for p in block.parameters() if p.requires_grad]
        with own.turn(index, trained):
            first = learn(index, trained, unit) if trained else None
            with torch.no_grad():
                own.run(index, replace=True)
        last = mean_distance(own.hidden) / unit
        losses.append((float(last if first is None else first), float(last)))
        if not all(map(math.isfinite, losses[-1])):
            raise FloatingPointError(
                f"the refinement of block {index} diverged; give a lower --learning-rate than "
                f"{learning_rate:g}, or --refine-passes 0"
            )
    student.train(was_training)
    return losses


def _distance(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The squared errors of all tokens, each over the square of what is wanted, in float32."""
    wanted = wanted.to(states.device).float()
    errors = (states.float() - wanted).square().sum(-1)
    return (errors / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).sum()


def _rate(done: float) -> float:
    """The share of the peak rate when this share of a block's steps is done."""
    return min((done + 0.01) / WARMUP, 1.0) * (1.0 - done)
