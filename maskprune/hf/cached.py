"""A forward that reads and extends the cache of keys and values, by whatever name it goes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


def forward_cached(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **given: Any
) -> tuple[torch.Tensor, Any]:
    """The logits of (B, T) tokens that follow those in the cache, and the cache with them in it.

    Args:
        cache: what the last call gave; None at the beginning.
        given: further arguments of the model's forward.
    """
    # transformers 5 renames the argument and the output.
    new = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if new else "past_key_values"
    if cache is not None:
        given[name] = cache
    out = model(input_ids=ids, use_cache=True, **given)
    return out.logits, getattr(out, name)
