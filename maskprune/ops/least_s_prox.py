"""The least-s proximal step: in every row, shrink the ceil(s) entries of smallest magnitude.

Legend: m (R, N) masks - s (R,) entries to shrink, real - shrink, the factor 1 / (1 + 2 eta y).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from maskprune.ops.backend import choose, eager, extension

ISAS = ("auto", "avx512", "avx2", "portable")


class LeastS(NamedTuple):
    """What the step leaves behind, per row; both are NaN for a row it refused to touch."""

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
    NaN: the caller can stop at a checkpoint of its own without a host synchronisation here.

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
        ValueError: a shape, a device or a layout that is not the above, or an unknown backend.
        TypeError: a dtype that is not the above.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskPrune, arXiv 2502.14008, Algorithm 1, the proximal step.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"least_s_prox_: mask is {tuple(mask.shape)}; expected (R, N); for separate 1-D "
            "masks use foreach_least_s_prox_"
        )
    _check_rows("least_s_prox_", [mask])
    s, shrink = _on_device("least_s_prox_", mask, mask.shape[0], s, shrink)
    if eager(mask):
        return _run(mask, s, shrink, backend)
    given = mask.detach(), s.detach(), shrink.detach()
    return LeastS(*torch.ops.maskprune.least_s_prox_(*given, backend))


def foreach_least_s_prox_(
    masks: Sequence[torch.Tensor],
    s: torch.Tensor | float,
    shrink: torch.Tensor | float,
    *,
    backend: str = "auto",
) -> LeastS:
    """`least_s_prox_` of masks that live apart, each 1-D tensor one row, in one call or launch.

    Args:
        masks: R tensors (N_r,) float32 on one device, any lengths, changed in place; entries
            adjacent in memory; no two share memory.
        s, shrink, backend: as for `least_s_prox_`.

    Returns, raises: as for `least_s_prox_`.
    """
    masks = list(masks)
    if not masks:
        raise ValueError("foreach_least_s_prox_: masks is empty; expected at least one tensor")
    for i, mask in enumerate(masks):
        if mask.dim() != 1 or mask.device != masks[0].device:
            raise ValueError(
                f"foreach_least_s_prox_: masks[{i}] is {tuple(mask.shape)} on {mask.device}; "
                f"expected 1-D on {masks[0].device}; for one (R, N) tensor use least_s_prox_"
            )
    _check_rows("foreach_least_s_prox_", masks)
    s, shrink = _on_device("foreach_least_s_prox_", masks[0], len(masks), s, shrink)
    if eager(*masks):
        return _run_foreach(masks, s, shrink, backend)
    given = [mask.detach() for mask in masks], s.detach(), shrink.detach()
    return LeastS(*torch.ops.maskprune.foreach_least_s_prox_(*given, backend))


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


def cpp(
    rows: torch.Tensor | Sequence[torch.Tensor],
    s: torch.Tensor,
    shrink: torch.Tensor,
    isa: str = "auto",
) -> LeastS:
    """The C++ backend on a (R, N) tensor or a list of 1-D ones; `isa` is one of `ISAS`."""
    lib = extension()
    assert lib is not None, "choose() lets nothing through without the extension"
    where: tuple[int | list[int], ...]
    # Not len() of a tensor, which is slow Python: a step of a 7B model is a tenth of a millisecond.
    if isinstance(rows, torch.Tensor):
        R, N = rows.shape
        run, where = lib.least_s_prox, (rows.data_ptr(), R, N, rows.stride(0))
    else:
        R, run = len(rows), lib.foreach_least_s_prox
        where = [m.data_ptr() for m in rows], [m.numel() for m in rows]
    s, shrink = s.float().contiguous(), shrink.float()
    sum_sq = torch.empty(R, dtype=torch.float32)
    next_sq = torch.empty(R, dtype=torch.float32)
    run(
        *where,
        s.data_ptr(),
        s.dim(),
        shrink.data_ptr(),
        sum_sq.data_ptr(),
        next_sq.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return LeastS(sum_sq, next_sq)


def _check_rows(op: str, rows: Sequence[torch.Tensor]) -> None:
    for m in rows:
        if m.dtype != torch.float32:
            raise TypeError(f"{op}: mask is {m.dtype}; expected float32; convert with .float()")
        if m.is_contiguous():
            continue
        if m.numel() and m.stride(-1) != 1 and m.shape[-1] > 1:
            raise ValueError(
                f"{op}: mask has strides {m.stride()}; expected a last stride of 1, since it is "
                "changed in place; keep the mask as a contiguous tensor"
            )
        if m.dim() == 2 and len(m) > 1 and m.stride(0) < m.shape[1]:
            raise ValueError(
                f"{op}: mask is {tuple(m.shape)} with strides {m.stride()}; expected rows that "
                "share no memory; use .clone()"
            )


def _on_device(
    op: str,
    mask: torch.Tensor,
    R: int,
    s: torch.Tensor | float,
    shrink: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    s = _real(op, "s", s, mask.device)
    shrink = _real(op, "shrink", shrink, mask.device)
    if s.dim() and s.shape != (R,):
        raise ValueError(f"{op}: s is {tuple(s.shape)}; expected 0-dim or ({R},), one per row")
    if shrink.dim():
        raise ValueError(f"{op}: shrink is {tuple(shrink.shape)}; expected a 0-dim tensor")
    return s, shrink


def _real(op: str, name: str, x: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        return torch.full((), x, dtype=torch.float32, device=device)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {x.dtype}; expected a floating dtype; use .float()")
    if x.device != device:
        raise ValueError(
            f"{op}: {name} is on {x.device}, mask on {device}; move it with .to(mask.device)"
        )
    return x


library = torch.library.Library("maskprune", "FRAGMENT")
library.define("least_s_prox_(Tensor(a!) mask, Tensor s, Tensor shrink, str b) -> (Tensor, Tensor)")
library.define(
    "foreach_least_s_prox_(Tensor(a!)[] masks, Tensor s, Tensor shrink, str b) -> (Tensor, Tensor)"
)


def _run(mask: torch.Tensor, s: torch.Tensor, shrink: torch.Tensor, backend: str) -> LeastS:
    chosen = choose("least_s_prox_", backend, mask)
    increment_version(mask)
    if chosen == "reference":
        return reference(mask, s, shrink)
    if chosen == "cpp":
        return cpp(mask, s, shrink)
    from maskprune.kernels.least_s_prox import least_s_prox

    return LeastS(*least_s_prox(mask, s, shrink))


def _run_foreach(
    masks: list[torch.Tensor], s: torch.Tensor, shrink: torch.Tensor, backend: str
) -> LeastS:
    chosen = choose("foreach_least_s_prox_", backend, masks[0])
    for mask in masks:
        increment_version(mask)
    if chosen == "cpp":
        return cpp(masks, s, shrink)
    if chosen == "triton":
        from maskprune.kernels.least_s_prox import foreach_least_s_prox

        return LeastS(*foreach_least_s_prox(masks, s, shrink))
    each = s.expand(len(masks))
    done = [reference(m[None], each[r, None], shrink) for r, m in enumerate(masks)]
    return LeastS(torch.cat([d.sum_sq for d in done]), torch.cat([d.next_sq for d in done]))


def _two_per_row(
    rows: torch.Tensor | list[torch.Tensor], s: torch.Tensor, shrink: torch.Tensor, b: str
) -> tuple[torch.Tensor, torch.Tensor]:
    first = rows if isinstance(rows, torch.Tensor) else rows[0]
    return first.new_empty(len(rows)), first.new_empty(len(rows))


for _name, _call in (("least_s_prox_", _run), ("foreach_least_s_prox_", _run_foreach)):
    library.impl(_name, _call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"maskprune::{_name}", _two_per_row, lib=library)
