"""attach_masks(fused=True): the hook path's values and gradients, in every gated family."""

import copy
import os
import shutil

import pytest
import torch
from models import randomise, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

from maskprune.hf.families import FAMILIES, layers_of
from maskprune.structured.fused_ffn import fuse_ffn
from maskprune.structured.masks import attach_masks

# Its new name is younger than the oldest transformers that we take; PEFT uses the old one too.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
GATED = [name for name, family in FAMILIES.items() if family.gated]
# Largest difference over the largest value: float32 keeps all but the last few bits.
FLOAT32_RTOL = 2e-5
# In bfloat16 each path is compared with float32; the fused one rounds less and may not be worse.
BFLOAT16_RATIO = 1.5


def lora(model, seed=0, targets="all-linear"):
    """LoRA on the linear layers of the blocks, with B away from zero so that its path counts."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def results(model, masks, ids=None):
    """Logits and every gradient, by name."""
    out = model(tokens() if ids is None else ids).logits
    model.zero_grad()
    # A weighted sum, so that every logit's gradient differs.
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach(), **grads}


def both(family, dtype=torch.float32, wrap=lambda model: model, run=results):
    """What `run` returns by the hook path and by the fused path of equal models and masks."""
    done = []
    for fused in (False, True):
        model = wrap(tiny_model(family, dtype=dtype))
        masks = randomise(attach_masks(model, fused=fused), head=1, ffn=6)
        assert [("forward" in vars(layer.mlp)) for layer in layers_of(model)] == [fused, fused]
        done.append(run(model, masks))
    return done


def assert_equal_paths(hook, fused):
    assert hook.keys() == fused.keys()
    assert any("maskprune.ffn" in name for name in hook)
    for name, want in hook.items():
        error = (fused[name] - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= FLOAT32_RTOL, f"{name}: {error:.3g}"


@pytest.mark.parametrize("family", GATED)
def test_values_and_gradients_are_those_of_the_hook_path(family):
    assert_equal_paths(*both(family))


@pytest.mark.parametrize("family", GATED)
def test_lora_adapters_take_part(family):
    hook, fused = both(family, wrap=lora)
    assert_equal_paths(hook, fused)
    assert any("lora_B" in name and "mlp" in name for name in fused)


@pytest.mark.parametrize("family", GATED)
def test_bfloat16_is_as_near_to_float32_as_the_hook_path(family):
    hook, fused = both(family, dtype=torch.bfloat16)
    model = tiny_model(family, dtype=torch.bfloat16).float()
    exact = results(model, randomise(attach_masks(model, fused=False), head=1, ffn=6))
    names = ["logits", *(n for n in exact if "maskprune" in n or "mlp" in n)]
    by_hook, by_fused = (
        sum(((r[n].float() - exact[n]).norm() / exact[n].norm()).item() ** 2 for n in names)
        for r in (hook, fused)
    )
    assert by_fused <= BFLOAT16_RATIO**2 * by_hook, f"{by_fused**0.5:.3g} > {by_hook**0.5:.3g}"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "lora"])
def test_gradient_checkpointing_changes_nothing(wrap, reentrant):
    def checkpointed(model, masks):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.train()
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        return results(model, masks)

    hook, fused = both("llama", wrap=wrap, run=checkpointed)
    assert_equal_paths(hook, fused)
    model = wrap(tiny_model("llama")).train()
    straight = results(model, randomise(attach_masks(model, fused=True), head=1, ffn=6))
    for name, want in straight.items():
        torch.testing.assert_close(fused[name], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "family, wrap",
    [
        ("llama", lambda model: lora(model, targets=["up_proj", "down_proj"])),
        ("gemma2", lambda model: model),
        ("phi3", lambda model: model),
    ],
    ids=["llama with lora", "gemma2", "phi3"],
)
def test_compiles_as_one_graph_that_sees_new_masks(family, wrap):
    torch._dynamo.reset()
    model = wrap(tiny_model(family, num_hidden_layers=1))
    masks = randomise(attach_masks(model, fused=True), head=1, ffn=6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens()
    for seed in (0, 1):
        randomise(masks, head=1, ffn=6, seed=seed)
        gradients = []
        for run in (compiled, model):
            out = run(ids).logits
            gradients.append(torch.autograd.grad(out.square().mean(), (masks.ffn, masks.head)))
        torch.testing.assert_close(compiled(ids).logits, out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_inductor_keeps_values_and_mask_gradients():
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=1)
    masks = randomise(attach_masks(model, fused=True), head=1, ffn=6)
    ids, done = tokens(), []
    for run in (torch.compile(model, fullgraph=True), model):
        logits = run(ids).logits
        done.append((logits, *torch.autograd.grad(logits.square().mean(), (masks.ffn, masks.head))))
    for name, compiled, eager in zip(("logits", "ffn", "head"), *done, strict=True):
        error = (compiled - eager).abs().max() / eager.abs().max()
        assert error <= FLOAT32_RTOL, f"{name}: {error:.3g}"


@pytest.mark.parametrize("family", GATED)
def test_masks_off_is_the_original_model_to_the_bit(family):
    model = tiny_model(family)
    before = model(tokens()).logits
    masks = randomise(attach_masks(model, fused=True), head=1, ffn=6)
    assert not torch.equal(model(tokens()).logits, before)
    with masks.off():
        assert torch.equal(model(tokens()).logits, before)
    masks.detach()
    assert torch.equal(model(tokens()).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_backward_keeps_one_ffn_tensor_less_than_the_hook_path():
    def saved_bytes(model, masks):
        kept = {}
        frozen = [p.requires_grad_(False) for n, p in model.named_parameters() if "mask" not in n]
        weights = {p.data_ptr() for p in frozen}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x
        ):
            model(tokens(4, 40))
        return sum(x.nbytes for p, x in kept.items() if p not in weights)

    hook, fused = both("llama", run=saved_bytes)
    layers, values = 2, 4 * 40 * 24
    assert hook - fused >= layers * values * 4


def test_a_copy_of_a_fused_model_runs_its_own_weights():
    model = tiny_model("llama")
    attach_masks(model, fused=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers_of(twin):
            layer.mlp.up_proj.weight.zero_()
    ids = tokens()
    assert not torch.equal(twin(ids).logits, model(ids).logits)


def test_a_float64_model_is_fused_too():
    hook, fused = both("llama", dtype=torch.float64)
    torch.testing.assert_close(fused["logits"], hook["logits"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_family_without_a_gate_keeps_the_hook(family):
    model = tiny_model(family)
    masks = randomise(attach_masks(model, fused=True), head=0, ffn=6)
    assert not any("forward" in vars(module) for module in model.modules())
    assert results(model, masks)["maskprune.ffn"].any()


def test_refuses_what_it_would_compute_wrongly():
    mlp = layers_of(tiny_model("llama"))[0].mlp
    with pytest.raises(ValueError, match="is not gelu_tanh; use the hook: attach_masks"):
        fuse_ffn(mlp, "gelu_tanh", lambda: None)
    with pytest.raises(ValueError, match="Linear is not a gated FFN with gate_proj"):
        fuse_ffn(nn.Linear(2, 2), "silu", lambda: None)
    undo = fuse_ffn(mlp, "silu", lambda: None)
    with pytest.raises(RuntimeError, match="has been replaced already; use the hook"):
        fuse_ffn(mlp, "silu", lambda: None)
    undo()
    fuse_ffn(mlp, "silu", lambda: None)


def test_a_refused_ffn_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    names = list(model.state_dict())
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError):
        attach_masks(model, fused=True)
    assert list(model.state_dict()) == names
    assert not any(m._forward_pre_hooks for m in model.modules())
    attach_masks(model, fused=False).detach()
