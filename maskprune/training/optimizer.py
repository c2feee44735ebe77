"""AdamW with moments in 32 or in eight bits."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT


def require_optimizer(bits: int) -> None:
    """Refuse a number of bits whose library is not installed.

    Raises:
        ValueError: says how to install it.
    """
    if bits == 32:
        return
    try:
        from torchao.optim import AdamW8bit  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--optimizer-bits {bits} needs torchao, which cannot be imported ({error}); "
            'pip install "maskprune[eight-bit]", or leave the flag out'
        ) from None


def adamw(
    parameters: ParamsT,
    bits: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW; with 8 bits torchao's, whose moments are dynamic 8-bit numbers in blocks of 256.

    Raises:
        ValueError: see `require_optimizer`.

    Source of the eight bits: Dettmers et al., arXiv 2110.02861.
    """
    require_optimizer(bits)
    if bits == 32:
        return torch.optim.AdamW(
            parameters, lr, betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr, betas, eps, weight_decay)
    return optimizer
