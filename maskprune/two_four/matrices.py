"""What Wanda and SparseGPT do to one matrix, given its inputs' statistics.

Wanda is arXiv 2306.11695, SparseGPT arXiv 2301.00774. Letters: W (O, I) weight, W_hat (O, I) the
pruned one, m (O, I) its mask, X (I, tokens) its inputs over n sequences, H = 2/n X X^T (I, I),
U (I, I) upper with U^T U = H^-1, d its diagonal, e (O,) the scaled error of a column.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from maskprune.training.activations import damped_factors
from maskprune.two_four.patterns import hard_mask

DAMPING = 0.01
DAMPING_TRIES = 4
# Columns that are updated at once; the result does not depend on it.
COLUMNS = 128


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32, whatever TF32 or bfloat16 the caller has allowed."""
    backends: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):
        # torch before 2.9 has one switch; later ones raise where both kinds are mixed.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def wanda_scores(W: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """s_ij = |W_ij| norm_j, at least in float32.

    Args:
        W: (O, I) weight.
        norm: (I,) float32, ||X_j||_2 up to a factor common to all j.

    Source: Wanda, section 3.
    """
    return W.abs() * norm


@torch.no_grad()
def inverse_factor(H: torch.Tensor, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
    """U, upper with U^T U = (H + damping mean(diag H) I)^-1, and the dead inputs, H_jj = 0.

    A dead input counts as H_jj = 1. Where rounding leaves no positive definite matrix, the damping
    grows tenfold, at most `DAMPING_TRIES` - 1 times.

    Args:
        H: (I, I), 2/n X X^T.
        damping: in units of the mean of H's diagonal.

    Returns:
        U (I, I) in float32, or in float64 if H is; dead (I,) bool.

    Raises:
        ValueError: H is not finite, or no damping was enough.

    Source: SparseGPT, section 3; the constants are those of its code.
    """
    H = H.to(torch.promote_types(H.dtype, torch.float32), copy=True)
    if not bool(H.isfinite().all()):
        raise ValueError("sparsegpt: H is not finite; load the model in float32")
    dead = H.diagonal() == 0
    H.diagonal().masked_fill_(dead, 1.0)
    ridge = damping * H.diagonal().mean()
    with full_float32():
        for factor in itertools.islice(damped_factors(H, ridge), DAMPING_TRIES):
            if factor is not None:
                inverse = torch.cholesky_inverse(factor)
                U, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed and bool(U.isfinite().all()):
                    return U, dead
    raise ValueError(
        f"sparsegpt: H {tuple(H.shape)} is not positive definite even with a damping of "
        f"{damping * 10 ** (DAMPING_TRIES - 1):g} of its mean diagonal; use more calibration text, "
        "or wanda"
    )


def sparsegpt(
    W: torch.Tensor,
    H: torch.Tensor,
    update: bool = True,
    *,
    damping: float = DAMPING,
    columns: int = COLUMNS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 2:4 matrix near W by SparseGPT: (W_hat - W) X is small, column by column.

    From left to right; every 4 columns the 2 largest w^2 / d^2 of each row are kept, then each
    column's error e = (w - q) / d goes into those right of it, W -= e U. Without `update` no error
    is passed on, and the scores are those of the given weights.

    Args:
        W: (O, I) weight, any float dtype; left as it is. 4 divides I.
        H: (I, I), 2/n X X^T.
        damping: in units of the mean of H's diagonal.
        columns: width of a lazy update; a multiple of 4.

    Returns:
        W_hat (O, I) and 1/2 sum of e^2 (), in float32, or in float64 if H is; m (O, I) bool with
        exactly 2 kept of every 4. With `update`, the loss is 1/2 tr(D H D^T) of the damped H and
        D = W - W_hat, the weights of dead inputs taken as 0 in both.

    Raises:
        ValueError: shapes that do not fit, an H without a usable inverse, or NaN in W.

    Source: SparseGPT, algorithm 1.
    """
    if W.dim() != 2 or H.shape != (W.shape[1], W.shape[1]) or W.shape[1] % 4 or columns % 4:
        raise ValueError(
            f"sparsegpt: W {tuple(W.shape)}, H {tuple(H.shape)}, columns {columns}; expected "
            "(O, I), (I, I), and I and columns that 4 divides"
        )
    U, dead = inverse_factor(H, damping)
    return prune_columns(W, U, dead, update, columns)


@torch.no_grad()
@full_float32()
def prune_columns(
    W: torch.Tensor, U: torch.Tensor, dead: torch.Tensor, update: bool, columns: int = COLUMNS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sparsegpt` from what `inverse_factor` returns: one factor serves all W with these inputs."""
    d = U.diagonal()
    W = W.to(U.dtype).masked_fill(dead, 0.0)
    if not update:
        scaled = W / d
        m = hard_mask(scaled.square())
        return W.masked_fill(~m, 0.0), m, scaled.masked_fill(m, 0.0).square().sum() / 2
    # Transposed, so that a column of W is contiguous: step j reads and writes columns from j on.
    w = W.T.contiguous()
    kept = torch.zeros_like(w, dtype=torch.bool)
    loss = w.new_zeros(())
    width = len(w)
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        E = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            if j % 4 == 0:
                scores = (w[j : j + 4] / d[j : j + 4, None]).square()
                kept[j : j + 4] = hard_mask(scores.T).T
            q = w[j].where(kept[j], 0.0)
            e = torch.div(w[j] - q, d[j], out=E[j - start])
            w[j] = q
            w[j + 1 : stop].addr_(U[j, j + 1 : stop], e, alpha=-1)
        w[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
        loss += E.square().sum() / 2
    return w.T.contiguous(), kept.T.contiguous(), loss
