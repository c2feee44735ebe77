"""FFNs on the kept units alone: the masked model's values and gradients; all is put back."""

import copy
import pickle

import pytest
import torch
from models import randomise, tiny_model, tokens
from peft import LoraConfig, get_peft_model

from maskprune.hf.families import FAMILIES, get_submodule, layers_of, stock_model
from maskprune.structured import kept_units
from maskprune.structured.distill import distill, teacher_mode
from maskprune.structured.kept_units import compute_kept_units
from maskprune.structured.masks import attach_masks

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
GATED = [name for name, family in FAMILIES.items() if family.gated]
PLAIN = [name for name, family in FAMILIES.items() if not family.gated]
RTOL = 2e-5


def masked(family, targets="all-linear", dtype=torch.float32, pruned=6, fused=False):
    """A model with adapters away from zero, under masks of 0 and 1 that rest."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(family, dtype=dtype), config)
    masks = randomise(attach_masks(model, fused=fused), head=0, ffn=pruned).requires_grad_(False)
    with torch.no_grad():
        masks.ffn.copy_((masks.ffn != 0).float())
    return model, masks


def results(model):
    out = model(tokens()).logits
    model.zero_grad()
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **grads}


def assert_close(got, want, rtol=RTOL):
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert error <= rtol, f"{name}: {error:.3g}"


def skipping(model):
    family = FAMILIES[stock_model(model).maskprune.family]
    return ["forward" in vars(get_submodule(layer, family.ffn)) for layer in layers_of(model)]


@pytest.mark.parametrize("family", GATED)
def test_values_and_gradients_are_the_masked_models_and_all_is_put_back(family):
    model, masks = masked(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    want = results(model)
    with teacher_mode(model, masks):
        dense = model(tokens()).logits
    put_back = compute_kept_units(model, masks)
    assert all(skipping(model)) and skipping(model)
    got = results(model)
    assert any("lora_B" in name and "gate" in name for name in got)
    assert_close(got, want)
    with teacher_mode(model, masks):
        torch.testing.assert_close(model(tokens()).logits, dense, rtol=1e-4, atol=1e-4)
    put_back()
    assert not any(skipping(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(map(torch.equal, results(model).values(), want.values()))


@pytest.mark.parametrize("pruned", [0, 1, 23])
def test_any_number_of_units_may_stay(pruned):
    model, masks = masked("llama", pruned=pruned)
    want = results(model)
    compute_kept_units(model, masks)
    assert_close(results(model), want)


def test_the_reordered_rows_are_not_those_of_the_mask(family="llama"):
    # What the other tests compare would hide a mask whose kept units stand first already.
    _, masks = masked(family)
    assert (masks.ffn[:, :18] == 0).any()


@pytest.mark.parametrize("family", PLAIN)
def test_an_ffn_without_a_gate_stays_under_its_mask(family):
    model, masks = masked(family)
    want = results(model)
    compute_kept_units(model, masks)
    assert all(map(torch.equal, results(model).values(), want.values()))


def test_projections_without_adapters_and_a_fused_ffn_below():
    model, masks = masked("qwen2", targets=["q_proj", "down_proj"], fused=True)
    forwards = [vars(layer.mlp)["forward"] for layer in layers_of(model)]
    want = results(model)
    put_back = compute_kept_units(model, masks)
    assert_close(results(model), want)
    put_back()
    assert [vars(layer.mlp)["forward"] for layer in layers_of(model)] == forwards


def test_bfloat16_weights_under_float32_adapters():
    model, masks = masked("llama", dtype=torch.bfloat16)
    model.eval()
    want = model(tokens()).logits
    compute_kept_units(model, masks)
    got = model(tokens()).logits
    assert got.dtype == want.dtype
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error < 0.03


def test_under_autocast_and_checkpointing_the_loss_is_the_same():
    model, masks = masked("llama")
    copied = copy.deepcopy(model)
    compute_kept_units(model, masks)
    stock_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    losses = []
    for each in (model, copied):
        of_each = stock_model(each).maskprune
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(distill(each.train(), of_each, tokens(), alpha=0.0).total)
        losses[-1].backward()
    assert torch.isclose(*losses, rtol=0.02)


def test_a_copy_computes_with_its_own_weights():
    model, masks = masked("llama")
    compute_kept_units(model, masks)
    want = results(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(results(copied), want)


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_puts_its_own_weights_back(copied_by):
    model, masks = masked("llama")
    before = [p.clone() for p in model.parameters()]
    compute_kept_units(model, masks)
    copied = copied_by(model)
    stock_model(copied).maskprune.detach()
    assert all(skipping(model))
    layer = layers_of(copied)[0].mlp
    ours = layers_of(model)[0].mlp
    assert "forward" not in vars(layer)
    masks.detach()
    assert torch.equal(layer.up_proj.base_layer.weight, ours.up_proj.base_layer.weight)
    of_model = [p for name, p in model.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(of_model, before, strict=False))


def test_masks_between_0_and_1_are_refused():
    model, masks = masked("llama")
    with torch.no_grad():
        masks.ffn[0, 0] = 0.5
    with pytest.raises(ValueError, match="not all 0 or 1"):
        compute_kept_units(model, masks)


@pytest.mark.parametrize(
    "change", ["trained", "watched", "watched adapter", "backward", "shared", "residual dropout"]
)
def test_an_ffn_that_cannot_be_reordered_stays_under_its_mask(change):
    model, masks = masked("seed_oss", targets="all-linear" if change != "shared" else ["q_proj"])
    layers = layers_of(model)
    linear = layers[0].mlp.up_proj
    base = getattr(linear, "base_layer", linear)
    if change == "trained":
        base.weight.requires_grad_(True)
    elif change == "watched":
        base.register_forward_hook(lambda *_: None)
    elif change == "watched adapter":
        linear.register_forward_pre_hook(lambda *_: None)
    elif change == "backward":
        linear.register_full_backward_hook(lambda *_: None)
    elif change == "shared":
        base.weight = layers[1].mlp.up_proj.weight
    else:
        layers[0].mlp.residual_dropout = 0.5
    want = results(model.eval())
    compute_kept_units(model, masks)
    assert skipping(model) == [False, change != "shared"]
    assert_close(results(model), want)


@pytest.mark.parametrize("how", ["merged", "dropout"])
def test_adapters_that_are_not_plain_stay_under_the_mask(how):
    config = LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.5 * (how == "dropout"))
    model = get_peft_model(tiny_model("llama"), config)
    masks = attach_masks(model, fused=False).requires_grad_(False)
    if how == "merged":
        model.merge_adapter()
    compute_kept_units(model, masks)
    assert not any(skipping(model))


def test_the_masks_own_hooks_are_no_obstacle():
    model, masks = masked("llama", targets=["q_proj", "v_proj"])
    want = results(model)
    compute_kept_units(model, masks)
    assert all(skipping(model))
    assert_close(results(model), want)


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_while_weights_are_reordered_leaves_none_out_of_order(at, monkeypatch):
    model, masks = masked("qwen2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    honest, calls = kept_units._copy, []

    def interrupted(tensor, values):
        calls.append(tensor)
        if len(calls) == at + 1 and at % 2:
            raise KeyboardInterrupt
        honest(tensor, values)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept_units, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute_kept_units(model, masks)
    assert not any(skipping(model))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_masks_that_are_taken_off_put_the_weights_back():
    model, masks = masked("llama", fused=True)
    before = layers_of(model)[0].mlp.up_proj.base_layer.weight.clone()
    compute_kept_units(model, masks)
    masks.detach()
    assert not ["forward" for layer in layers_of(model) if "forward" in vars(layer.mlp)]
    assert torch.equal(layers_of(model)[0].mlp.up_proj.base_layer.weight, before)


def test_an_activation_that_the_operation_does_not_know(monkeypatch):
    """On a GPU the fused operation computes the family's activation alone."""
    model = tiny_model("llama", hidden_act="gelu").requires_grad_(False)
    masks = attach_masks(model).requires_grad_(False)
    seen = []
    honest = kept_units.is_activation
    monkeypatch.setattr(kept_units, "is_activation", lambda *a: seen.append(honest(*a)) or seen[-1])
    compute_kept_units(model, masks)
    assert seen == [False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_on_a_gpu(act):
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_act=act).requires_grad_(False).cuda()
    masks = randomise(attach_masks(model), head=0, ffn=6).requires_grad_(False)
    masks.ffn.data = (masks.ffn != 0).float()
    ids = tokens().cuda()
    want = model(ids).logits
    compute_kept_units(model, masks)
    assert all(skipping(model))
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
