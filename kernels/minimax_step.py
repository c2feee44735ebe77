"""One step of Algorithm 1 in one Triton launch: a program per mask row, the last moves the scalars.

Every program clamps and shrinks its row and leaves its sums; a counter tells the one that finishes
last, which adds them in a fixed order, moves the scalars and resets the counter. No program waits
for another. Rows are saved first: if any held a NaN, the last program restores all of them.

Legend: as in the definition, maskprune/ops/minimax_step.py, whose FIELDS number the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from maskprune.kernels.least_s_prox import prox_row
from maskprune.kernels.least_s_rows import ALL_PAIRS_LIMIT, Tile, prox_all_pairs, tile_for

STEP = tl.constexpr(0)
Y = tl.constexpr(1)
Z = tl.constexpr(2)
R_NOW = tl.constexpr(3)
LOCKED = tl.constexpr(4)
FAILED = tl.constexpr(5)
R_HEAD = tl.constexpr(6)
R_FFN = tl.constexpr(7)
S_HEAD = tl.constexpr(8)
S_FFN = tl.constexpr(9)
S_NORM = tl.constexpr(10)
NEXT_HEAD = tl.constexpr(11)
NEXT_FFN = tl.constexpr(12)
INTERVAL = tl.constexpr(13)
SHRINK = tl.constexpr(14)
LOCKED_AT = tl.constexpr(15)
LANES = tl.constexpr(128)


@triton.jit
def round_half_even(x):
    low = tl.floor(x)
    part = x - low
    odd = low - 2.0 * tl.floor(0.5 * low) == 1.0
    return low + tl.where((part > 0.5) | ((part == 0.5) & odd), 1.0, 0.0)


@triton.jit
def mean_of(ptr, count):
    """Mean of count results of other programs, in a fixed order; bypasses the L1 cache."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    i = 0
    while i < count:
        inside = i + lanes < count
        total += tl.load(ptr + i + lanes, mask=inside, other=0.0, cache_modifier=".cg")
        i += LANES
    return tl.div_rn(tl.sum(total, axis=0), tl.maximum(count, 1) * 1.0)


@triton.jit
def put_back(ptr, saved_ptr, count):
    lanes = tl.arange(0, LANES)
    i = 0
    while i < count:
        inside = i + lanes < count
        x = tl.load(saved_ptr + i + lanes, mask=inside, cache_modifier=".cg")
        tl.store(ptr + i + lanes, x, mask=inside)
        i += LANES


@triton.jit
def nearest_split(table_ptr, splits, r_head, r_ffn, D_head, D_ffn, a_head, a_ffn):
    """Index of the legal split nearest to r, weighed by the shares; the first of equals."""
    lanes = tl.arange(0, LANES)
    least = float("inf")
    best = 0
    i = 0
    while i < splits:
        inside = i + lanes < splits
        s_head = tl.load(table_ptr + 2 * (i + lanes), mask=inside, other=0.0)
        s_ffn = tl.load(table_ptr + 2 * (i + lanes) + 1, mask=inside, other=0.0)
        away = a_head * tl.abs(tl.div_rn(s_head, D_head) - r_head)
        away += a_ffn * tl.abs(tl.div_rn(s_ffn, D_ffn) - r_ffn)
        away = tl.where(inside, away, float("inf"))
        here = tl.min(away, axis=0)
        index = tl.min(tl.where(away == here, i + lanes, 2147483647), axis=0)
        best = tl.where(here < least, index, best)
        least = tl.minimum(least, here)
        i += LANES
    return best


@triton.jit
def rates_now(state_ptr, T, eta1, log_eta1_ratio, interval):
    """(shrink, interval of the FFN prox, whether it is due) in the current state."""
    step = tl.load(state_ptr + STEP)
    progress = tl.div_rn(step, T)
    eta = eta1 * tl.exp(log_eta1_ratio * progress)
    shrink = tl.div_rn(1.0, 1.0 + 2.0 * eta * tl.load(state_ptr + Y))
    k = tl.maximum(round_half_even(interval + (1.0 - interval) * progress), 1.0)
    return shrink, k, step - k * tl.floor(tl.div_rn(step, k)) == 0


@triton.jit
def step_scalars(
    state_ptr,
    table_ptr,
    sum_head,
    next_head,
    sum_ffn,
    next_ffn,
    R_head,
    D_head,
    D_ffn,
    splits,
    a_head,
    a_ffn,
    R_star,
    T,
    eta1,
    log_eta1_ratio,
    eta2,
    eta3,
    eta4,
    reach,
    interval,
    lock_gap,
    to_head,
    to_ffn,
    SCHEDULED: tl.constexpr,
):
    shrink, k, _ = rates_now(state_ptr, T, eta1, log_eta1_ratio, interval)
    tl.store(state_ptr + INTERVAL, k)
    tl.store(state_ptr + SHRINK, shrink)
    step = tl.load(state_ptr + STEP)
    y = tl.load(state_ptr + Y)
    z = tl.load(state_ptr + Z)
    locked = tl.load(state_ptr + LOCKED) > 0
    has_head = R_head > 0
    units_head = tl.maximum(D_head, 1) * 1.0
    units_ffn = D_ffn * 1.0
    S = tl.where(has_head, tl.div_rn(a_head * sum_head, units_head), 0.0)
    S += tl.div_rn(a_ffn * sum_ffn, units_ffn)
    next_head = tl.where(has_head, next_head, tl.load(state_ptr + NEXT_HEAD))
    cheapest = tl.minimum(tl.where(has_head, next_head, float("inf")), next_ffn)
    z = tl.where(step == 0, y * cheapest, z)

    saved = 1.0 - R_star
    ramp = reach * T
    if SCHEDULED:
        share = tl.div_rn(step + 1.0, ramp)
        r_head = share * to_head
        r_ffn = share * to_ffn
    else:
        wish_head = tl.where(has_head, eta2 * (z - y * next_head), 0.0)
        wish_ffn = eta2 * (z - y * next_ffn)
        freed = a_head * wish_head + a_ffn * wish_ffn
        part = tl.div_rn(1.25 * saved, ramp)
        slow = tl.div_rn(part, tl.maximum(freed, part))
        r_head = tl.load(state_ptr + R_HEAD) + slow * wish_head
        r_ffn = tl.load(state_ptr + R_FFN) + slow * wish_ffn
    most_head = 1.0 - tl.div_rn(1.0, units_head)
    most_ffn = 1.0 - tl.div_rn(1.0, units_ffn)
    r_head = tl.where(has_head, tl.minimum(tl.maximum(r_head, 0.0), most_head), 0.0)
    r_ffn = tl.minimum(tl.maximum(r_ffn, 0.0), most_ffn)

    freed = a_head * r_head + a_ffn * r_ffn
    back = tl.div_rn(saved, tl.maximum(freed, saved))
    r_head = r_head * back
    r_ffn = r_ffn * back
    R = 1.0 - a_head * r_head - a_ffn * r_ffn

    locking = (R - R_star <= lock_gap * saved) & (locked == 0)
    nearest = nearest_split(table_ptr, splits, r_head, r_ffn, units_head, units_ffn, a_head, a_ffn)
    legal_head = tl.load(table_ptr + 2 * nearest)
    legal_ffn = tl.load(table_ptr + 2 * nearest + 1)
    s_head = tl.where(locking, legal_head, r_head * units_head)
    s_ffn = tl.where(locking, legal_ffn, r_ffn * units_ffn)
    r_head = tl.where(locking, tl.div_rn(legal_head, units_head), r_head)
    r_ffn = tl.where(locking, tl.div_rn(legal_ffn, units_ffn), r_ffn)
    r_head = tl.where(locked, tl.load(state_ptr + R_HEAD), r_head)
    r_ffn = tl.where(locked, tl.load(state_ptr + R_FFN), r_ffn)
    s_head = tl.where(locked, tl.load(state_ptr + S_HEAD), s_head)
    s_ffn = tl.where(locked, tl.load(state_ptr + S_FFN), s_ffn)
    R = 1.0 - a_head * r_head - a_ffn * r_ffn

    y += eta3 * S
    excess = tl.div_rn(R - R_star, saved)
    excess = tl.where(locked | locking, excess, tl.maximum(excess, 0.5))
    tl.store(state_ptr + Z, tl.maximum(z + eta4 * y * excess, 0.0))
    tl.store(state_ptr + Y, y)
    tl.store(state_ptr + R_NOW, R)
    tl.store(state_ptr + LOCKED, tl.where(locked | locking, 1.0, 0.0))
    tl.store(state_ptr + LOCKED_AT, tl.where(locking, step, tl.load(state_ptr + LOCKED_AT)))
    tl.store(state_ptr + R_HEAD, r_head)
    tl.store(state_ptr + R_FFN, r_ffn)
    tl.store(state_ptr + S_HEAD, s_head)
    tl.store(state_ptr + S_FFN, s_ffn)
    tl.store(state_ptr + S_NORM, S)
    tl.store(state_ptr + NEXT_HEAD, next_head)
    tl.store(state_ptr + NEXT_FFN, next_ffn)
    tl.store(state_ptr + STEP, step + 1.0)


@triton.jit
def step_rows_then_scalars(
    head_ptr,
    ffn_ptr,
    state_ptr,
    table_ptr,
    saved_head_ptr,
    saved_ffn_ptr,
    sum_sq_ptr,
    next_sq_ptr,
    counter_ptr,
    R_head,
    D_head,
    R_ffn,
    D_ffn,
    splits,
    a_head,
    a_ffn,
    R_star,
    T,
    eta1,
    log_eta1_ratio,
    eta2,
    eta3,
    eta4,
    reach,
    interval,
    lock_gap,
    to_head,
    to_ffn,
    SCHEDULED: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    C: tl.constexpr,
):
    pid = tl.program_id(0)
    if tl.load(state_ptr + FAILED) == 0:
        shrink, _, due = rates_now(state_ptr, T, eta1, log_eta1_ratio, interval)
        if pid < R_ffn:
            row = pid.to(tl.int64) * D_ffn
            s = tl.floor(tl.load(state_ptr + S_FFN))
            factor = tl.where(due, shrink, 1.0)
            sum_sq, next_sq, sound = prox_row(
                ffn_ptr + row,
                saved_ffn_ptr + row,
                s,
                factor,
                D_ffn,
                True,
                KERNEL,
                BLOCK,
                R0,
                R1,
                R2,
                R3,
                C,
            )
        else:
            row = (pid - R_ffn).to(tl.int64) * D_head
            s = tl.floor(tl.load(state_ptr + S_HEAD))
            sum_sq, next_sq, sound = prox_all_pairs(
                head_ptr + row, saved_head_ptr + row, s, shrink, D_head, True, HEAD_BLOCK
            )
        tl.store(sum_sq_ptr + pid, tl.where(sound, sum_sq, float("nan")))
        tl.store(next_sq_ptr + pid, next_sq)

        # The counter releases what every thread of this program stored, not only its own.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == R_ffn + R_head - 1:
            sum_ffn = mean_of(sum_sq_ptr, R_ffn)
            sum_head = mean_of(sum_sq_ptr + R_ffn, R_head)
            if sum_ffn + sum_head == sum_ffn + sum_head:
                step_scalars(
                    state_ptr,
                    table_ptr,
                    sum_head,
                    mean_of(next_sq_ptr + R_ffn, R_head),
                    sum_ffn,
                    mean_of(next_sq_ptr, R_ffn),
                    R_head,
                    D_head,
                    D_ffn,
                    splits,
                    a_head,
                    a_ffn,
                    R_star,
                    T,
                    eta1,
                    log_eta1_ratio,
                    eta2,
                    eta3,
                    eta4,
                    reach,
                    interval,
                    lock_gap,
                    to_head,
                    to_ffn,
                    SCHEDULED,
                )
            else:
                put_back(ffn_ptr, saved_ffn_ptr, R_ffn * D_ffn)
                put_back(head_ptr, saved_head_ptr, R_head * D_head)
                tl.store(state_ptr + FAILED, 1.0)
            tl.store(counter_ptr, 0)


class Workspace(NamedTuple):
    """Scratch memory that the programs of a step share; it lives as long as the state."""

    saved_head_ptr: torch.Tensor
    saved_ffn_ptr: torch.Tensor
    sum_sq_ptr: torch.Tensor
    next_sq_ptr: torch.Tensor
    counter_ptr: torch.Tensor


_workspaces: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
RATE_NAMES = (
    "a_head a_ffn R_star T eta1 log_eta1_ratio eta2 eta3 eta4 reach interval lock_gap "
    "to_head to_ffn"
).split()


def ffn_tile(D_ffn: int) -> Tile:
    """The tile of FFN rows: never that of short rows, which head rows take."""
    return tile_for(max(D_ffn, ALL_PAIRS_LIMIT + 1))


def constants(D_head: int, D_ffn: int, scheduled: bool) -> dict[str, int | bool | str]:
    """The constexpr arguments of a launch."""
    return {
        "SCHEDULED": scheduled,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(max(D_head, 1))),
        **ffn_tile(D_ffn).constants,
    }


def minimax_step(
    head: torch.Tensor,
    ffn: torch.Tensor,
    state: torch.Tensor,
    table: torch.Tensor,
    rates: list[float],
) -> None:
    """One launch; contiguous float32 tensors of one device, `rates` as `rate_vector` gives them."""
    rows = len(head) if head.numel() else 0
    work = _workspaces.get(state)
    shapes = (head.shape, ffn.shape)
    if work is None or (work.saved_head_ptr.shape, work.saved_ffn_ptr.shape) != shapes:
        work = Workspace(
            saved_head_ptr=torch.empty_like(head),
            saved_ffn_ptr=torch.empty_like(ffn),
            sum_sq_ptr=ffn.new_empty(len(ffn) + rows),
            next_sq_ptr=ffn.new_empty(len(ffn) + rows),
            counter_ptr=torch.zeros(1, dtype=torch.int32, device=ffn.device),
        )
        _workspaces[state] = work
    *floats, scheduled = rates
    step_rows_then_scalars[(len(ffn) + rows,)](
        head_ptr=head,
        ffn_ptr=ffn,
        state_ptr=state,
        table_ptr=table,
        **work._asdict(),
        R_head=rows,
        D_head=head.shape[1],
        R_ffn=len(ffn),
        D_ffn=ffn.shape[1],
        splits=len(table),
        **dict(zip(RATE_NAMES, floats, strict=True)),
        **constants(head.shape[1], ffn.shape[1], bool(scheduled)),
        num_warps=ffn_tile(ffn.shape[1]).warps,
        num_stages=1,
    )
