"""Where a prefill spends its time: each kind of module by itself, dense beside uniform."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from machine import sync
from regimes import prefill
from torch import nn

PARTS = {
    "q_proj": "attention projections",
    "k_proj": "attention projections",
    "v_proj": "attention projections",
    "o_proj": "attention projections",
    "gate_proj": "FFN projections",
    "up_proj": "FFN projections",
    "down_proj": "FFN projections",
    "act_fn": "activation",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "lm_head": "output matrix",
}
REST = "scores, rope, SwiGLU product, residuals, Python"


@torch.no_grad()
def breakdown(
    models: Mapping[str, nn.Module], batch: int, length: int, rounds: int = 9
) -> dict[str, dict[str, float]]:
    """For each model, median milliseconds of one prefill by part, and `total`.

    The models take turns, so drift hits all alike. Parts are timed by hooks, which cost a few
    microseconds a module and on a GPU a synchronisation: no other number of this benchmark is
    taken with them.
    """
    spent: dict[str, float] = defaultdict(float)
    hooks = [hook for model in models.values() for hook in _hooks(model, spent)]
    runners = {name: prefill(model, batch, length, 0) for name, model in models.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    try:
        for done in range(rounds + 2):
            for name, runner in runners.items():
                spent.clear()
                start = time.perf_counter()
                runner.call()
                sync(models[name].device.type)
                total = time.perf_counter() - start
                if done >= 2:
                    rest = total - sum(spent.values())
                    samples[name].append({**spent, REST: rest, "total": total})
    finally:
        for hook in hooks:
            hook.remove()
    first = next(iter(samples.values()))[0]
    parts = sorted(first, key=lambda part: (part == "total", -first[part]))
    return {
        name: {part: 1e3 * statistics.median(s[part] for s in taken) for part in parts}
        for name, taken in samples.items()
    }


def _hooks(model: nn.Module, spent: dict[str, float]) -> list[Any]:
    """Hooks that add each named module's seconds to its part of `spent`."""
    device, hooks = model.device.type, []
    starts: dict[int, float] = {}

    def begin(module: nn.Module, args: Any) -> None:
        sync(device)
        starts[id(module)] = time.perf_counter()

    for name, module in model.named_modules():
        if part := PARTS.get(name.rsplit(".", 1)[-1]):

            def end(module: nn.Module, args: Any, output: Any, part: str = part) -> None:
                sync(device)
                spent[part] += time.perf_counter() - starts[id(module)]

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    return hooks
