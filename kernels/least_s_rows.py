"""The least-s prox of one row by one Triton program, for the kernels that launch rows.

The search is an exact bisection on the bits of |m|: integers only, so no two lanes can disagree,
and at most 31 counting passes whatever the data. A row of up to 18,432 entries stays in registers
as three [R, C] pieces, R a power of two and C four entries per thread: a pass is then a
thread-local sum and one reduction across warps. Rows of up to 128 rank all pairs; for longer ones
see least_s_long.py.

Legend: key = |m| as its bits, shifted left, with the sign in bit 0, so that keys order by |m|
and the entry is not lost - k entries to shrink - T the k-th smallest key - cut, the index before
which keys equal to T are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

ALL_PAIRS_LIMIT = 128
# (longest row, warps, R0, R1, R2): (R0 + R1 + R2) * 128 * warps entries, four per thread and row of
# the pieces. A thread has 255 registers with 8 warps, 128 with 16 and 64 with 32.
PIECES = (
    (1536, 4, 1, 1, 1),
    (3072, 8, 1, 1, 1),
    (6144, 8, 4, 1, 1),
    (8192, 8, 4, 2, 2),
    (11264, 8, 8, 2, 1),
    (14336, 16, 4, 2, 1),
    (18432, 16, 4, 4, 1),
)
# (longest row, warps, R0, R1, R2, R3): the row as pairs of digits, in half the registers. For
# 28,672 entries a pass takes 72 instructions (sm_80) where whole keys take 103: what 20 passes save
# pays for reading the row twice more. Ties take no passes at all. Widths of known models fill
# their tile: 14336, 18432, 28672, 53248.
PACKED = (
    (24576, 32, 2, 2, 1, 1),
    (28672, 32, 4, 1, 1, 1),
    (36864, 32, 4, 2, 2, 1),
    (45056, 32, 4, 4, 2, 1),
    (53248, 32, 4, 4, 4, 1),
)
CHUNK, CHUNK_WARPS = 4096, 16
# The longest row of every tile but the chunked one.
LONGEST = (ALL_PAIRS_LIMIT, *(tile[0] for tile in PIECES + PACKED))


class Tile(NamedTuple):
    """How rows of one length are searched: warps of a program, and the constexpr arguments."""

    warps: int
    constants: dict[str, int | str]


def tile_for(N: int) -> Tile:
    """The tile for rows of up to N entries; what a search does not use is 0."""
    if N <= ALL_PAIRS_LIMIT:
        block = max(16, triton.next_power_of_2(N))
        return _tile(4 if block == 128 else 1, "all_pairs", BLOCK=block)
    for kernel, tiles in (("pieces", PIECES), ("packed", PACKED)):
        for longest, warps, *rows in tiles:
            if N <= longest:
                sizes = {f"R{i}": R for i, R in enumerate(rows)}
                return _tile(warps, kernel, C=128 * warps, **sizes)
    return _tile(CHUNK_WARPS, "chunked", BLOCK=CHUNK)


def _tile(warps: int, kernel: str, **sizes: int) -> Tile:
    unused = dict.fromkeys(("BLOCK", "R0", "R1", "R2", "R3", "C"), 0)
    return Tile(warps, {"KERNEL": kernel, **unused, **sizes})


@triton.jit
def key_of(x):
    bits = x.to(tl.uint32, bitcast=True)
    return (bits << 1) | (bits >> 31)


@triton.jit
def value_of(key):
    return ((key >> 1) | (key << 31)).to(tl.float32, bitcast=True)


@triton.jit
def square_of(magnitude):
    x = magnitude.to(tl.float32, bitcast=True)
    return x * x


@triton.jit
def count_in_row(s, shrink, N):
    """(k, whether s and shrink are numbers); k is ceil(s) clamped to [0, N]."""
    real = (s == s) & (shrink == shrink)
    k = tl.minimum(tl.maximum(tl.ceil(tl.where(real, s, 0.0)), 0.0), 2147483520.0).to(tl.int32)
    return tl.minimum(k, N), real


@triton.jit
def into_unit(x, CLAMP: tl.constexpr):
    """x, clamped to [0, 1] where CLAMP; a NaN stays."""
    if CLAMP:
        x = tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))
    return x


@triton.jit
def places(first, N, R: tl.constexpr, C: tl.constexpr):
    """(columns, steps, inside) of a piece from row `first` on: its entries are at columns + steps.

    A register's step is a constant: added last, to a pointer, it is an immediate of the load or
    store. As one sum they would take two address registers for each row of the piece.
    """
    columns = tl.arange(0, C)[None, :]
    steps = (first + tl.arange(0, R)[:, None]) * C
    return columns, steps, columns + steps < N


@triton.jit
def load_keys(row_ptr, saved_ptr, first, N, CLAMP: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    columns, steps, inside = places(first, N, R, C)
    x = tl.load(row_ptr + columns + steps, mask=inside, other=0.0)
    if CLAMP:
        tl.store(saved_ptr + columns + steps, x, mask=inside)
    return tl.where(inside, key_of(into_unit(x, CLAMP)), 0xFFFFFFFF)


@triton.jit
def largest(key, first, N, R: tl.constexpr, C: tl.constexpr):
    _, _, inside = places(first, N, R, C)
    return tl.max(tl.max(tl.where(inside, key >> 1, 0), axis=0), axis=0).to(tl.int32)


@triton.jit
def smallest(key):
    return tl.min(tl.min(key, axis=0), axis=0)


@triton.jit
def bound_above(magnitude):
    """Keys below it have at most this magnitude."""
    return (magnitude.to(tl.uint32) << 1) + 2


@triton.jit
def bound_before(T, cut, first, R: tl.constexpr, C: tl.constexpr):
    """(R, C) bounds: keys below them are less than T, or equal to T at an index before cut.

    The cut moves to the left side of the comparison, where it varies with the loop around it:
    `index < cut` would be hoisted out of that loop, and a row of registers with it.
    """
    cut_in_row = cut - (first + tl.arange(0, R)[:, None]) * C
    bound = T.to(tl.uint32) << 1
    return tl.where(tl.arange(0, C)[None, :] < cut_in_row, bound + 2, bound)


@triton.jit
def below(key, bound):
    return tl.sum((key < bound).to(tl.int32), axis=0)


@triton.jit
def count(key0, key1, key2, magnitude):
    """How many keys have at most this magnitude."""
    bound = bound_above(magnitude)
    return tl.sum(below(key0, bound) + below(key1, bound) + below(key2, bound), axis=0)


@triton.jit
def search(key0, key1, key2, lo, hi, k, N):
    """(T, count(key <= T)): T = hi with count(key <= hi) = k, or the k-th key if it is tied."""
    n_hi = N
    while (lo < hi) & (n_hi != k) & (k > 0):
        mid = lo + ((hi - lo) >> 1)
        c = count(key0, key1, key2, mid)
        if c >= k:
            hi = mid
            n_hi = c
        else:
            lo = mid + 1
    return hi, n_hi


@triton.jit
def tie_cut(
    key0,
    key1,
    key2,
    T,
    n_hi,
    k,
    N,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    C: tl.constexpr,
):
    """The index before which keys equal to T are among the k."""
    a = tl.where(k > 0, N, 0)
    if (n_hi > k) & (k > 0):
        a = 0
        b = N
        while a < b:
            cut = a + ((b - a) >> 1)
            c = tl.sum(
                below(key0, bound_before(T, cut, 0, R0, C))
                + below(key1, bound_before(T, cut, R0, R1, C))
                + below(key2, bound_before(T, cut, R0 + R1, R2, C)),
                axis=0,
            )
            if c >= k:
                b = cut
            else:
                a = cut + 1
    return a


@triton.jit
def shrink_piece(row_ptr, key, first, T, cut, shrink, N, R: tl.constexpr, C: tl.constexpr):
    """Stores the piece after the step; (squares of the chosen, keys of the others)."""
    columns, steps, inside = places(first, N, R, C)
    chosen = key < bound_before(T, cut, first, R, C)
    x = value_of(key)
    y = x * shrink
    tl.store(row_ptr + columns + steps, tl.where(chosen, y, x), mask=inside)
    left = tl.where(chosen, 0xFFFFFFFF, key)
    return tl.sum(tl.where(chosen, y * y, 0.0), axis=0), tl.min(left, axis=0)


@triton.jit
def next_square(left, top, shrink, k, N):
    """Square of the smallest magnitude left; of the largest, shrunk, where none is left."""
    y = top.to(tl.float32, bitcast=True) * shrink
    return tl.where(N == 0, 0.0, tl.where(k < N, square_of(left), y * y))


@triton.jit
def prox_pieces(
    row_ptr,
    saved_ptr,
    s,
    shrink,
    N,
    CLAMP: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    C: tl.constexpr,
):
    """One row in registers -> (sum_sq, next_sq, whether all were numbers).

    With CLAMP the row is clamped to [0, 1] first, and saved unclamped at saved_ptr.
    """
    key0 = load_keys(row_ptr, saved_ptr, 0, N, CLAMP, R0, C)
    key1 = load_keys(row_ptr, saved_ptr, R0, N, CLAMP, R1, C)
    key2 = load_keys(row_ptr, saved_ptr, R0 + R1, N, CLAMP, R2, C)

    k, sound = count_in_row(s, shrink, N)
    top = tl.maximum(largest(key0, 0, N, R0, C), largest(key1, R0, N, R1, C))
    top = tl.maximum(top, largest(key2, R0 + R1, N, R2, C))
    bottom = tl.minimum(tl.minimum(smallest(key0), smallest(key1)), smallest(key2))
    sound = sound & (top <= 0x7F800000)
    k = tl.where(sound, k, 0)
    T, n_hi = search(key0, key1, key2, (bottom >> 1).to(tl.int32), top, k, N)
    cut = tie_cut(key0, key1, key2, T, n_hi, k, N, R0, R1, R2, C)
    T = tl.where(k > 0, T, 0)

    sum0, left0 = shrink_piece(row_ptr, key0, 0, T, cut, shrink, N, R0, C)
    sum1, left1 = shrink_piece(row_ptr, key1, R0, T, cut, shrink, N, R1, C)
    sum2, left2 = shrink_piece(row_ptr, key2, R0 + R1, T, cut, shrink, N, R2, C)
    left = (tl.min(tl.minimum(tl.minimum(left0, left1), left2), axis=0) >> 1).to(tl.int32)
    return tl.sum(sum0 + sum1 + sum2, axis=0), next_square(left, top, shrink, k, N), sound


@triton.jit
def prox_all_pairs(row_ptr, saved_ptr, s, shrink, N, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    """One short row by ranking all pairs -> (sum_sq, next_sq, whether all were numbers)."""
    i = tl.arange(0, BLOCK)
    x = tl.load(row_ptr + i, mask=i < N, other=0.0)
    if CLAMP:
        tl.store(saved_ptr + i, x, mask=i < N)
    x = into_unit(x, CLAMP)
    key = tl.where(i < N, (key_of(x) >> 1).to(tl.int32), 0x7FFFFFFF)
    other = tl.load(row_ptr + i, mask=i < N, other=0.0)
    key_j = tl.where(i < N, (key_of(into_unit(other, CLAMP)) >> 1).to(tl.int32), 0x7FFFFFFF)
    k, sound = count_in_row(s, shrink, N)
    top = tl.max(tl.where(i < N, key, 0), axis=0)
    sound = sound & (top <= 0x7F800000)
    k = tl.where(sound, k, 0)

    before = (key_j[None, :] < key[:, None]) | (
        (key_j[None, :] == key[:, None]) & (i[None, :] < i[:, None])
    )
    rank = tl.sum(before.to(tl.int32), axis=1)
    chosen = (rank < k) & (i < N)
    y = x * shrink
    left = tl.min(tl.where(chosen | (i >= N), 0x7FFFFFFF, key), axis=0)

    # Other warps may still be reading the row as `other`.
    tl.debug_barrier()
    tl.store(row_ptr + i, tl.where(chosen, y, x), mask=i < N)
    sum_sq = tl.sum(tl.where(chosen, y * y, 0.0), axis=0)
    return sum_sq, next_square(left, top, shrink, k, N), sound
