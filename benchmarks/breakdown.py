"""Where a prefill spends its time: each kind of module by itself, dense beside uniform."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
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
def breakdown(model: nn.Module, batch: int, length: int, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of one prefill by part, and `total`; parts are timed by hooks.

    The hooks cost a few microseconds a module, and on a GPU a synchronisation, which is why no
    other number of this benchmark is taken with them.
    """
    device, spent, hooks = model.device.type, defaultdict(float), []
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
    runner = prefill(model, batch, length, 0)
    samples: list[dict[str, float]] = []
    try:
        for done in range(rounds + 2):
            spent.clear()
            start = time.perf_counter()
            runner.call()
            sync(device)
            total = time.perf_counter() - start
            if done >= 2:
                samples.append({**spent, REST: total - sum(spent.values()), "total": total})
    finally:
        for hook in hooks:
            hook.remove()
    parts = sorted(samples[0], key=lambda part: (part == "total", -samples[0][part]))
    return {part: 1e3 * statistics.median(s[part] for s in samples) for part in parts}
