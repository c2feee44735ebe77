"""One step of MaskPrune's Algorithm 1 after the gradient step: clamp, prox, s, y, z, budget, lock.

Letters: m masks, D units per row, r = s / D pruned fraction of a kind, a its share of the weights,
R = 1 - sum of a r the resource, R* the budget, y and z dual variables, k the interval of FFN prox.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from maskprune.ops.backend import Backend, choose, compiled
from maskprune.ops.least_s_prox import least_s_prox_

# Where each scalar lives in the float32 state vector on the device.
FIELDS = (
    "step",
    "y",
    "z",
    "R",
    "locked",
    "failed",
    "r_head",
    "r_ffn",
    "s_head",
    "s_ffn",
    "S",
    "next_head",
    "next_ffn",
    "interval",
    "shrink",
    "locked_at",
)
# The Triton backend's limit: one program compares every pair of units of a head row.
TRITON_HEAD_UNITS = 128
INDEX = {name: i for i, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class Rates:
    """Constants of one run.

    a_head, a_ffn: shares of the attention and FFN weights that each kind can free.
    R_star: the budget in (0, 1).
    total_steps: T.
    eta1, eta1_end: decay rate at step 0 and T, geometric between; a prox call divides by 1 + 2
    eta1 y. eta2: step of r. eta3: step of y, per unit of S. eta4: step of z / y, per unit of
    relative excess (R - R*) / (1 - R*).
    reach: share of T over which R goes from 1 to R*; no step frees more than 1.25 of its even part.
    interval: k of the first step; falls linearly to 1.
    lock_gap: the relative excess at which the nearest legal shape becomes final.
    scheduled: r rises linearly over `reach` to these fractions, instead of following z.
    to_head, to_ffn: the fractions that it rises to.
    """

    a_head: float
    a_ffn: float
    R_star: float
    total_steps: int
    eta1: float
    eta1_end: float
    eta2: float
    eta3: float
    eta4: float
    reach: float
    interval: int
    lock_gap: float
    scheduled: bool = False
    to_head: float = 0.0
    to_ffn: float = 0.0


def initial_state(y0: float, z0: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """(len(FIELDS),) float32: dense, unlocked, at step 0."""
    state = torch.zeros(len(FIELDS), dtype=torch.float32, device=device)
    state[INDEX["y"]], state[INDEX["z"]], state[INDEX["R"]] = y0, z0, 1.0
    state[INDEX["shrink"]], state[INDEX["locked_at"]] = 1.0, -1.0
    return state


def minimax_step_(
    head: torch.Tensor,
    ffn: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    rates: Rates,
    *,
    backend: str = "auto",
) -> None:
    """One step of Algorithm 1 on both kinds of mask, in place, without a host synchronisation.

    In order: clamp m to [0, 1]; shrink the floor(s) smallest of each row (FFN rows every k-th
    step), so that no unit shrinks before it is due as a whole; r_q += eta2 (z - y mean m^2_next),
    both scaled down alike where they would free more than a step may; pull R back
    to R* if it fell below; snap to the nearest legal split and lock once R is within `lock_gap`;
    y += eta3 S; z += eta4 y max(e, 1/2) with e = (R - R*) / (1 - R*), eta4 y e once locked. z
    starts at the price y m^2_next of the cheapest unit.
    Masks with a NaN set `failed` and leave everything else as it was.

    Args:
        head: (rows, D_head) float32, may be empty.
        ffn: (rows, D_ffn) float32.
        state: (len(FIELDS),) float32, updated in place.
        table: (K, 2) float32, the legal splits as pruned units per row, each with R <= R*.
        rates: constants of the run.
        backend: "auto", "reference", "cpp" (one call) or "triton" (one launch). They agree on
            every choice and, in the scalars, to float32 rounding.

    Raises:
        ValueError: another shape, device or layout than the above, or an unknown backend.
        TypeError: a dtype other than float32.
        RuntimeError: an explicit backend that is not available here.

    Source: MaskPrune (arXiv 2502.14008), Algorithm 1, in the normalised form of docs/method.md.
    """
    _check(head, ffn, state, table)
    chosen = choose("minimax_step_", backend, ffn)
    if chosen == Backend.TRITON and backend == "auto" and head.shape[1] > TRITON_HEAD_UNITS:
        chosen = Backend.REFERENCE
    match chosen:
        case Backend.CPP:
            cpp(head, ffn, state, table, rates)
        case Backend.TRITON:
            triton(head, ffn, state, table, rates)
        case _:
            reference(head, ffn, state, table, rates)


@torch.no_grad()
def reference(
    head: torch.Tensor,
    ffn: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    rates: Rates,
) -> None:
    """The definition in plain torch; decisions are `torch.where`, never a branch on a value."""
    v = dict(zip(FIELDS, state.clone().unbind(), strict=True))
    one, zero = torch.ones_like(v["y"]), torch.zeros_like(v["y"])
    T, R_star = rates.total_steps, rates.R_star
    failed = torch.isnan(head).any() | torch.isnan(ffn).any() | (v["failed"] > 0)
    locked = v["locked"] > 0
    progress = v["step"] / T
    eta1 = rates.eta1 * torch.exp(math.log(rates.eta1_end / rates.eta1) * progress)
    shrink = 1.0 / (1.0 + 2.0 * eta1 * v["y"])
    k = (rates.interval + (1 - rates.interval) * progress).round().clamp(min=1.0)
    ffn_due = torch.remainder(v["step"], k) == 0

    kinds = (
        ("head", head, rates.a_head, shrink),
        ("ffn", ffn, rates.a_ffn, torch.where(ffn_due, shrink, one)),
    )
    S, r, cheapest = zero, {"head": zero, "ffn": zero}, torch.full_like(zero, math.inf)
    for name, m, a, factor in kinds:
        if not m.numel():
            continue
        shrunk = m.clamp(0.0, 1.0)
        least = least_s_prox_(shrunk, v[f"s_{name}"].floor(), factor, backend="reference")
        m.copy_(torch.where(failed, m, shrunk))
        S = S + a * least.sum_sq.mean() / m.shape[1]
        v[f"next_{name}"] = least.next_sq.mean()
        cheapest = torch.minimum(cheapest, v[f"next_{name}"])
    v["z"] = torch.where(v["step"] == 0, v["y"] * cheapest, v["z"])

    part = 1.25 * (1.0 - R_star) / (rates.reach * T)
    if rates.scheduled:
        share = (v["step"] + 1.0) / (rates.reach * T)
        for name, to in (("head", rates.to_head), ("ffn", rates.to_ffn)):
            r[name] = share * to
    else:
        wish = {
            name: rates.eta2 * (v["z"] - v["y"] * v[f"next_{name}"]) if m.numel() else zero
            for name, m, _, _ in kinds
        }
        freed = rates.a_head * wish["head"] + rates.a_ffn * wish["ffn"]
        slow = torch.where(freed > part, part / freed, one)
        r = {name: v[f"r_{name}"] + slow * wish[name] for name in wish}
    for name, m, _, _ in kinds:
        if m.numel():
            r[name] = r[name].clamp(0.0, 1.0 - 1.0 / m.shape[1])

    # Pull back by a common factor: it keeps the learned split and stays within the bounds.
    freed = rates.a_head * r["head"] + rates.a_ffn * r["ffn"]
    back = torch.where(freed > 1.0 - R_star, (1.0 - R_star) / freed, one)
    r = {name: value * back for name, value in r.items()}
    R = 1.0 - rates.a_head * r["head"] - rates.a_ffn * r["ffn"]

    reached = (R - R_star) <= rates.lock_gap * (1.0 - R_star)
    D_head, D_ffn = max(1, head.shape[1]), ffn.shape[1]
    head_splits, ffn_splits = table.unbind(1)
    legal_head, legal_ffn = head_splits / D_head, ffn_splits / D_ffn
    head_away, ffn_away = (legal_head - r["head"]).abs(), (legal_ffn - r["ffn"]).abs()
    nearest = (rates.a_head * head_away + rates.a_ffn * ffn_away).argmin()
    locking = reached & ~locked
    # `take`, since table[nearest] would copy the index to the host.
    for name, splits, D in (("head", head_splits, D_head), ("ffn", ffn_splits, D_ffn)):
        free = torch.where(locking, splits.take(nearest) / D, r[name])
        v[f"r_{name}"] = torch.where(locked, v[f"r_{name}"], free)
        units = torch.where(locking, splits.take(nearest), free * D)
        v[f"s_{name}"] = torch.where(locked, v[f"s_{name}"], units)
    v["R"] = 1.0 - rates.a_head * v["r_head"] - rates.a_ffn * v["r_ffn"]
    v["locked_at"] = torch.where(locking, v["step"], v["locked_at"])
    v["locked"] = torch.where(locking, one, v["locked"])

    v["y"] = v["y"] + rates.eta3 * S
    excess = (v["R"] - R_star) / (1.0 - R_star)
    # The floor ends the ramp in a bounded time: the excess alone approaches 0 ever more slowly.
    excess = torch.where(v["locked"] > 0, excess, excess.clamp(min=0.5))
    v["z"] = (v["z"] + rates.eta4 * v["y"] * excess).clamp(min=0.0)
    v["S"], v["interval"], v["shrink"] = S, k, shrink
    v["step"] = v["step"] + 1.0
    new = torch.stack([v[name] for name in FIELDS])
    state.copy_(torch.where(failed, state, new))
    state[INDEX["failed"]] = failed.to(state.dtype)


def rate_vector(rates: Rates) -> list[float]:
    """The constants as the C++ and Triton backends take them."""
    return [
        rates.a_head,
        rates.a_ffn,
        rates.R_star,
        float(rates.total_steps),
        rates.eta1,
        math.log(rates.eta1_end / rates.eta1),
        rates.eta2,
        rates.eta3,
        rates.eta4,
        rates.reach,
        float(rates.interval),
        rates.lock_gap,
        rates.to_head,
        rates.to_ffn,
        float(rates.scheduled),
    ]


def cpp(
    head: torch.Tensor,
    ffn: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    rates: Rates,
    isa: str = "auto",
) -> None:
    """The C++ backend; `isa` is one of `least_s_prox.ISAS`."""
    for changed in (head, ffn, state):
        torch.autograd.graph.increment_version(changed)
    compiled().minimax_step(
        head.data_ptr(),
        *head.shape,
        ffn.data_ptr(),
        *ffn.shape,
        state.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        rate_vector(rates),
        torch.get_num_threads(),
        isa,
    )


def triton(
    head: torch.Tensor,
    ffn: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    rates: Rates,
) -> None:
    """The Triton backend, which ranks all pairs of a head row."""
    from maskprune.kernels.minimax_step import minimax_step

    if head.shape[1] > TRITON_HEAD_UNITS:
        raise ValueError(
            f"minimax_step_: head rows have {head.shape[1]} units; the Triton backend takes up to "
            f"{TRITON_HEAD_UNITS}; use backend='reference'"
        )
    for changed in (head, ffn, state):
        torch.autograd.graph.increment_version(changed)
    minimax_step(head, ffn, state, table, rate_vector(rates))


def _check(head: torch.Tensor, ffn: torch.Tensor, state: torch.Tensor, table: torch.Tensor) -> None:
    expected = {
        "head": (head, "(rows, D_head)", head.dim() == 2),
        "ffn": (ffn, "(rows, D_ffn), not empty", ffn.dim() == 2 and ffn.numel() > 0),
        "state": (state, f"({len(FIELDS)},)", state.shape == (len(FIELDS),)),
        "table": (
            table,
            "(K, 2), K > 0",
            table.dim() == 2 and table.shape[1] == 2 and table.numel(),
        ),
    }
    for name, (x, shape, fits) in expected.items():
        if not fits:
            raise ValueError(f"minimax_step_: {name} is {tuple(x.shape)}; expected {shape}")
        if x.dtype != torch.float32:
            raise TypeError(f"minimax_step_: {name} is {x.dtype}; expected float32; use .float()")
        if x.device != ffn.device or not x.is_contiguous():
            raise ValueError(
                f"minimax_step_: {name} is on {x.device} with strides {x.stride()}; expected a "
                f"contiguous tensor on {ffn.device}, where the masks are"
            )
