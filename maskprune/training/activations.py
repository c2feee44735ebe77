"""Sums over tokens of a linear's inputs, and the Cholesky factors of such a sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def add_squares(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """total + sum over tokens of x^2, in place; (I,) float32 from x (..., I)."""
    squares = x.float().square().flatten(0, -2).sum(0)
    return squares if total is None else total.add_(squares)


def add_gram(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """total + sum over tokens of x x^T, in place; (I, I) float32 from x (..., I)."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(0, -2).float()
        return flat.T @ flat if total is None else total.addmm_(flat.T, flat)


def damped_factors(H: torch.Tensor, ridge: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """Cholesky factors of H + ridge, each time with ten times the ridge; without end.

    None where rounding leaves no positive definite matrix: H was summed in float32, and a few
    channels of huge activations can push eigenvalues further below zero than the ridge lifts them.

    Args:
        H: (I, I), float32 or float64.
        ridge: () to add to H's diagonal.
    """
    while True:
        damped = H.clone()
        damped.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        yield None if failed else factor
        ridge = 10 * ridge + torch.finfo(H.dtype).eps * H.diagonal().mean()
