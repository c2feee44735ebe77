"""The compensation is the least-squares solution, cut to the best rank, and training keeps it."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, randomise, tiny_model, tokens
from peft import LoraConfig, get_peft_model

from maskprune.hf.equality import compare_logits
from maskprune.hf.families import (
    FAMILIES,
    attention_output,
    ffn_output,
    layers_of,
    output_names,
)
from maskprune.structured import compensation, saliency
from maskprune.structured.budget import Budget
from maskprune.structured.compensation import compensate, low_rank_compensation, shared_grams
from maskprune.structured.distill import teacher_mode
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks


def problem(out=6, channels=10, n=200, gone=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, channels, generator=g, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=g, dtype=torch.float64)
    X = mix @ torch.randn(channels, n, generator=g, dtype=torch.float64)
    m = torch.rand(channels, generator=g, dtype=torch.float64) * 0.5 + 0.5
    m[torch.randperm(channels, generator=g)[:gone]] = 0
    return W, X, m


def left(W, X, m, D):
    return float((W @ X - (W + D) @ (m[:, None] * X)).norm())


@pytest.mark.parametrize("gone", [0, 1, 4, 9])
def test_at_full_rank_the_compensation_is_the_least_squares_solution(gone):
    W, X, m = problem(gone=gone)
    A, B = low_rank_compensation(W, X @ X.T, m, rank=6, ridge=0.0)
    K = m.nonzero()[:, 0]
    Z = m[K, None] * X[K]
    expected = W.clone()
    expected[:, K] = torch.linalg.lstsq(Z.T, (W @ X).T).solution.T
    torch.testing.assert_close((W + B @ A)[:, K], expected[:, K], rtol=1e-6, atol=1e-8)
    assert not A[:, m == 0].any()


def test_directions_beyond_the_output_s_width_are_left_to_training():
    W, X, m = problem(out=3)
    A, B = low_rank_compensation(W, X @ X.T, m, rank=8)
    assert A.shape == (3, 10) and B.shape == (3, 3)


def test_no_change_of_that_rank_nearby_does_better():
    W, X, m = problem()
    g = torch.Generator().manual_seed(1)
    for rank in (1, 2, 4):
        A, B = low_rank_compensation(W, X @ X.T, m, rank, ridge=0.0)
        best = left(W, X, m, B @ A)
        for _ in range(50):
            a, b = (
                v + 1e-3 * torch.randn(v.shape, generator=g, dtype=v.dtype) * v.norm()
                for v in (A, B)
            )
            assert left(W, X, m, b @ a) >= best
    errors = [
        left(W, X, m, torch.mm(*reversed(low_rank_compensation(W, X @ X.T, m, r, 0.0))))
        for r in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < left(W, X, m, 0 * W)


def test_both_factors_have_equal_norms():
    W, X, m = problem()
    A, B = low_rank_compensation(W, X @ X.T, m, rank=3)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_pruned_and_all_pruned_change_nothing(value):
    W, X, _ = problem()
    A, B = low_rank_compensation(W, X @ X.T, torch.full((10,), value), rank=3)
    assert A.shape == (0, 10) and B.shape == (6, 0)


def test_channels_that_are_always_zero_are_solved_too():
    W, X, m = problem()
    X[m.nonzero()[:3, 0]] = 0
    A, B = low_rank_compensation(W, X @ X.T, m, rank=6)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    silent, _ = low_rank_compensation(W, torch.zeros(10, 10), m, rank=6)
    assert silent.shape == (0, 10)


def test_a_gram_that_rounding_left_indefinite_is_solved_with_more_ridge():
    W, X, m = problem(gone=2)
    K = m.nonzero()[:, 0]
    H = X @ X.T
    H[K[0], K[1]] = H[K[1], K[0]] = 1.3 * (H[K[0], K[0]] * H[K[1], K[1]]).sqrt()
    assert torch.linalg.eigvalsh(H)[0] < -0.01 * H.diagonal().mean()
    A, B = low_rank_compensation(W, H, m, rank=6)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()


def test_of_two_active_adapters_only_one_takes_the_compensation():
    def weight(names):
        model = tiny_model("llama")
        config = LoraConfig(r=8, lora_alpha=8, target_modules=["down_proj"])
        model = get_peft_model(model, config)
        for name in names[1:]:
            model.add_adapter(name, config)
        model.base_model.set_adapter(names)
        masks = randomise(attach_masks(model, fused=False), 1, 8)
        compensate(model, masks, (masks.head.detach(), masks.ffn.detach()), tokens(8, 20))
        module = ffn_output(layers_of(model)[0], FAMILIES["llama"])
        return sum(module.get_delta_weight(name) for name in names)

    torch.testing.assert_close(weight(["default", "more"]), weight(["default"]))


def test_overflown_activations_are_a_clear_error():
    W, X, m = problem()
    with pytest.raises(ValueError, match="not finite.*float32"):
        low_rank_compensation(W, float("inf") * X @ X.T, m, rank=2)


def adapted(family, head_unit="kv_group", targets="all-linear", rank=8):
    model = tiny_model(family)
    adapts = targets == "all-linear"
    ranks = dict.fromkeys(output_names(FAMILIES[family]), rank) if adapts else {}
    config = LoraConfig(
        r=2, lora_alpha=2, rank_pattern=ranks, alpha_pattern=ranks,
        target_modules=targets, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = get_peft_model(model, config)
    return model, randomise(attach_masks(model, head_unit, fused=False), 1, 8)


def first_layer_error(kind, model, masks, ids):
    """How far the masked W_O or W_down of the first layer is from the dense model's."""
    find = {"head": attention_output, "ffn": ffn_output}[kind]
    seen = []
    module = find(layers_of(model)[0], FAMILIES[masks.family])
    hook = module.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    with torch.no_grad():
        with teacher_mode(model, masks):
            model(input_ids=ids)
        model(input_ids=ids)
    hook.remove()
    return float((seen[1] - seen[0]).norm() / seen[0].norm())


@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("kind", ["head", "ffn"])
@pytest.mark.parametrize("family", KINDS)
def test_compensation_brings_every_kind_of_family_nearer_to_the_dense_model(
    family, kind, head_unit
):
    if kind == "head" and not FAMILIES[family].prunes_heads:
        pytest.skip("its heads stay")
    model, masks = adapted(family, head_unit, rank=32)
    # The other kind stays whole, so that the first layer's inputs are the dense model's.
    getattr(masks, {"head": "ffn", "ffn": "head"}[kind]).data.fill_(1)
    ids = tokens(8, 20)
    with teacher_mode(model, masks), torch.no_grad():
        dense = model(input_ids=ids).logits
    before = first_layer_error(kind, model, masks, ids)
    changed = compensate(model, masks, (masks.head.detach(), masks.ffn.detach()), ids)
    assert len(changed) == 4
    assert all(p.requires_grad and torch.isfinite(p).all() for p in changed)
    assert first_layer_error(kind, model, masks, ids) < 0.95 * before
    with teacher_mode(model, masks), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense), "the teacher moved"
    assert compare_logits(model, export(model, masks), ids).relative < 1e-4


def test_layers_in_several_passes_give_the_same_as_all_at_once(monkeypatch):
    ids = tokens(8, 20)
    results = []
    monkeypatch.setattr(saliency, "TOKENS_AT_ONCE", 40)
    for limit, passes in ((2**30, 1), (1, 4)):
        monkeypatch.setattr(compensation, "GRAM_BYTES", limit)
        model, masks = adapted("llama")
        kept = masks.head.detach().clone(), masks.ffn.detach().clone()
        said = []
        results.append(
            compensate(model, masks, kept, ids, lambda *now, said=said: said.append(now))
        )
        assert said == [(done, 4 * passes) for done in range(1, 4 * passes + 1)]
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("read", [4, 8])
@pytest.mark.parametrize("kind", ["taylor", "wanda-sp"])
def test_what_the_ranking_reads_is_not_read_again(monkeypatch, kind, read):
    ids = tokens(8, 20)
    monkeypatch.setattr(saliency, "TOKENS_AT_ONCE", 40)
    found, forwards = [], []
    for grams in (None, {}):
        model, masks = adapted("llama")
        budget = Budget(model, 0.5, multiple_of=4)
        saliency.one_shot(kind, model, masks, budget, ids[:read], grams=grams)
        kept = masks.head.detach().clone(), masks.ffn.detach().clone()
        calls = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rest = ids if grams is None else ids[read:]
        found.append(compensate(model, masks, kept, rest, summed=grams))
        forwards.append(len(calls))
    assert forwards == [4, (8 - read) // 2]
    assert found[0]
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_sums_that_do_not_fit_are_not_shared(monkeypatch):
    _, masks = adapted("llama")
    assert shared_grams(masks) == {}
    monkeypatch.setattr(compensation, "GRAM_BYTES", 1000)
    assert shared_grams(masks) is None


def test_matrices_without_adapters_or_pruned_channels_stay_as_they_are():
    model, masks = adapted("llama", targets=["q_proj", "v_proj"])
    kept = masks.head.detach().clone(), masks.ffn.detach().clone()
    assert compensate(model, masks, kept, tokens()) == []
    model, masks = adapted("llama")
    kept = torch.ones_like(masks.head), masks.ffn.detach().clone()
    assert len(compensate(model, masks, kept, tokens())) == 4


def test_an_adapter_of_another_scale_gives_the_same_weights():
    ids = tokens(8, 20)
    products = []
    for alpha in (8, 32):
        model = tiny_model("llama")
        config = LoraConfig(r=8, lora_alpha=alpha, target_modules=["down_proj"])
        model = get_peft_model(model, config)
        masks = randomise(attach_masks(model, fused=False), 1, 8)
        compensate(model, masks, (masks.head.detach(), masks.ffn.detach()), ids)
        products.append(
            ffn_output(layers_of(model)[0], FAMILIES["llama"]).get_delta_weight("default")
        )
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-6)
