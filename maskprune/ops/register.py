"""Makes an operation known to autograd, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# autograd's context takes any attribute; the inputs are those of the schema.
Context = Any
Inputs = tuple[Any, ...]


def register(
    schema: str,
    run: Callable[..., object],
    fake: Callable[..., object],
    *,
    gradients: Callable[..., object] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Register `torch.ops.maskprune.<name>`.

    `fold_columns`, `gather_rows` and `minimax_step_` are plain functions instead: they have no
    gradient and run on real tensors outside any graph.

    Args:
        schema: "name(arguments) -> results" in torch's schema language.
        run: the operation, on any backend.
        fake: from the same arguments to empty results of the right shape, dtype and device.
        gradients, save: `backward` and `setup_context` of `torch.library.register_autograd`.
    """
    name, parenthesis, rest = schema.partition("(")
    name = f"maskprune::{name}"
    torch.library.define(name, parenthesis + rest, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    if gradients is not None:
        torch.library.register_autograd(name, gradients, setup_context=save)
