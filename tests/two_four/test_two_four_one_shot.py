"""Wanda and SparseGPT go through a model block after block, and leave it as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from models import KINDS, tiny_model, tokens
from peft import LoraConfig, get_peft_model

from maskprune.hf.families import layers_of
from maskprune.two_four import (
    apply_masks,
    hard_mask,
    is_two_four,
    one_shot,
    one_shot_masks,
    oriented,
    prunable,
    sparsegpt,
    wanda_scores,
)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(before, model):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def hooks(model):
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@torch.no_grad()
def sequentially(model, method, blocks, update):
    """The definition: for each block, the whole model as it is by then, once over all tokens."""
    model, masks = copy.deepcopy(model), {}
    for layer in layers_of(model):
        inside = set(layer.modules())
        linears = {name: m for name, m in prunable(model).items() if m in inside}
        seen: dict[str, torch.Tensor] = {}

        def see(name, args, seen=seen):
            seen[name] = args[0].flatten(0, -2).float()

        for name, module in linears.items():
            module.register_forward_pre_hook(lambda m, args, name=name, see=see: see(name, args))
        model(blocks)
        for name, module in linears.items():
            x, W = seen[name], oriented(module)
            if method == "wanda":
                masks[name] = hard_mask(wanda_scores(W, x.norm(dim=0)))
                W_hat = W
            else:
                W_hat, masks[name], _ = sparsegpt(W, 2 / len(blocks) * x.T @ x, update)
            W.copy_((W_hat if update else W).masked_fill(~masks[name], 0))
    return masks, model


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", KINDS)
def test_masks_are_those_of_the_definition_and_the_model_is_as_before(family, method, monkeypatch):
    # Three micro-batches, the last of another size.
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 40)
    model, blocks = tiny_model(family), tokens(5, 20)
    before = bits(model)
    masks = one_shot_masks(model, method, blocks)
    assert same(before, model) and not hooks(model)
    expected, _ = sequentially(model, method, blocks, False)
    assert list(masks) == list(prunable(model))
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.sum() * 2 == mask.numel()
        assert torch.equal(mask, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma3_text"])
def test_updated_weights_are_written_and_nothing_else_is(family, monkeypatch):
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 40)
    model, blocks = tiny_model(family), tokens(5, 20)
    _, expected = sequentially(model, "sparsegpt", blocks, True)
    before = bits(model)
    masks = one_shot_masks(model, "sparsegpt", blocks, update=True)
    changed = dict(prunable(expected))
    for name, module in prunable(model).items():
        W, m = oriented(module), masks[name]
        assert is_two_four(W) and not W[~m].any() and not W[~m].signbit().any()
        torch.testing.assert_close(W, oriented(changed[name]), rtol=2e-3, atol=2e-4)
        assert not torch.equal(before.pop(f"{name}.weight"), module.weight)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], old) for name, old in before.items())


def test_block_one_reads_what_the_pruned_block_zero_puts_out():
    model, blocks = tiny_model("llama"), tokens(4, 20)
    masks = one_shot_masks(model, "wanda", blocks)
    first = layers_of(model)[0]
    with torch.no_grad():
        for name, module in prunable(model).items():
            if name.startswith("model.layers.0."):
                module.weight.masked_fill_(~masks[name], 0.0)
    seen = []
    layers_of(model)[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(blocks)
    norm = seen[0].flatten(0, 1).norm(dim=0)
    W = layers_of(model)[1].mlp.up_proj.weight
    assert torch.equal(masks["model.layers.1.mlp.up_proj"], hard_mask(wanda_scores(W, norm)))
    assert is_two_four(first.mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_with_attention_of_their_own_kind_keep_it(method):
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", sliding_window=4, layer_types=kinds)
    blocks = tokens(3, 24)
    masks = one_shot_masks(model, method, blocks)
    expected, _ = sequentially(model, method, blocks, False)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("family", KINDS)
def test_magnitude_needs_no_text(family):
    model = tiny_model(family)
    before = bits(model)
    masks = one_shot_masks(model, "magnitude")
    assert same(before, model)
    for name, module in prunable(model).items():
        assert torch.equal(masks[name], hard_mask(oriented(module).abs()))
    apply_masks(model, masks)


@pytest.mark.parametrize("update", [True, False])
def test_a_bfloat16_model_is_pruned_with_statistics_in_float32(update):
    model, blocks = tiny_model("llama", dtype=torch.bfloat16), tokens(6, 20)
    before = bits(model)
    masks = one_shot_masks(model, "sparsegpt", blocks, update=update)
    assert all(mask.sum() * 2 == mask.numel() for mask in masks.values())
    assert same(before, model) is not update
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    if update:
        assert all(is_two_four(oriented(module)) for module in prunable(model).values())


def test_the_size_of_micro_batches_and_the_caller_s_autocast_change_nothing(monkeypatch):
    model, blocks = tiny_model("llama"), tokens(5, 20)
    whole = one_shot_masks(model, "wanda", blocks)
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 1)
    with torch.autocast("cpu", torch.bfloat16):
        single = one_shot_masks(model, "wanda", blocks)
    assert all(torch.equal(whole[name], mask) for name, mask in single.items())


def test_linears_that_read_one_tensor_share_its_statistics(monkeypatch):
    groups = []
    kept = one_shot._statistics

    def watch(*args, **options):
        groups.append(kept(*args, **options))
        return groups[-1]

    monkeypatch.setattr(one_shot, "_statistics", watch)
    one_shot_masks(tiny_model("llama"), "sparsegpt", tokens(4, 20))
    ends = [[name.rsplit(".", 1)[1] for name in names] for names, _ in groups[1]]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]] + [
        ["down_proj"]
    ]


def test_inside_a_peft_wrapper_the_base_layers_are_pruned():
    model, blocks = tiny_model("llama"), tokens(4, 20)
    expected = one_shot_masks(model, "wanda", blocks)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    masks = one_shot_masks(wrapped, "wanda", blocks)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_each_module_s_mode_is_as_before():
    model = tiny_model("llama").train()
    layers_of(model)[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    one_shot_masks(model, "wanda", tokens(2, 8))
    assert [module.training for module in model.modules()] == modes


def test_progress_counts_blocks():
    seen = []
    one_shot_masks(
        tiny_model("llama"), "wanda", tokens(2, 8), progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_linear_and_leave_the_model(method, value):
    model = tiny_model("llama").train()
    with torch.no_grad():
        layers_of(model)[1].post_attention_layernorm.weight[3] = value
    before = {name: p.view(torch.int32).clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.gate_proj are not finite"):
        one_shot_masks(model, method, tokens(3, 12))
    assert all(torch.equal(before[n], p.view(torch.int32)) for n, p in model.named_parameters())
    assert not hooks(model) and all(module.training for module in model.modules())


@pytest.mark.parametrize("update", [True, False])
def test_an_error_half_way_leaves_the_block_as_it_was(update, monkeypatch):
    model = tiny_model("llama")
    before = bits(model)
    done = []
    real = one_shot.inverse_factor

    def breaks(H):
        done.append(H)
        if len(done) == 6:
            raise ValueError("no inverse")
        return real(H)

    monkeypatch.setattr(one_shot, "inverse_factor", breaks)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj: no inverse"):
        one_shot_masks(model, "sparsegpt", tokens(3, 12), update=update)
    for name, p in model.named_parameters():
        pruned = update and ".0." in name and "proj" in name
        assert torch.equal(before[name], p) is not pruned, name
    assert not hooks(model)


@pytest.mark.parametrize(
    "method, blocks, options, text",
    [
        ("wnda", None, {}, "'wnda'; expected one of sparsegpt, wanda, magnitude"),
        ("wanda", tokens(), {"update": True}, "only sparsegpt updates"),
        ("wanda", None, {}, "blocks are None; expected token ids"),
        ("sparsegpt", tokens().float(), {}, "torch.float32"),
        ("wanda", tokens()[0], {}, r"\(20,\)"),
        ("wanda", tokens(0, 20), {}, r"\(0, 20\)"),
    ],
)
def test_calls_that_make_no_sense_are_refused(method, blocks, options, text):
    with pytest.raises(ValueError, match=text):
        one_shot_masks(tiny_model("llama"), method, blocks, **options)


def test_nan_among_the_weights_names_the_linear():
    model = tiny_model("llama")
    with torch.no_grad():
        layers_of(model)[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        one_shot_masks(model, "magnitude")
