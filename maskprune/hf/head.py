"""A model's last hidden states and, apart from them, the head that turns them into logits.

Logits are the largest tensor of a small model. Code that only sums over tokens takes the hidden
states and applies the head to a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from maskprune.hf.families import decoder_of, family_of, stock_model, text_config


@dataclass(frozen=True)
class Head:
    """Logits z = scale * module(h) of last hidden states h, then softcap * tanh(z / softcap)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V)."""
        return self.bent(self.module(hidden))

    def bent(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of its weights' products with hidden states, (..., V)."""
        if self.scale != 1:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    @property
    def weight(self) -> torch.Tensor:
        """(V, d)."""
        return cast(torch.Tensor, self.module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,), or None."""
        return getattr(self.module, "bias", None)

    @property
    def obstacle(self) -> str | None:
        """Why the head is more than its frozen weight and bias; None where it is not."""
        module = self.module
        if not isinstance(module, nn.Linear) or type(module) is not nn.Linear:
            return f"the head is a {type(module).__name__}, adapted or quantised"
        if any(p.requires_grad for p in module.parameters()):
            return "the head is trained"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return "the head has hooks"
        if type(module.weight.data) is not torch.Tensor:
            return "the head is sharded"
        return None


def head_of(model: nn.Module) -> Head:
    """The head of a stock model of a known family, also inside a PEFT wrapper."""
    base = stock_model(model)
    family, config = family_of(base.config), text_config(base.config)

    def setting(name: str | None) -> float | None:
        return getattr(config, name) if name else None

    scale = (setting(family.logit_scale) or 1.0) / (setting(family.logit_divisor) or 1.0)
    return Head(base.get_output_embeddings(), scale, setting(family.softcap))


def last_hidden_states(
    model: nn.Module, input_ids: torch.Tensor, **options: object
) -> torch.Tensor:
    """The head's input for `input_ids` (B, T): (B, T, d).

    The whole model runs, wrappers included, but computes logits of the last token only.

    Args:
        options: further arguments of the model's forward.
    """
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, output: Sequence[torch.Tensor]) -> None:
        seen.append(output[0])

    handle = decoder_of(model).register_forward_hook(keep)
    try:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1, **options)
    finally:
        handle.remove()
    return seen[-1]


def tail_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a decoder does after its last block, to that block's output (B, T, d)."""
    decoder = decoder_of(model)
    for name in family_of(stock_model(model).config).tail:
        module = getattr(decoder, name, None)
        hidden = module(hidden) if module is not None else hidden
    return hidden
