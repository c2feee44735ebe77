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
from torch import nn

from maskprune.training.distributed import own_share, sum_shares
from maskprune.training.layer_by_layer import Walk
from maskprune.training.optimizer import adamw
from maskprune.training.progress import Report

# Share of a block's steps over which the learning rate rises.
WARMUP = 0.1


def refine(
    student: nn.Module,
    teacher: nn.Module,
    teaching: Callable[[], contextlib.AbstractContextManager[None]],
    blocks: torch.Tensor,
    *,
    passes: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    progress: Report | None = None,
) -> list[float]:
    """Train what asks for gradients in each block of the student, one block after the other.

    By AdamW without weight decay; the rate rises over the first tenth of a block's steps and then
    falls linearly to 0. No gradients are left behind.

    Args:
        student: the pruned model: cut, or the PEFT model under its masks.
        teacher: the dense model, or the same PEFT model.
        teaching: a context in which `teacher` is the dense model, without gradients.
        blocks: (n, T) int64 tokens on the models' device, n at least 1. Every rank is given all
            of them; each batch is shared out among the ranks.
        passes: over `blocks`, of each of the model's blocks.
        learning_rate: its peak.
        batch_size: sequences of a step over all ranks; an incomplete last batch is left out.
        seed: of the order of the batches, another one in each pass.
        progress: called after each of the model's blocks with (blocks done, blocks in all).

    Returns:
        The loss of each block in its last pass, of this rank's share of the text, over what it
        would be if the dense block did nothing: || h_{l-1} - h_l ||^2 in place of the error.

    Raises:
        FloatingPointError: the loss of a block is not finite; names it.
    """
    size = min(batch_size, len(blocks))
    batches = blocks[: len(blocks) // size * size].split(size)
    shares = [own_share(batch) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    was_training = student.training
    student.eval()
    # A block's inputs in both models, and the dense one's outputs.
    own = Walk(student, shares, depths=3, progress=progress)
    with teaching():
        dense = Walk(teacher, shares, depths=3)
    losses = []
    for index, block in enumerate(own.layers):
        inputs = dense.hidden[:]
        with teaching():
            dense.run(index, replace=True)
        moved = torch.stack(list(map(_distance, inputs, dense.hidden))).mean()
        sum_shares(batches[0], moved)
        trained = [p for p in block.parameters() if p.requires_grad]
        optimizer = adamw(trained, 32, lr=learning_rate)
        with own.turn(index, trained):
            for done in range(passes):
                last = torch.zeros_like(moved)
                for k, i in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
                    rate = _rate((done + k / len(batches)) / passes)
                    optimizer.param_groups[0]["lr"] = learning_rate * rate
                    output = own.block(index, own.hidden[i].to(own.device))
                    loss = _distance(output, dense.hidden[i]) / moved
                    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
                    for p, gradient in zip(trained, gradients, strict=True):
                        p.grad = gradient.contiguous()
                        sum_shares(batches[i], p.grad)
                    optimizer.step()
                    optimizer.zero_grad()
                    # Autocast keeps what it cast of the weights before the step.
                    torch.clear_autocast_cache()
                    last += loss.detach() / len(batches)
            with torch.no_grad():
                own.run(index, replace=True)
        losses.append(float(last))
        if not math.isfinite(losses[-1]):
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
