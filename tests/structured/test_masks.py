"""Masks on a model: copies, pickles, casts, what trains them, and models that cannot take them."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from models import randomise, tiny_model, tokens
from torch import nn
from transformers import AutoModel, LlamaModel

from maskprune.structured.budget import Budget
from maskprune.structured.callbacks import PruneCallback
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks
from maskprune.structured.minimax import Minimax
from maskprune.two_four.masks import attach_two_four


@pytest.fixture(params=["hook", "fused"])
def masked(request):
    model = tiny_model("llama")
    return model, randomise(attach_masks(model, fused=request.param == "fused"), 1, 8)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_masked_model_has_masks_of_its_own(masked, copied):
    model, masks = masked
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    twin.maskprune.ffn.data.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    masks.ffn.data.mul_(0.5)
    assert not torch.equal(logits(model), before)

    twin.maskprune.detach()
    assert not hasattr(twin, "maskprune") and hasattr(model, "maskprune")
    masks.detach()
    assert torch.equal(logits(twin), logits(model))


def test_a_masked_model_survives_torch_save(masked, tmp_path):
    model, _ = masked
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_stay_float32_when_the_model_is_cast(masked, dtype):
    model, masks = masked
    values = masks.ffn.detach().clone()
    model.to(dtype)
    assert model.dtype == dtype and masks.ffn.dtype == masks.head.dtype == torch.float32
    assert torch.equal(masks.ffn, values)
    model(tokens(), labels=tokens()).loss.backward()
    Minimax(masks, Budget(model, 0.3), 100).step()
    assert model.to("meta").maskprune.ffn.device.type == "meta"


def solver_of(model, masks):
    return Minimax(masks, Budget(model, 0.3), 100)


def test_masks_that_nothing_can_train_are_refused_at_the_first_step(masked):
    model, masks = masked
    solver = solver_of(model, masks)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the masks are not trained.*masks.parameters"):
        solver.step()
    solver.lock(solver.budget.splits[0])
    solver.step()


def test_an_optimizer_without_the_masks_is_noticed(masked, caplog):
    model, masks = masked
    solver = solver_of(model, masks)
    weights = [p for n, p in model.named_parameters() if "maskprune" not in n]

    def train(parameters, steps):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for _ in range(steps):
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            solver.step()

    with caplog.at_level(logging.WARNING, logger="maskprune.structured.minimax"):
        train(model.parameters(), 3)
        assert not caplog.records
        train(weights, 3)
    assert len(caplog.records) == 1
    assert "no optimizer moved the masks" in caplog.text


def test_the_callback_refuses_an_optimizer_without_the_masks(masked):
    model, masks = masked
    solver = solver_of(model, masks)
    callback = PruneCallback(solver)
    weights = [p for n, p in model.named_parameters() if "maskprune" not in n]
    callback.on_train_begin(None, None, None, optimizer=torch.optim.SGD(model.parameters()))
    without = torch.optim.SGD(weights)
    with pytest.raises(RuntimeError, match="the masks are not trained"):
        callback.on_train_begin(None, None, None, optimizer=without)
    solver.lock(solver.budget.splits[0])
    callback.on_train_begin(None, None, None, optimizer=without)


def test_two_kinds_of_masks_on_one_model_are_refused():
    model = tiny_model("llama")
    masks = attach_masks(model)
    with pytest.raises(RuntimeError, match=r"masks of attach_masks; call their detach\(\)"):
        attach_two_four(model)
    masks.detach()
    attach_two_four(model)
    with pytest.raises(RuntimeError, match="attach_two_four does; take that off"):
        attach_masks(model)


@pytest.mark.parametrize("attach", [attach_masks, attach_two_four])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "the model is Linear; expected a transformers causal LM"),
        (lambda: AutoModel, "the model is AutoModel; expected a transformers causal LM"),
        (
            lambda: LlamaModel(tiny_model("llama").config),
            "the model is LlamaModel, without model.layers; expected a transformers causal LM",
        ),
    ],
)
def test_a_model_that_is_not_a_causal_lm_is_named(attach, model, message):
    with pytest.raises(TypeError, match=message):
        attach(model())


def test_a_sparsity_that_is_not_a_number_is_named():
    with pytest.raises(TypeError, match="sparsity is 'abc'; expected a number"):
        Budget(tiny_model("llama"), "abc")


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer"])
def test_a_compiled_model_takes_no_masks(how):
    model = tiny_model("llama")
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    with pytest.raises(RuntimeError, match="call attach_masks first and torch.compile after it"):
        attach_masks(model)


def test_masks_under_compile_are_seen_and_exported():
    model = tiny_model("llama")
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    assert torch.allclose(logits(export(compiled, masks)), logits(model), atol=1e-4)
