"""Learnable 2:4 masks on a model: prior, samples, modes, regulariser, and taking them off."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tokens

from maskprune.hf.families import FAMILIES
from maskprune.ops.gumbel_two_four import gumbel_two_four
from maskprune.two_four.masks import attach_two_four, start_logits
from maskprune.two_four.one_shot import one_shot_masks
from maskprune.two_four.patterns import (
    apply_masks,
    candidate_of,
    hard_mask,
    is_two_four,
    oriented,
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hard_mode_is_the_model_with_its_chosen_masks_applied(family):
    model, expected = tiny_model(family), tiny_model(family)
    masks = attach_two_four(model, seed=3)
    with masks.seen_as("hard"):
        hard = logits(model)
    apply_masks(expected, masks.choice())
    torch.testing.assert_close(hard, logits(expected), rtol=0, atol=0)
    assert not torch.equal(hard, logits(tiny_model(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_with_masks_off_or_detached_the_model_is_the_original(family):
    model, original = tiny_model(family), tiny_model(family)
    before = dict(model.state_dict())
    masks = attach_two_four(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "logits" not in n)
    with masks.seen_as("off"):
        assert torch.equal(logits(model), logits(original))
    masks.detach()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[n], original.state_dict()[n]) for n in after)
    assert all(p.requires_grad for p in model.parameters())


def test_a_forward_sees_the_operation_on_every_linear():
    model = tiny_model("llama")
    masks = attach_two_four(model, seed=1)
    masks.schedule(100.0, 2.0)
    masks.draw(7)
    name, module = next(iter(masks.modules.items()))
    part = module.parametrizations.weight[0]
    W = module.parametrizations.weight.original
    want, norm_sq = gumbel_two_four(W, part.logits, int(part.seed), 100.0, 2.0)
    assert torch.equal(module.weight, want) and torch.equal(part.norm_sq, norm_sq)
    groups = (want / W).view(-1, 4).sum(1)
    torch.testing.assert_close(groups, torch.full_like(groups, 2.0))


def test_draws_are_new_and_come_back_by_number():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    masks.schedule(1.0, 1.0)

    def seen(number):
        masks.draw(number)
        return logits(model)

    first, second = seen(0), seen(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, seen(0)) and torch.equal(first, seen(2**32))
    parts = [module.parametrizations.weight[0].seed for module in masks.modules.values()]
    assert len({int(seed) for seed in parts}) == len(parts), "every weight has noise of its own"
    other = attach_two_four(tiny_model("llama"), seed=1)
    mine = {int(seed) for seed in masks._seeds}
    assert not mine & {int(seed) for seed in other._seeds}


def test_a_deep_copy_after_a_forward_has_masks_of_its_own():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    model(input_ids=tokens())
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for p in (p for n, p in twin.named_parameters() if n.endswith("weight.0.logits")):
            p.mul_(-1)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    masks.draw(7)
    assert not torch.equal(logits(model), before)


def test_gradients_reach_every_logit_and_no_weight():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    masks.schedule(100.0, 4.0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, pi in masks.named_parameters().items():
        assert pi.grad is not None and bool((pi.grad != 0).any()), name
        # The six of a group move against each other: the softmax sees differences only.
        torch.testing.assert_close(pi.grad.sum(0), torch.zeros_like(pi.grad[0]), atol=1e-5, rtol=0)
    assert all(p.grad is None for n, p in model.named_parameters() if "logits" not in n)


def test_activation_checkpointing_draws_the_same_noise_again():
    grads = []
    for checkpointed in (False, True):
        model = tiny_model("llama")
        masks = attach_two_four(model)
        masks.schedule(100.0, 4.0)
        masks.draw(5)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        (loss - masks.kept_norms()[0]).backward()
        grads.append([p.grad for p in masks.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_kept_norms_are_those_of_the_masked_weights():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    masks.schedule(100.0, 0.05)
    logits(model)
    weights = [module.weight.double() for module in masks.modules.values()]
    total, squares = masks.kept_norms()
    torch.testing.assert_close(total.double(), sum(w.norm() for w in weights))
    torch.testing.assert_close(squares.double(), sum((w**2).sum() for w in weights))
    dense = tiny_model("llama").state_dict()
    norms = [dense[f"{name}.weight"].norm() for name in masks.modules]
    torch.testing.assert_close(masks.dense_norm(), torch.stack(norms).sum())


def test_a_weight_of_zeros_leaves_the_regulariser_a_number():
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    masks = attach_two_four(model)
    model(input_ids=tokens())
    masks.kept_norms()[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in masks.parameters())


def test_the_prior_moves_the_logits_by_its_overlap():
    g = torch.Generator().manual_seed(0)
    prior = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]).bool()
    plain = start_logits((1, 8), None, std=0.01, strength=3.0, generator=g.manual_seed(0))
    moved = start_logits((1, 8), prior, std=0.01, strength=3.0, generator=g.manual_seed(0))
    unit = 3.0 * plain.std()
    # 1100 against 1100, 1010, 1001, 0110, 0101, 0011; then 0101.
    overlaps = torch.tensor([[1, 0, 0, 0, 0, -1], [0, -1, 0, 0, 1, 0]]).T[:, None]
    torch.testing.assert_close(moved - plain, overlaps * unit)


@pytest.mark.parametrize(
    "strength, agreed", [(0.5, 0.316), (1.0, 0.487), (3.0, 0.945), (5.0, 0.999)]
)
def test_how_often_the_choice_is_the_prior_at_the_start(strength, agreed):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(256, 1024, generator=g)
    prior = hard_mask(scores)
    pi = start_logits((256, 1024), prior, std=0.01, strength=strength, generator=g)
    share = (pi.argmax(0).to(torch.uint8) == candidate_of(prior)).double().mean()
    assert float(share) == pytest.approx(agreed, abs=0.006)


def test_statistics_give_the_mean_probability_and_the_share_that_changed():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    masks.schedule(1e6, 0.05)
    first = masks.statistics()
    assert first["max_prob"] > 0.95 and first["changed"] == 0
    with torch.no_grad():
        for p in masks.parameters():
            p.copy_(p.roll(1, 0))
    assert masks.statistics()["changed"] == 1.0
    assert masks.statistics()["changed"] == 0.0
    with torch.no_grad():
        for p in masks.parameters():
            p.zero_()
    assert masks.statistics()["max_prob"] == pytest.approx(1 / 6)


def test_the_choice_is_two_four_in_every_linear():
    model = tiny_model("gemma2")
    masks = attach_two_four(model, one_shot_masks(model, "magnitude"))
    chosen = masks.choice()
    masks.detach()
    apply_masks(model, chosen)
    assert len(chosen) == 2 * 7
    assert all(is_two_four(oriented(m)) for m in masks.modules.values())
    assert not is_two_four(model.get_input_embeddings().weight)


def test_torch_compile_sees_the_masks():
    model = tiny_model("llama")
    masks = attach_two_four(model)
    masks.schedule(100.0, 1.0)
    masks.draw(3)
    ids = tokens()
    eager = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, eager)
    masks.draw(4)
    torch.testing.assert_close(
        compiled(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, use_cache=False).logits,
    )


def test_arguments_that_cannot_work_are_refused():
    model = tiny_model("llama")
    prior = one_shot_masks(model, "magnitude")
    name = next(iter(prior))
    with pytest.raises(ValueError, match=f"nothing for {name}"):
        attach_two_four(model, {n: m for n, m in prior.items() if n != name})
    with pytest.raises(ValueError, match="use masks that were made on this model"):
        attach_two_four(model, prior | {name: prior[name][:4]})
    masks = attach_two_four(model, prior)
    with pytest.raises(RuntimeError, match="2:4 masks already"):
        attach_two_four(model)
    with pytest.raises(ValueError, match="expected one of sample, hard, off"):
        masks.seen_as("soft").__enter__()
    masks.detach()

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="merge_and_unload"):
        attach_two_four(adapted)
