"""AdamW with moments in 32 or in eight bits; parameters that share one second moment beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    Groups with `mini: True` are trained by Adam-mini with a block to a tensor, without weight
    decay, their moments in 32 bits: where Adam divides the mean gradient of each number by its own
    root mean square, all numbers of a tensor are divided by one, of the mean over the tensor. So
    steps keep the proportions of the gradients, and what matters to the loss is not moved as fast
    as what does not.

    Raises:
        ValueError: see `require_optimizer`.

    Source of the eight bits: Dettmers et al., arXiv 2110.02861; of Adam-mini: arXiv 2406.16793.
    """
    require_optimizer(bits)
    if bits == 32:
        return AdamWMini(parameters, lr, betas, eps=eps, weight_decay=weight_decay, fused=fused)
    from torchao.optim import AdamW8bit

    class AdamW8bitMini(AdamW8bit):
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            return _step_apart(self, super().step, closure)

    optimizer: torch.optim.Optimizer = AdamW8bitMini(parameters, lr, betas, eps, weight_decay)
    return optimizer


class AdamWMini(torch.optim.AdamW):
    """AdamW, but Adam-mini for its groups with `mini: True`."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return _step_apart(self, super().step, closure)


def _step_apart(
    optimizer: torch.optim.Optimizer,
    step: Callable[[Callable[[], float] | None], float | None],
    closure: Callable[[], float] | None,
) -> float | None:
    """`step` on all groups but those with `mini: True`, and Adam-mini on these."""
    every = optimizer.param_groups
    optimizer.param_groups = [group for group in every if not group.get("mini")]
    try:
        loss = step(closure)
    finally:
        optimizer.param_groups = every
    for group in every:
        for p in group["params"] if group.get("mini") else []:
            if p.grad is not None and p.numel():
                adam_mini_(p, optimizer.state[p], group["lr"], group["betas"], group["eps"])
    return loss


@torch.no_grad()
def adam_mini_(
    p: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of a tensor on its `grad` as one block; `state` is empty at first, and is changed.

    Source: Adam-mini, arXiv 2406.16793, Algorithm 1 with one block.
    """
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg_sq"] = torch.zeros((), device=p.device, dtype=p.dtype)
    assert p.grad is not None
    state["step"] += 1
    state["exp_avg"].lerp_(p.grad, 1 - betas[0])
    state["exp_avg_sq"].lerp_(p.grad.square().mean(), 1 - betas[1])
    step = float(state["step"])
    scale = (state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt() + eps
    p.sub_(state["exp_avg"] / scale * (lr / (1 - betas[0] ** step)))
