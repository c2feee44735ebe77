"""The rankings equal their formulas, and what they start the masks from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import randomise, tiny_model, tokens
from torch.nn import functional

from maskprune.hf.families import FAMILIES, attention_output, ffn_output, layers_of
from maskprune.structured.budget import Budget
from maskprune.structured.masks import attach_masks
from maskprune.structured.saliency import (
    cheapest,
    nearest_equal,
    one_shot,
    start_masks,
    taylor,
    unit_saliency,
    wanda_sp,
)


def inputs_of(model, ids, per_token):
    """Inputs of W_O and W_down of layer 1, multiplied by per-token masks of ones."""
    family, layer = FAMILIES[model.config.model_type], layers_of(model)[1]
    seen = {}

    def hook(kind, ones):
        def scale(module, args):
            seen[kind] = args[0].detach()
            return (args[0] * ones,)

        return scale

    handles = [
        attention_output(layer, family).register_forward_pre_hook(hook("head", per_token["head"])),
        ffn_output(layer, family).register_forward_pre_hook(hook("ffn", per_token["ffn"])),
    ]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_taylor_is_the_sum_over_tokens_of_the_squared_mask_gradient(family):
    model, ids = tiny_model(family), tokens(3, 12)
    masks = attach_masks(model, fused=False)
    trained = [p.requires_grad for p in model.parameters()]
    head, ffn = taylor(model, masks, ids)
    assert [p.requires_grad for p in model.parameters()] == trained
    ones = {
        "head": torch.ones(3, 12, 4, requires_grad=True),
        "ffn": torch.ones(3, 12, 24, requires_grad=True),
    }
    wide = {"head": ones["head"].repeat_interleave(8, dim=-1), "ffn": ones["ffn"]}
    logits, _ = inputs_of(model, ids, wide)
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    g_head, g_ffn = torch.autograd.grad(loss, [ones["head"], ones["ffn"]])
    torch.testing.assert_close(head[1], g_head.pow(2).sum((0, 1)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ffn[1], g_ffn.pow(2).sum((0, 1)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "head_unit"), [("llama", "kv_group"), ("llama", "query_head"), ("opt", "kv_group")]
)
def test_taylor_per_sequence_is_the_curvature_of_the_distillation_loss(family, head_unit):
    """Brute force: bend one mask both ways, and see how fast KL(dense || masked) rises."""
    model, ids = tiny_model(family, dtype=torch.float64), tokens(1, 8)
    masks = attach_masks(model, head_unit, fused=False)
    draws, e = 4096, 0.02
    head, ffn = taylor(model, masks, ids.expand(draws, -1), per_sequence=True)

    @torch.no_grad()
    def kl():
        return functional.kl_div(
            model(ids).logits.log_softmax(-1), dense, reduction="sum", log_target=True
        )

    def curvature(mask):
        out = torch.zeros_like(mask, dtype=torch.float64)
        for i in range(mask.numel()):
            for value in (1 + e, 1 - e):
                mask.data.view(-1)[i] = value
                out.view(-1)[i] += kl() / e**2
            mask.data.view(-1)[i] = 1.0
        return out

    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
    found_of = [(masks.ffn, ffn)]
    if masks.head.numel():
        found_of.append((masks.head, unit_saliency(head, masks)))
    for m, found in found_of:
        # A mean of `draws` squares of normal numbers is off by sqrt(2 / draws), 2 %.
        torch.testing.assert_close((found / draws).double(), curvature(m), rtol=0.12, atol=1e-6)


def test_taylor_per_sequence_repeats_by_its_seed():
    model, ids = tiny_model("llama"), tokens(3, 12)
    masks = attach_masks(model, fused=False)
    a, b, c = (taylor(model, masks, ids, per_sequence=True, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_sp_is_mean_weight_times_input_norm(family):
    model, ids = tiny_model(family), tokens(3, 12)
    masks = attach_masks(model, fused=False)
    head, ffn = wanda_sp(model, masks, ids)
    ones = {"head": torch.ones(1), "ffn": torch.ones(1)}
    with torch.no_grad():
        _, seen = inputs_of(model, ids, ones)
    weight = ffn_output(layers_of(model)[1], FAMILIES[family]).weight
    weight = weight.T if family == "gpt2" else weight
    norm = seen["ffn"].pow(2).sum((0, 1)).sqrt()
    torch.testing.assert_close(ffn[1], weight.abs().mean(0) * norm, rtol=1e-4, atol=1e-6)
    assert head.shape == (2, 4) and bool((head > 0).all()) is FAMILIES[family].prunes_heads


def test_taylor_keeps_no_activation_alive():
    model = tiny_model("llama")
    masks = attach_masks(model, fused=False)
    seen = []

    def note(module, args):
        seen.append(weakref.ref(args[0]))

    for layer in layers_of(model):
        attention_output(layer, FAMILIES["llama"]).register_forward_pre_hook(note)
        ffn_output(layer, FAMILIES["llama"]).register_forward_pre_hook(note)
    taylor(model, masks, tokens(3, 12))
    gc.collect()
    assert len(seen) == 4 and not any(x() is not None for x in seen)


def test_rankings_see_the_dense_model_whatever_the_masks_are():
    model, ids = tiny_model("llama"), tokens(3, 12)
    masks = attach_masks(model, fused=False)
    before = taylor(model, masks, ids)
    randomise(masks, 1, 8)
    after = taylor(model, masks, ids)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert masks.enabled


def test_masks_start_in_the_order_of_saliency_and_at_one_far_from_the_budget():
    model = tiny_model("llama")
    masks = attach_masks(model, fused=False)
    budget = Budget(model, 0.2, multiple_of=4)
    saliency = taylor(model, masks, tokens(3, 12))
    start_masks(masks, budget, saliency)
    for m, rho in ((masks.head, unit_saliency(saliency[0], masks)), (masks.ffn, saliency[1])):
        by_saliency = m.detach().gather(1, rho.argsort(dim=1))
        assert (by_saliency.diff(dim=1) >= 0).all()
        assert m.min() >= 0.5 and m.max() == 1.0
    # Every row holds the same values, so rows lose the same number at the same price.
    assert torch.equal(masks.ffn.sort(dim=1).values[0], masks.ffn.sort(dim=1).values[1])


@pytest.mark.parametrize("kind", ["wanda-sp", "taylor"])
def test_one_shot_prunes_the_least_salient_of_every_row_at_once(kind):
    model = tiny_model("llama")
    masks = attach_masks(model, fused=False)
    budget = Budget(model, 0.3, multiple_of=4)
    split = one_shot(kind, model, masks, budget, tokens(3, 12))
    assert kind == "taylor" or split == nearest_equal(budget)
    assert ((masks.ffn == 0).sum(1) == split.ffn).all() and set(masks.ffn.unique().tolist()) <= {
        0.0,
        1.0,
    }
    scores = (taylor if kind == "taylor" else wanda_sp)(model, masks, tokens(3, 12))[1]
    for row, m in zip(scores, masks.ffn, strict=True):
        assert row[m == 0].max() <= row[m == 1].min()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cheapest_split_loses_the_least_saliency_of_all_legal_ones(family):
    model = tiny_model(family)
    masks, budget = attach_masks(model), Budget(model, 0.15, multiple_of=4)
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        shape = masks.shape
        saliency = (
            torch.rand(shape.layers, shape.heads, generator=random).pow(seed),
            torch.rand(shape.layers, shape.ffn, generator=random),
        )
        units = unit_saliency(saliency[0], masks)

        def lost(split, units=units, saliency=saliency):
            pairs = ((units, split.head), (saliency[1], split.ffn))
            return sum(float(row.sort().values[:n].sum()) for rho, n in pairs for row in rho)

        found = cheapest(masks, budget, saliency)
        assert found in budget.splits
        assert lost(found) == pytest.approx(min(lost(split) for split in budget.splits))
