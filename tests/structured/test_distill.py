"""The loss against the unmasked self, both ways of computing it, for every family."""

from __future__ import annotations

import pytest
import torch
from models import randomise, tiny_config, tiny_model, tokens
from torch.nn import functional

from maskprune.hf.families import FAMILIES, layers_of
from maskprune.hf.head import head_of, last_hidden_states, tail_of
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


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_share_of_the_loss_is_the_cross_entropy_of_the_next_tokens(weight):
    model = tiny_model("llama").requires_grad_(False)
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    results = []
    for whole in (False, True):
        loss = distill(model, masks, tokens(), alpha=0.1, lm_weight=0.0 if whole else weight)
        total = loss.total
        if whole:
            logits = model(tokens()).logits[:, :-1].flatten(0, 1)
            expected = functional.cross_entropy(logits, tokens()[:, 1:].flatten())
            total = 0.1 * loss.layer + weight * expected
            total = total + (1 - weight) * (loss.total - 0.1 * loss.layer)
            assert loss.lm == 0
        else:
            expected = loss.lm
        masks.zero_grad()
        total.backward()
        results.append((total.detach(), expected.detach(), masks.ffn.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        distill(model, attach_masks(model, fused=False), tokens(), lm_weight=weight)


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


def with_scaled_logits(family):
    """A tiny model whose config bends the logits wherever its class has a field for that."""
    fields = {"final_logit_softcapping": 2.0, "logit_scale": 0.5, "logits_scaling": 4.0}
    config = tiny_config(family)
    return tiny_model(family, **{k: v for k, v in fields.items() if hasattr(config, k)})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_knows_how_hidden_states_become_logits(family):
    model = with_scaled_logits(family)
    with torch.no_grad():
        logits = model(tokens()).logits
        hidden = last_hidden_states(model, tokens())
        seen = []
        hook = layers_of(model)[-1].register_forward_hook(lambda m, a, out: seen.append(out))
        model(tokens())
        hook.remove()
        last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        torch.testing.assert_close(head_of(model)(hidden), logits)
        torch.testing.assert_close(tail_of(model, last), hidden)


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_chunks_give_the_loss_of_whole_logits(family, alpha, direction):
    model = with_scaled_logits(family)
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    for p in model.get_output_embeddings().parameters():
        p.requires_grad_(False)
    results = []
    for whole in (False, True):
        hook = model.get_output_embeddings().register_forward_hook(lambda *_: None)
        if not whole:
            hook.remove()
        assert bool(head_of(model).obstacle) == whole
        loss = distill(model, masks, tokens(), alpha=alpha, kl_direction=direction)
        masks.zero_grad()
        loss.total.backward()
        results.append((loss.total.detach(), loss.kl.detach(), masks.ffn.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_an_opt_with_projections_and_no_final_norm_is_distilled():
    model = tiny_model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    masks = randomise(attach_masks(model, fused=False), 0, 8)
    for p in model.parameters():
        p.requires_grad_(False)
    values = [distill(model, masks, tokens(), alpha=alpha).kl for alpha in (0.0, 0.1)]
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    values.append(distill(model, masks, tokens(), alpha=0.1).kl)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


@pytest.mark.parametrize(
    "spoil, obstacle",
    [
        (lambda model: None, None),
        (lambda model: model.lm_head.requires_grad_(True), "trained"),
        (lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda model: setattr(model.lm_head, "forward", model.lm_head.forward), "hooks"),
    ],
)
def test_a_head_that_is_more_than_frozen_weights_says_so(spoil, obstacle):
    model = tiny_model("llama").requires_grad_(False)
    spoil(model)
    found = head_of(model).obstacle
    assert found is None if obstacle is None else obstacle in found


def test_a_head_with_an_adapter_says_so_and_is_distilled_from_whole_logits():
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        tiny_model("llama", tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    assert "adapted" in head_of(peft).obstacle
    masks = attach_masks(peft, fused=False)
    with pytest.raises(ValueError, match="give the PEFT model itself"):
        distill(peft.get_base_model(), masks, tokens())
    with torch.no_grad():
        student = peft(tokens()).logits
        with teacher_mode(peft, masks):
            teacher = peft(tokens()).logits
    for alpha in (0.0, 0.1):
        kl = distill(peft, masks, tokens(), alpha=alpha).kl
        torch.testing.assert_close(kl, token_kl(student, teacher))
