"""Dense, uniform, unaligned and heterogeneous models of one sparsity, cut from the same weights.

The uniform shape is the legal one nearest to equal fractions of heads and FFN units.
A heterogeneous model has the same sum of KV groups and the same sum of FFN units over its layers,
so it has the same parameters, FLOPs and KV bytes to the unit; layer by layer it keeps between
`low` and `high` times the uniform count, drawn uniformly, both ends attained where the sum allows.

A further column, 2:4 say, is one more name in `widths_of` and one more branch in `cut`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.uniform.shapes import Widths
from maskprune.hf.families import attention_output, family_of, ffn_output, layers_of
from maskprune.hf.pruned_config import target_config
from maskprune.hf.shape import Shape, shape_of
from maskprune.structured.budget import Budget
from maskprune.structured.cuts import layer_cuts
from maskprune.structured.export import apply_cut

# 2 and 27 of 32 heads around a mean of 16 is what MaskPrune (section 4.2) reports of Compresso at
# 50 %; the other two ranges are this benchmark's.
SPREADS = {
    "mild": (12 / 16, 20 / 16),
    "nuteprune": (8 / 16, 24 / 16),
    "compresso": (2 / 16, 27 / 16),
}
VARIANTS = ("dense", "uniform", "unaligned", *SPREADS)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}

Masks = list[tuple[torch.Tensor, torch.Tensor]]


def repeat(shape: Shape) -> Widths:
    """The widths of a uniform model."""
    n = shape.layers
    return Widths((shape.heads,) * n, (shape.kv_heads,) * n, (shape.ffn,) * n, shape.head_dim)


def uniform_shape(config: Any, sparsity: float, multiple_of: int | None = None) -> Shape:
    """The legal uniform shape whose pruned fractions of heads and FFN units are closest."""
    budget = Budget(config, sparsity, multiple_of=multiple_of)
    heads = max(budget.head_units, 1)
    split = min(budget.splits, key=lambda s: abs(s.head / heads - s.ffn / budget.ffn_units))
    return budget.shape_after(split)


def unaligned_shape(config: Any, sparsity: float, uniform: Shape) -> Shape:
    """`uniform` with the widest odd FFN that meets the budget, as `--multiple-of 1` may end in."""
    budget = Budget(config, sparsity, multiple_of=1)
    for split in budget.splits:
        shape = budget.shape_after(split)
        if shape.kv_heads == uniform.kv_heads:
            width = shape.ffn
            break
    else:
        width = uniform.ffn
    return Shape(uniform.layers, uniform.heads, uniform.kv_heads, uniform.head_dim, width - 1 | 1)


def spread(
    mean: int, most: int, layers: int, step: int, ends: tuple[float, float], rng: random.Random
) -> tuple[int, ...]:
    """`layers` multiples of `step` in ends * mean (within step..most) that sum to layers * mean.

    Two layers, drawn at random, hold the ends, where there are three or more and the sum allows.
    """
    low = max(step, int(ends[0] * mean / step) * step)
    high = max(mean, min(most - most % step, round(ends[1] * mean / step) * step))
    places = list(range(layers))
    rng.shuffle(places)
    kept = [rng.randrange(low, high + 1, step) for _ in range(layers)]
    pinned = places[:2] if layers > 2 and low < mean < high else []
    for place, end in zip(pinned, (low, high), strict=False):
        kept[place] = end
    free = [p for p in places if p not in pinned]
    while missing := layers * mean - sum(kept):
        move = step if missing > 0 else -step
        room = [p for p in free if low <= kept[p] + move <= high]
        if not room:
            free = places
            continue
        kept[rng.choice(room)] += move
    return tuple(kept)


def widths_of(
    config: Any, sparsity: float, multiple_of: int | None = None, seed: int = 0
) -> dict[str, Widths]:
    """Every variant's widths at one sparsity, by name."""
    dense = shape_of(config)
    uniform = uniform_shape(config, sparsity, multiple_of)
    step = Budget(config, sparsity, multiple_of=multiple_of).multiple_of
    step = step if uniform.ffn % step == 0 else 1
    result = {
        "dense": repeat(dense),
        "uniform": repeat(uniform),
        "unaligned": repeat(unaligned_shape(config, sparsity, uniform)),
    }
    q = dense.heads // dense.kv_heads
    for name, ends in SPREADS.items():
        rng = random.Random(f"{name} {seed}")
        groups = spread(uniform.kv_heads, dense.kv_heads, dense.layers, 1, ends, rng)
        ffn = spread(uniform.ffn, dense.ffn, dense.layers, step, ends, rng)
        result[name] = Widths(tuple(q * g for g in groups), groups, ffn, dense.head_dim)
    return result


def draw_masks(config: Any, widths: Widths, seed: int = 0) -> Masks:
    """Random 0/1 masks per layer, (H,) of whole KV groups and (F,), that leave `widths`."""
    shape, generator = shape_of(config), torch.Generator().manual_seed(seed)
    masks = []
    for kv_heads, ffn in zip(widths.kv_heads, widths.ffn, strict=True):
        groups, units = torch.zeros(shape.kv_heads), torch.zeros(shape.ffn)
        groups[torch.randperm(shape.kv_heads, generator=generator)[:kv_heads]] = 1
        units[torch.randperm(shape.ffn, generator=generator)[:ffn]] = 1
        masks.append((groups.repeat_interleave(shape.heads // shape.kv_heads), units))
    return masks


def cut(dense: nn.Module, widths: Widths, masks: Masks) -> nn.Module:
    """The stock model (or, heterogeneous, the same modules at each layer's widths) that is left.

    Embeddings, norms and the rotary table are shared with `dense`; nothing else is.
    """
    family, shape = family_of(dense.config), shape_of(dense.config)
    layer_shapes = [
        Shape(shape.layers, h, g, shape.head_dim, f)
        for h, g, f in zip(widths.heads, widths.kv_heads, widths.ffn, strict=True)
    ]
    uniform = widths.distinct_layers == 1
    config = target_config(dense.config, layer_shapes[0]) if uniform else dense.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dense.dtype)
        if not uniform:
            for i, layer in enumerate(model.model.layers):
                own = copy.deepcopy(model.config)
                own.num_attention_heads = layer_shapes[i].heads
                own.num_key_value_heads = layer_shapes[i].kv_heads
                own.intermediate_size = layer_shapes[i].ffn
                model.model.layers[i] = type(layer)(own, i).to(dense.dtype)
    state = dict(dense.state_dict())
    for i, (head, ffn) in enumerate(masks):
        for name, one in layer_cuts(family, shape, "kv_group", head, ffn).items():
            if (key := f"{family.layers}.{i}.{name}") in state:
                state[key] = apply_cut(state[key], one)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = dense.model.rotary_emb
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.eval()


@contextmanager
def masked(dense: nn.Module, masks: Masks) -> Iterator[nn.Module]:
    """`dense` with the masks on its heads and FFN units: what a cut model must equal."""
    family, shape, hooks = family_of(dense.config), shape_of(dense.config), []
    for layer, (head, ffn) in zip(layers_of(dense), masks, strict=True):
        scales = (head.repeat_interleave(shape.head_dim), ffn)
        outputs = (attention_output(layer, family), ffn_output(layer, family))
        for module, scale in zip(outputs, scales, strict=True):
            on_device = scale.to(module.weight)

            def multiply(module: nn.Module, args: Any, scale: torch.Tensor = on_device) -> Any:
                return (args[0] * scale, *args[1:])

            hooks.append(module.register_forward_pre_hook(multiply))
    try:
        yield dense
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def difference(model: nn.Module, dense: nn.Module, masks: Masks, seed: int = 0) -> float:
    """Largest logit difference of a cut model and the masked dense one, over the largest logit."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(dense.config.vocab_size, (2, 16), generator=generator).to(dense.device)
    with masked(dense, masks):
        expected = dense(tokens, use_cache=False).logits.float()
    logits = model(tokens, use_cache=False).logits.float()
    return float((logits - expected).abs().max() / expected.abs().max())
