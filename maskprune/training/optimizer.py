"""AdamW with moments in 32 or in eight bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


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
            f"--optimizer-bits {bits} needs torchao, which is not to be had here ({error}); "
            'pip install "maskprune[eight-bit]", or leave the flag out'
        ) from None


def adamw(
    parameters: Iterable[torch.Tensor] | list[dict[str, Any]], bits: int, **options: Any
) -> torch.optim.Optimizer:
    """AdamW; with 8 bits torchao's, whose moments are dynamic 8-bit numbers in blocks of 256.

    Raises:
        ValueError: see `require_optimizer`.

    Source of the eight bits: Dettmers et al., arXiv 2110.02861.
    """
    require_optimizer(bits)
    if bits == 32:
        return torch.optim.AdamW(parameters, **options)
    from torchao.optim import AdamW8bit

    options.pop("fused", None)
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return optimizer
