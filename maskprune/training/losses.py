"""The Kullback-Leibler divergence of the logits, without copies of their size."""

from __future__ import annotations

from typing import Any

import torch

KL_DIRECTIONS = ("teacher_student", "student_teacher")
_ROWS = 256


class _TokenKL(torch.autograd.Function):
    """Mean KL over tokens; keeps one gradient of the logits' size and no log-softmax copies."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, reverse: bool) -> Any:
        grad, total = torch.empty_like(student), student.new_zeros((), dtype=torch.float32)
        n = student.shape[0]
        for start in range(0, n, _ROWS):
            part = slice(start, start + _ROWS)
            log_s = student[part].float().log_softmax(-1)
            log_t = teacher[part].float().log_softmax(-1)
            p_s = log_s.exp()
            if reverse:
                gap = log_s - log_t
                kl = (p_s * gap).sum(-1, keepdim=True)
                part_grad = p_s * (gap - kl)
            else:
                p_t = log_t.exp()
                kl = (p_t * (log_t - log_s)).sum(-1, keepdim=True)
                part_grad = p_s - p_t
            total += kl.sum()
            grad[part] = (part_grad / n).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total / n

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
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
    if direction not in KL_DIRECTIONS:
        raise ValueError(
            f"kl_direction is {direction!r}; expected one of {', '.join(KL_DIRECTIONS)}"
        )
    flat = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    kl: torch.Tensor = _TokenKL.apply(*flat, direction == "student_teacher")
    return kl
