"""The loss against the unmasked self, both ways of computing it, for every family."""

from __future__ import annotations

import pytest
import torch
from models import randomise, tiny_model, tokens
from torch.nn import functional

from maskprune.hf.families import FAMILIES
from maskprune.structured.distill import distill, teacher_mode
from maskprune.structured.masks import attach_masks
from maskprune.training.losses import token_kl


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_token_kl_and_its_gradient_equal_torch(direction):
    s = torch.randn(5, 300, 17, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 300, 17, dtype=torch.float64)
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    p, q = (log_t, log_s) if direction == "teacher_student" else (log_s, log_t)
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    (want,) = torch.autograd.grad(expected, s)
    got = token_kl(s, t, direction)
    (grad,) = torch.autograd.grad(got, s)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-8)


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="kl_direction is 'sideways'; expected one of"):
        token_kl(torch.zeros(1, 2), torch.zeros(1, 2), "sideways")


@pytest.mark.parametrize("family", FAMILIES)
def test_side_by_side_equals_teacher_first(family):
    model = tiny_model(family)
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    ids = tokens()
    grads, values = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        loss = distill(model, masks, ids, alpha=0.1)
        masks.zero_grad()
        loss.total.backward()
        grads.append(masks.ffn.grad.clone())
        values.append(torch.stack([loss.total, loss.kl, loss.layer]).detach())
    assert values[0].min() > 0
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_the_hidden_state_term_counts_every_layer():
    model = tiny_model("llama")
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    states = []
    with torch.no_grad():
        for off in (False, True):
            seen = []
            hooks = [
                layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                for layer in model.model.layers
            ]
            with masks.off() if off else torch.enable_grad():
                model(tokens())
            for hook in hooks:
                hook.remove()
            states.append(seen)
        expected = sum(functional.mse_loss(s, t) for s, t in zip(*states, strict=True))
        assert len(states[0]) == 2
        got = distill(model, masks, tokens(), alpha=1.0).layer
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_loss_is_zero_and_flat_at_masks_of_one():
    model = tiny_model("llama")
    masks = attach_masks(model, fused=False)
    loss = distill(model, masks, tokens(), alpha=1.0)
    loss.total.backward()
    assert loss.total.abs() < 1e-6 and masks.ffn.grad.abs().max() < 1e-5


def test_the_teacher_is_the_dense_model_to_the_bit_and_state_is_restored():
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    with torch.no_grad():
        dense = base(tokens()).logits
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    model.train()
    with teacher_mode(model, masks):
        assert torch.equal(model(tokens()).logits, dense)
    assert model.training and masks.enabled
    with torch.no_grad():
        assert not torch.equal(model(tokens()).logits, dense)
