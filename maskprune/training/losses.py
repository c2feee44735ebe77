"""The training losses, without copies of the logits: KL of two models, and cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskprune.hf.head import Head
from maskprune.ops import linear_distillation, linear_kl
from maskprune.ops.linear_kl import check_direction, kl_rows, rows_at_once
from maskprune.ops.register import Context

_ROWS = 256


class _TokenKL(torch.autograd.Function):
    """Mean KL over tokens; keeps one gradient of the logits' size and no log-softmax copies."""

    @staticmethod
    def forward(
        ctx: Context, student: torch.Tensor, teacher: torch.Tensor, reverse: bool
    ) -> torch.Tensor:
        grad, total = torch.empty_like(student), student.new_zeros((), dtype=torch.float32)
        n = student.shape[0]
        for start in range(0, n, _ROWS):
            part = slice(start, start + _ROWS)
            log_p, log_q = (z[part].float().log_softmax(-1) for z in (student, teacher))
            kl, part_grad = kl_rows(log_p, log_q, reverse)
            total += kl.sum()
            grad[part] = (part_grad / n).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total / n

    @staticmethod
    def backward(ctx: Context, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None


def token_kl(
    student: torch.Tensor, teacher: torch.Tensor, direction: str = "teacher_student"
) -> torch.Tensor:
    """KL(teacher || student) in nats, mean over tokens; 0-dim float32.

    Args:
        student, teacher: (..., V) logits; the gradient goes to the student only.
        direction: `teacher_student`, the ancestors' code, or `student_teacher`, as the paper
            prints it.
    """
    check_direction(direction)
    flat = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    kl: torch.Tensor = _TokenKL.apply(*flat, direction == "student_teacher")
    return kl


def hidden_kl(
    head: Head,
    student: torch.Tensor,
    teacher: torch.Tensor,
    direction: str = "teacher_student",
    as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> torch.Tensor:
    """`token_kl` from last hidden states (..., d), with logits of a few tokens at a time.

    With a head that is more than its frozen weights (`Head.obstacle`), all logits at once.

    Args:
        as_teacher: within this context such a head is the teacher's.
    """
    if head.obstacle:
        with as_teacher(), torch.no_grad():
            teacher = head(teacher)
        return token_kl(head(student), teacher, direction)
    return linear_kl(
        student,
        teacher,
        head.weight,
        head.bias,
        scale=head.scale,
        softcap=head.softcap,
        direction=direction,
    )


def hidden_distillation(
    head: Head,
    student: torch.Tensor,
    teacher: torch.Tensor,
    input_ids: torch.Tensor,
    lm_weight: float,
    direction: str = "teacher_student",
    as_teacher: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1 - w) KL + w CE of the next of `input_ids` (B, T); and KL and CE, without gradient.

    From last hidden states (B, T, d), w = lm_weight; else as `hidden_kl`.
    """
    if head.obstacle:
        kl = hidden_kl(head, student, teacher, direction, as_teacher)
        targets = input_ids[:, 1:].flatten()
        lm = hidden_cross_entropy(head, student[:, :-1].flatten(0, 1), targets)
        return (1 - lm_weight) * kl + lm_weight * lm, kl.detach(), lm.detach()
    # The last token of a sequence has no next one.
    targets = functional.pad(input_ids[:, 1:], (0, 1), value=-1)
    return linear_distillation(
        student,
        teacher,
        head.weight,
        targets,
        lm_weight,
        head.bias,
        scale=head.scale,
        softcap=head.softcap,
        direction=direction,
    )


def hidden_cross_entropy(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `targets` (n,) from last hidden states (n, d), in chunks of tokens.

    Takes any head, and computes logits again in the backward. torch's own chunked operation is used
    only in float32 without autocast: it rounds the loss to the dtype of the hidden states.
    """
    rows = rows_at_once(head.weight.shape[0], hidden)
    plain = head.obstacle is None and head.scale == 1 and head.softcap is None
    full = hidden.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    if plain and full and hasattr(nn, "LinearCrossEntropyOptions"):
        return functional.linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            linear_bias=head.bias,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
        )

    logits: Callable[[torch.Tensor], torch.Tensor] = head
    if head.obstacle is None and not full:
        # Autocast would cast the frozen weight again for every chunk, and again in the backward.
        kind = hidden.device.type
        lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        weight, bias = head.weight.to(lower), head.bias
        bias = bias if bias is None else bias.to(lower)

        def logits(h: torch.Tensor) -> torch.Tensor:
            return head.bent(functional.linear(h, weight, bias))

    def part(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits(h).float(), y, reduction="sum")

    parts = [
        checkpoint(part, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)
