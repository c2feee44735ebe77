"""The least-s prox of one row too long to stay whole in the registers of one Triton program.

Packed, for rows of up to 53,248 entries: the search takes 15 bits at a time. A counting pass
compares one digit of every entry: how many steps of 2^shift its |m| lies above the lower bound. Two
digits share a register, each below a set bit, and one subtraction compares both: the bit stays set
where the digit is the threshold or more. The bounds then enclose one step, the row
is read again (it is in a cache) for the next digit, and a last time to apply the step.

Chunked, for longer rows: every pass reads the row, three thresholds at a time.

Legend: [lo, hi] holds the k-th smallest |m|, as bits - n_lo, n_hi: how many lie below lo, up to hi.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskprune.kernels.least_s_rows import count_in_row, into_unit, next_square, places


@triton.jit
def magnitude_of(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def pack(magnitude, lo, hi, shift, R: tl.constexpr, C: tl.constexpr):
    """(R, C // 2) pairs of digits; values outside the bounds get the digit of the nearer bound."""
    digit = (tl.minimum(tl.maximum(magnitude, lo), hi) - lo) >> shift
    first, second = tl.split(tl.reshape(digit, (R, C // 2, 2)))
    return (first | (second << 16)).to(tl.uint32) | 0x80008000


@triton.jit
def first_digits(
    row_ptr,
    saved_ptr,
    low,
    high,
    first,
    shift,
    N,
    CLAMP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """(digits of a piece, low and high with its |m|); where CLAMP, the piece is saved unclamped.

    The branch is for the compiler: it packs one piece before it loads the next. A whole row
    loaded at once does not fit the registers.
    """
    pairs = tl.full([R, C // 2], 0xFFFFFFFF, tl.uint32)
    if first * C < N:
        columns, steps, inside = places(first, N, R, C)
        x = tl.load(row_ptr + columns + steps, mask=inside, other=float("inf"))
        if CLAMP:
            tl.store(saved_ptr + columns + steps, x, mask=inside)
        magnitude = magnitude_of(into_unit(x, CLAMP))
        low = tl.minimum(low, tl.min(tl.where(inside, magnitude, 0x7FFFFFFF), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, magnitude, 0), axis=0))
        pairs = pack(magnitude, 0, 0x7FFFFFFF, shift, R, C)
    return pairs, low, high


@triton.jit
def next_digits(
    row_ptr, first, lo, hi, shift, N, CLAMP: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    pairs = tl.full([R, C // 2], 0xFFFFFFFF, tl.uint32)
    if first * C < N:
        columns, steps, inside = places(first, N, R, C)
        x = tl.load(row_ptr + columns + steps, mask=inside, other=float("inf"))
        # Here the bounds clamp to [0, 1], negative numbers being negative as bits too.
        magnitude = x.to(tl.int32, bitcast=True) if CLAMP else magnitude_of(x)
        pairs = pack(magnitude, lo, hi, shift, R, C)
    return pairs


@triton.jit
def reached(pairs, bounds):
    return tl.sum(((pairs - bounds) >> 15) & 0x00010001, axis=0)


@triton.jit
def narrow(p0, p1, p2, p3, base, shift, lo, hi, n_lo, n_hi, k, SIZE: tl.constexpr):
    """The bounds within one step of the digits, or with n_hi = k."""
    a = (lo - base) >> shift
    b = (hi - base) >> shift
    while (a < b) & (n_hi != k):
        mid = (a + b) >> 1
        bounds = ((mid + 1) * 0x00010001).to(tl.uint32)
        n = reached(p0, bounds) + reached(p1, bounds) + reached(p2, bounds) + reached(p3, bounds)
        n = tl.sum(n, axis=0)
        c = SIZE - ((n & 0xFFFF) + (n >> 16)).to(tl.int32)
        if c >= k:
            b = mid
            n_hi = c
        else:
            a = mid + 1
            n_lo = c
    lo = tl.maximum(lo, base + (a << shift))
    hi = tl.minimum(hi, base + (b << shift) + ((1 << shift) - 1))
    return lo, hi, n_lo, n_hi


@triton.jit
def shrink_row(row_ptr, hi, n_lo, n_hi, k, shrink, N, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    """Applies the step to the k entries; (sum of their squares, smallest |m| of the others).

    Where n_hi > k, hi is the k-th smallest |m|, and of those equal to it the first are taken.
    """
    squares = tl.zeros([BLOCK], tl.float32)
    left = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    hi = tl.where(k > 0, hi, -1)
    ties = tl.where((k > 0) & (n_hi > k), k - n_lo, N)
    start = 0
    while start < N:
        offs = start + tl.arange(0, BLOCK)
        x = into_unit(tl.load(row_ptr + offs, mask=offs < N, other=0.0), CLAMP)
        magnitude = tl.where(offs < N, magnitude_of(x), 0x7FFFFFFF)
        chosen = magnitude <= hi
        if ties < N:
            tied = (magnitude == hi).to(tl.int32)
            chosen = chosen & ((tied == 0) | (tl.cumsum(tied, axis=0) <= ties))
            ties -= tl.sum(tied, axis=0)
        y = x * shrink
        squares += tl.where(chosen, y * y, 0.0)
        left = tl.minimum(left, tl.where(chosen, 0x7FFFFFFF, magnitude))
        tl.store(row_ptr + offs, tl.where(chosen, y, x), mask=offs < N)
        start += BLOCK
    return tl.sum(squares, axis=0), tl.min(left, axis=0)


@triton.jit
def prox_packed(
    row_ptr,
    saved_ptr,
    s,
    shrink,
    N,
    CLAMP: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    C: tl.constexpr,
):
    """One row as digits in registers -> (sum_sq, next_sq, whether all were numbers).

    With CLAMP the row is clamped to [0, 1] first, and saved unclamped at saved_ptr.
    """
    SIZE: tl.constexpr = (R0 + R1 + R2 + R3) * C
    # |m| has 31 bits and, clamped, 30: two digits. Unclamped there may be a third, of one bit.
    FIRST: tl.constexpr = 15 if CLAMP else 16
    low = tl.full([C], 0x7FFFFFFF, tl.int32)
    high = tl.zeros([C], tl.int32)
    p0, low, high = first_digits(row_ptr, saved_ptr, low, high, 0, FIRST, N, CLAMP, R0, C)
    p1, low, high = first_digits(row_ptr, saved_ptr, low, high, R0, FIRST, N, CLAMP, R1, C)
    p2, low, high = first_digits(row_ptr, saved_ptr, low, high, R0 + R1, FIRST, N, CLAMP, R2, C)
    last: tl.constexpr = R0 + R1 + R2
    p3, low, high = first_digits(row_ptr, saved_ptr, low, high, last, FIRST, N, CLAMP, R3, C)
    lo = tl.min(low, axis=0)
    top = tl.max(high, axis=0)
    k, sound = count_in_row(s, shrink, N)
    sound = sound & (top <= 0x7F800000)
    k = tl.where(sound, k, 0)

    n_lo = 0
    n_hi = tl.where(k > 0, N, 0)
    lo, hi, n_lo, n_hi = narrow(p0, p1, p2, p3, 0, FIRST, lo, top, n_lo, n_hi, k, SIZE)
    while (lo < hi) & (n_hi != k):
        shift = (hi - lo > 0x7FFF).to(tl.int32)
        p0 = next_digits(row_ptr, 0, lo, hi, shift, N, CLAMP, R0, C)
        p1 = next_digits(row_ptr, R0, lo, hi, shift, N, CLAMP, R1, C)
        p2 = next_digits(row_ptr, R0 + R1, lo, hi, shift, N, CLAMP, R2, C)
        p3 = next_digits(row_ptr, last, lo, hi, shift, N, CLAMP, R3, C)
        lo, hi, n_lo, n_hi = narrow(p0, p1, p2, p3, lo, shift, lo, hi, n_lo, n_hi, k, SIZE)

    sum_sq, left = shrink_row(row_ptr, hi, n_lo, n_hi, k, shrink, N, CLAMP, C)
    return sum_sq, next_square(left, top, shrink, k, N), sound


@triton.jit
def prox_chunked(row_ptr, saved_ptr, s, shrink, N, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    """One long row, read again in each pass -> (sum_sq, next_sq, whether all were numbers)."""
    offs = tl.arange(0, BLOCK)
    high = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    start = 0
    while start < N:
        inside = start + offs < N
        x = tl.load(row_ptr + start + offs, mask=inside, other=0.0)
        if CLAMP:
            tl.store(saved_ptr + start + offs, x, mask=inside)
        magnitude = magnitude_of(into_unit(x, CLAMP))
        low = tl.minimum(low, tl.where(inside, magnitude, 0x7FFFFFFF))
        high = tl.maximum(high, magnitude)
        start += BLOCK
    top = tl.max(high, axis=0)
    lo = tl.min(low, axis=0)
    hi = top
    k, sound = count_in_row(s, shrink, N)
    sound = sound & (top <= 0x7F800000)
    k = tl.where(sound, k, 0)

    n_lo = 0
    n_hi = tl.where(k > 0, N, 0)
    while (lo < hi) & (n_hi != k):
        quarter = (hi - lo) >> 2
        mid1 = lo + quarter
        mid2 = lo + ((hi - lo) >> 1)
        mid3 = tl.minimum(mid2 + quarter, hi - 1)
        n1 = tl.zeros([BLOCK], tl.int32)
        n2 = tl.zeros([BLOCK], tl.int32)
        n3 = tl.zeros([BLOCK], tl.int32)
        start = 0
        while start < N:
            inside = start + offs < N
            x = tl.load(row_ptr + start + offs, mask=inside, other=0.0)
            magnitude = tl.where(inside, magnitude_of(into_unit(x, CLAMP)), 0x7FFFFFFF)
            n1 += (magnitude <= mid1).to(tl.int32)
            n2 += (magnitude <= mid2).to(tl.int32)
            n3 += (magnitude <= mid3).to(tl.int32)
            start += BLOCK
        c1 = tl.sum(n1, axis=0)
        c2 = tl.sum(n2, axis=0)
        c3 = tl.sum(n3, axis=0)
        if c1 >= k:
            hi = mid1
            n_hi = c1
        elif c2 >= k:
            lo = mid1 + 1
            n_lo = c1
            hi = mid2
            n_hi = c2
        elif c3 >= k:
            lo = mid2 + 1
            n_lo = c2
            hi = mid3
            n_hi = c3
        else:
            lo = mid3 + 1
            n_lo = c3

    sum_sq, left = shrink_row(row_ptr, hi, n_lo, n_hi, k, shrink, N, CLAMP, BLOCK)
    return sum_sq, next_square(left, top, shrink, k, N), sound
