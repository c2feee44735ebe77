"""The least-s proximal step: in every row, shrink the ceil(s) entries of smallest magnitude.

Legend: m (R, N) masks - s (R,) entries to shrink, real - shrink, the factor 1 / (1 + 2 eta y).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from maskprune.ops.backend import Backend, choose, compiled, eager
from maskprune.ops.register import register

ISAS = ("auto", "avx512", "avx2", "portable")


class LeastS(NamedTuple):
    """Results of the step, (R,) float32 each; both are NaN for a row that it left as it was."""

    sum_sq: torch.Tensor
    next_sq: torch.Tensor


def least_s_prox_(
    mask: torch.Tensor,
    s: torch.Tensor | float,
    shrink: torch.Tensor | float,
    *,
    backend: str = "auto",
) -> LeastS:
    """mask[r, i] *= shrink for the k = ceil(s[r]) entries of smallest |mask[r, i]|, in place.

    With shrink = 1 / (1 + 2 eta y) this is the proximal map of eta y ||m||^2_{k,2}, the sum of
    the k smallest squares. Exactly k entries are shrunk: k is ceil(s) taken in float32, clamped
    to [0, N]; of equal magnitudes the lower index goes first. The step has no gradient and runs
    like an optimizer's, outside autograd, also on parameters.

    A NaN in a row, in its s or in shrink leaves that row as it is and makes both of its results
    NaN: the caller can notice it later, without a host synchronisation here.

    Args:
        mask: (R, N) float32, any sign, changed in place; entries of a row adjacent in memory,
            rows any distance apart.
        s: 0-dim or (R,), a real tensor on the device of `mask`, or a number.
        shrink: 0-dim tensor on the device of `mask`, or a number.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        sum_sq (R,): sum of the squares of the k entries, after the shrink. next_sq (R,): square
        of the smallest entry not shrunk; where k = N, of the largest, after the shrink; 0 where
        N = 0. float32; equal across backends to float32 rounding of the sum, next_sq to the bit.

    Raises:
        ValueError: another shape, device or layout than the above, or an unknown backend.
        TypeError: another dtype than the above.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskPrune, arXiv 2502.14008, Algorithm 1, the proximal step.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"least_s_prox_: mask is {tuple(mask.shape)}; expected (R, N); pass mask[None] for "
            "one mask of one dimension"
        )
    _check_rows(mask)
    s, shrink = _real("s", s, mask.device), _real("shrink", shrink, mask.device)
    if s.dim() and s.shape != mask.shape[:1]:
        raise ValueError(
            f"least_s_prox_: s is {tuple(s.shape)}; expected 0-dim or ({mask.shape[0]},), one per "
            "row"
        )
    if shrink.dim():
        raise ValueError(f"least_s_prox_: shrink is {tuple(shrink.shape)}; expected a 0-dim tensor")
    if eager(mask):
        return _run(mask, s, shrink, backend)
    given = mask.detach(), s.detach(), shrink.detach()
    return LeastS(*torch.ops.maskprune.least_s_prox_(*given, backend))


@torch.no_grad()
def reference(m: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor) -> LeastS:
    """The definition: one stable sort of |m| per row. Sums in float64, rounded once."""
    R, N = m.shape
    k = s.float().ceil().nan_to_num(0.0).clamp(0, N).long().expand(R)
    order = m.abs().argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=m.device).expand_as(m))
    chosen = rank < k[:, None]
    broken = (m.isnan().any(1) | s.isnan() | shrink.isnan())[:, None]
    new = torch.where(chosen & ~broken, m * shrink.to(m.dtype), m)
    sum_sq = torch.where(chosen, new.double(), 0.0).square().sum(1).to(m.dtype)
    next_sq = torch.where(rank == k.clamp(max=N - 1)[:, None], new, 0.0).square().sum(1)
    m.copy_(new)
    nan = torch.full_like(sum_sq, float("nan"))
    return LeastS(torch.where(broken[:, 0], nan, sum_sq), torch.where(broken[:, 0], nan, next_sq))


def cpp(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor, isa: str = "auto") -> LeastS:
    """The C++ backend; `isa` is one of `ISAS`."""
    R, N = mask.shape
    s, shrink = s.float().contiguous(), shrink.float()
    sum_sq = torch.empty(R, dtype=torch.float32)
    next_sq = torch.empty(R, dtype=torch.float32)
    compiled().least_s_prox(
        mask.data_ptr(),
        R,
        N,
        mask.stride(0),
        s.data_ptr(),
        s.dim(),
        shrink.data_ptr(),
        sum_sq.data_ptr(),
        next_sq.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return LeastS(sum_sq, next_sq)


def _check_rows(mask: torch.Tensor) -> None:
    if mask.dtype != torch.float32:
        raise TypeError(
            f"least_s_prox_: mask is {mask.dtype}; expected float32; convert with .float()"
        )
    if mask.is_contiguous() or not mask.numel():
        return
    if mask.stride(1) != 1 and mask.shape[1] > 1:
        raise ValueError(
            f"least_s_prox_: mask has strides {mask.stride()}; expected a last stride of 1, since "
            "it is changed in place; keep the mask as a contiguous tensor"
        )
    if len(mask) > 1 and mask.stride(0) < mask.shape[1]:
        raise ValueError(
            f"least_s_prox_: mask is {tuple(mask.shape)} with strides {mask.stride()}; expected "
            "rows that share no memory; use .clone()"
        )


def _real(name: str, x: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        return torch.full((), x, dtype=torch.float32, device=device)
    if not x.is_floating_point():
        raise TypeError(
            f"least_s_prox_: {name} is {x.dtype}; expected a floating dtype; use .float()"
        )
    if x.device != device:
        raise ValueError(
            f"least_s_prox_: {name} is on {x.device}, mask on {device}; move it with "
            ".to(mask.device)"
        )
    return x


def _run(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor, backend: str) -> LeastS:
    chosen = choose("least_s_prox_", backend, mask)
    increment_version(mask)
    match chosen:
        case Backend.CPP:
            return cpp(mask, s, shrink)
        case Backend.TRITON:
            from maskprune.kernels.least_s_prox import least_s_prox

            return LeastS(*least_s_prox(mask, s, shrink))
    return reference(mask, s, shrink)


register(
    "least_s_prox_(Tensor(a!) mask, Tensor s, Tensor shrink, str backend) -> (Tensor, Tensor)",
    _run,
    lambda mask, s, shrink, backend: (mask.new_empty(len(mask)), mask.new_empty(len(mask))),
)
