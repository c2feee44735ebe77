"""KL of two models' next-token distributions from hidden states, a few rows of logits at a time.

Legend: h (n, d) hidden states - W (V, d) and b (V,) the head - z = cap(scale * (h W^T + b)) logits,
cap(z) = softcap * tanh(z / softcap) - p, q = softmax of the student's and the teacher's z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from maskprune.choices import KL_DIRECTIONS, require_choice
from maskprune.ops.register import Context, Inputs, register

# Size of one chunk's logits in the dtype they are computed in; three to five such are in memory.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}


def linear_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    direction: str = "teacher_student",
    chunk: int | None = None,
) -> torch.Tensor:
    """mean over tokens of KL(q || p), in nats; or of KL(p || q).

    The head is frozen, so the gradient with respect to the student's hidden states is computed in
    the forward, chunk by chunk, and (n, V) logits never exist; there is no second derivative.
    Matrix products run in the dtype of the hidden states, under autocast in autocast's; everything
    else in float32, in float64 for float64. The gradient is divided by n in the backward, so that a
    loss scaled for float16 keeps it.

    Args:
        student_hidden, teacher_hidden: (..., d), one dtype; the gradient goes to the student only.
        weight: (V, d), and bias: (V,) or None, of the head that both share; without gradient.
        scale: multiplies the logits (Cohere, Granite).
        softcap: limit of the logits (Gemma); None: no limit.
        direction: `teacher_student`, KL(q || p), or `student_teacher`, KL(p || q).
        chunk: tokens at once; None: as many as make `CHUNK_BYTES` of logits.

    Returns:
        0-dim float32, or float64 for float64.

    Raises:
        ValueError: shapes that do not agree, no tokens, a head that is trained, an unknown
            direction, a softcap or chunk that is not positive.
        TypeError: dtypes that do not agree.

    Source: the loss of MaskPrune (arXiv 2502.14008), section 3.3; chunks as in Liger-Kernel
    (arXiv 2410.10989), section 3.2.
    """
    options = _Options(scale, softcap, direction, chunk)
    return _run(student_hidden, teacher_hidden, weight, bias, None, 0.0, options)[0]


def linear_distillation(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lm_weight: float,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    direction: str = "teacher_student",
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(1 - w) KL + w CE from the same chunks of logits as `linear_kl`, w = lm_weight.

    CE is the student's cross entropy with the targets, in nats, mean over those that count; 0 where
    none does.

    Args:
        targets: (...), int64 token ids; those below 0 do not count.
        lm_weight: from 0 to 1.
        Others as `linear_kl`.

    Returns:
        The loss, and KL and CE without gradient; 0-dim, dtype as `linear_kl`.

    Raises:
        As `linear_kl`; ValueError: targets of another shape, lm_weight outside 0 to 1; TypeError:
            targets that are not int64.

    Source: Hinton et al. (arXiv 1503.02531), section 2, at temperature 1.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_distillation: targets are {targets.dtype}; expected torch.int64")
    if targets.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"linear_distillation: targets are {tuple(targets.shape)}; expected "
            f"{tuple(student_hidden.shape[:-1])}, one for each hidden state"
        )
    check_lm_weight(lm_weight)
    options = _Options(scale, softcap, direction, chunk)
    loss, parts = _run(
        student_hidden, teacher_hidden, weight, bias, targets.flatten(), lm_weight, options
    )
    kl, lm = parts.detach()
    return loss, kl, lm


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    direction: str
    chunk: int | None


def _run(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    lm_weight: float,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and (2,) KL and CE."""
    scale, softcap, direction, chunk = options
    s, t = student_hidden, teacher_hidden.detach()
    name = "linear_kl" if targets is None else "linear_distillation"
    _check(name, s, t, weight, bias, softcap, direction, chunk)
    kind = s.device.type
    if torch.is_autocast_enabled(kind) and s.dtype != torch.float64:
        lower = torch.get_autocast_dtype(kind)
        s, t, weight = s.to(lower), t.to(lower), weight.to(lower)
        bias = bias if bias is None else bias.to(lower)
    chunk = chunk or rows_at_once(weight.shape[0], s)
    d = s.shape[-1]
    loss, parts, _ = torch.ops.maskprune.linear_kl(
        s.reshape(-1, d),
        t.reshape(-1, d),
        weight,
        bias,
        float(scale),
        None if softcap is None else float(softcap),
        direction == "student_teacher",
        chunk,
        torch.is_grad_enabled() and s.requires_grad,
        targets,
        float(lm_weight),
    )
    return loss, parts


def rows_at_once(vocabulary: int, hidden: torch.Tensor) -> int:
    """How many rows of logits make `CHUNK_BYTES`; at least 64, for the matrix product's sake."""
    row = vocabulary * (8 if hidden.dtype == torch.float64 else 4)
    return max(64, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // row)


def _check(
    name: str,
    s: torch.Tensor,
    t: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    direction: str,
    chunk: int | None,
) -> None:
    if s.dim() == 0 or s.shape != t.shape or weight.dim() != 2 or s.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: student_hidden is {tuple(s.shape)}, teacher_hidden {tuple(t.shape)}, "
            f"weight {tuple(weight.shape)}; expected (..., d), (..., d), (V, d)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias is {tuple(bias.shape)}; expected ({weight.shape[0]},), as weight has"
        )
    if not s.numel():
        raise ValueError(f"{name}: student_hidden is {tuple(s.shape)}; expected some tokens")
    # Autocast makes one dtype of several.
    same = torch.is_autocast_enabled(s.device.type) or s.dtype == t.dtype == weight.dtype
    if not s.is_floating_point() or not same or (bias is not None and bias.dtype != weight.dtype):
        raise TypeError(
            f"{name}: student_hidden is {s.dtype}, teacher_hidden {t.dtype}, weight "
            f"{weight.dtype}, bias {bias.dtype if bias is not None else None}; expected one "
            "floating dtype; convert with .to()"
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            f"{name}: the head requires a gradient, which this makes for the hidden states only; "
            "pass weight.detach() of a frozen head, or compute the logits"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap is {softcap}; expected more than 0, or None")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name}: chunk is {chunk}; expected at least 1 token, or None")
    check_direction(direction)


def check_lm_weight(lm_weight: float) -> None:
    """Raise ValueError for a weight that is not a share."""
    if not 0 <= lm_weight <= 1:
        raise ValueError(f"lm_weight is {lm_weight}; expected a share from 0 to 1")


def check_direction(direction: str) -> None:
    """Raise ValueError for a direction that is not one of `KL_DIRECTIONS`."""
    require_choice("kl_direction", direction, KL_DIRECTIONS)


def reference(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    direction: str = "teacher_student",
) -> torch.Tensor:
    """The definition, from whole logits, differentiable by autograd."""
    log_p, log_q = (
        _capped(functional.linear(h, weight, bias), scale, softcap).log_softmax(-1)
        for h in (student_hidden, teacher_hidden.detach())
    )
    if direction == "student_teacher":
        log_p, log_q = log_q, log_p
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def distillation_reference(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lm_weight: float,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    direction: str = "teacher_student",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of `linear_distillation`, from whole logits, differentiable by autograd."""
    s, t = student_hidden, teacher_hidden
    kl = reference(s, t, weight, bias, scale=scale, softcap=softcap, direction=direction)
    counted = targets >= 0
    z = _capped(functional.linear(s[counted], weight, bias), scale, softcap)
    lm = functional.cross_entropy(z, targets[counted], reduction="sum") / max(1, len(z))
    return (1 - lm_weight) * kl + lm_weight * lm, kl, lm


def _capped(z: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    z = (z.double() if z.dtype == torch.float64 else z.float()) * scale
    return torch.tanh(z / softcap) * softcap if softcap else z


def kl_rows(
    log_p: torch.Tensor, log_q: torch.Tensor, reverse: bool, spare: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row and its gradient in the student's logits; overwrites its arguments.

    Args:
        log_p, log_q: (n, V) log-softmax of the student's and the teacher's logits.
        reverse: KL(p || q), not KL(q || p).
        spare: (n, V) to compute in; None: a new one.

    Returns:
        (n,) and (n, V).
    """
    if reverse:
        p = torch.exp(log_p, out=spare)
        gap = log_p.sub_(log_q)
        kl = torch.mul(p, gap, out=log_q).sum(-1)
        return kl, gap.sub_(kl[:, None]).mul_(p)
    q = torch.exp(log_q, out=spare)
    kl = log_q.sub_(log_p).mul_(q).sum(-1)
    return kl, log_p.exp_().sub_(q)


def _forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    reverse: bool,
    chunk: int,
    with_gradient: bool,
    targets: torch.Tensor | None = None,
    lm_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss; KL and CE; and the gradient in `student` of n times the loss, empty if not wanted.

    n is the number of tokens.
    """
    work = torch.float64 if student.dtype == torch.float64 else torch.float32
    n, shape = student.shape[0], (min(chunk, student.shape[0]), weight.shape[0])
    gradient = torch.empty_like(student if with_gradient else student[:0])
    kl, ce = student.new_zeros(2, dtype=work)
    # Every chunk computes in the same memory: new pages cost more than what is written to them.
    z, log_p, log_q = (student.new_empty(shape, dtype=work) for _ in range(3))
    lower = z if weight.dtype == work else student.new_empty(shape, dtype=weight.dtype)
    if targets is not None:
        counted = (targets >= 0).to(work)[:, None]
        index = targets.clamp(min=0)[:, None]
        # Of a token's row in n times the loss.
        share = lm_weight * n / counted.sum().clamp(min=1) * counted
    with torch.autocast(student.device.type, enabled=False):
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            s, t = student[rows], teacher[rows]
            spare = z[: len(s)]
            product = spare if lower is z else lower[: len(s)]
            p, q = log_p[: len(s)], log_q[: len(s)]
            logits = _logits(s, weight, bias, scale, softcap, spare, product)
            slope = None
            if softcap and with_gradient:
                slope = torch.div(logits, softcap).square_().neg_().add_(1)
            torch.log_softmax(logits, -1, out=p)
            torch.log_softmax(_logits(t, weight, bias, scale, softcap, spare, product), -1, out=q)
            if targets is not None:
                ce -= (p.gather(1, index[rows]) * counted[rows]).sum()
            of_row, d = kl_rows(p, q, reverse, spare)
            kl += of_row.sum()
            if not with_gradient:
                continue
            if targets is not None:
                # The student's probabilities are in `spare`, or d and the teacher's make them.
                d.mul_(1 - lm_weight if reverse else 1 - lm_weight + share[rows])
                d.addcmul_(spare, share[rows]).scatter_add_(1, index[rows], -share[rows])
            d = d if slope is None else d.mul_(slope)
            d = d if scale == 1 else d.mul_(scale)
            d = d if product is spare else product.copy_(d)
            torch.mm(d, weight, out=gradient[rows])
    kl = kl / n
    if targets is None:
        return kl, torch.stack([kl, ce]), gradient
    ce = ce / counted.sum().clamp(min=1)
    return (1 - lm_weight) * kl + lm_weight * ce, torch.stack([kl, ce]), gradient


def _logits(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
    product: torch.Tensor,
) -> torch.Tensor:
    """Writes the logits to `out`, by way of `product`, which has the weight's dtype."""
    if bias is None:
        torch.mm(h, weight.T, out=product)
    else:
        torch.addmm(bias, h, weight.T, out=product)
    z = out if product is out else out.copy_(product)
    z = z if scale == 1 else z.mul_(scale)
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def _save(ctx: Context, inputs: Inputs, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.tokens = inputs[0].shape[0]


def _gradients(ctx: Context, upstream: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_kl has no second derivative; use maskprune.ops.linear_kl.reference"
        )
    (gradient,) = ctx.saved_tensors
    return ((gradient * (upstream / ctx.tokens)).to(gradient.dtype), *[None] * 10)


def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    reverse: bool,
    chunk: int,
    with_gradient: bool,
    targets: torch.Tensor | None = None,
    lm_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    work = torch.float64 if student.dtype == torch.float64 else torch.float32
    return (
        student.new_empty((), dtype=work),
        student.new_empty(2, dtype=work),
        torch.empty_like(student if with_gradient else student[:0]),
    )


register(
    "linear_kl(Tensor student, Tensor teacher, Tensor weight, Tensor? bias, float scale,"
    " float? softcap, bool reverse, int chunk, bool with_gradient, Tensor? targets,"
    " float lm_weight) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    gradients=_gradients,
    save=_save,
)
