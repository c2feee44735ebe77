"""A student whose weights are trained: cut exactly, taught by the dense model, resumable."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from models import tiny_model, tokens
from short_runs import SHORT, data
from torch.utils import checkpoint
from transformers import TrainerCallback

from maskprune.config import PruneConfig
from maskprune.hf.equality import compare_logits
from maskprune.structured.distill import distill
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks
from maskprune.structured.prune import prune
from maskprune.structured.student import cut_student, finished

QUICK = SHORT | dict(method="taylor", train="weights")
FAMILIES = ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"]


def run(tmp_path=None, family="llama", resume=False, dtype=torch.float32, **changes):
    # Heads of a tiny GPT-2 stay, and a quarter of its weights is FFN.
    changes = ({"sparsity": 0.15} if family == "gpt2" else {}) | changes
    config = PruneConfig(**(QUICK | changes))
    model = tiny_model(family, num_hidden_layers=3).to(dtype)
    return prune(model, None, data(), config, run_dir=tmp_path, resume=resume, quiet=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_it_is_cut_exactly_and_then_learns(family):
    rate = 3e-4 if family == "gpt2" else 3e-3
    result = run(family=family, steps=60, lm_weight=0.0, learning_rate=rate)
    assert result.difference.relative < 1e-4 and result.difference.largest_logit > 0.1
    assert result.shape.ffn < result.masks.shape.ffn
    # What was cut is still at hand, and the result is another model by now, nearer the dense one.
    assert compare_logits(result.masked_model, result.model, tokens()).relative > 1e-3
    cut = export(result.masked_model, result.masks)
    dense = tiny_model(family, num_hidden_layers=3).eval()

    def kl(model):
        with torch.no_grad():
            student, teacher = (
                m(input_ids=data()).logits.log_softmax(-1) for m in (model.eval(), dense)
            )
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    assert kl(result.model) < 0.9 * kl(cut)
    # The head and the embeddings stay the teacher's.
    ours, theirs = (m.get_output_embeddings().weight for m in (result.model, dense))
    assert torch.equal(ours, theirs)
    assert not result.model.training and all(p.grad is None for p in result.model.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.04])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_masked_models_weights(family, alpha):
    model = tiny_model(family)
    masks = attach_masks(model, "kv_group")
    masks.requires_grad_(False)
    keep = torch.arange(masks.shape.ffn) % 3 > 0
    masks.ffn.copy_(keep.float().expand_as(masks.ffn))
    student, dtypes = cut_student(model, masks, "mistral")
    ids = tokens()
    options = {"alpha": alpha, "lm_weight": 0.3}
    of_student = distill(student.eval(), masks, ids, teacher=model, **options)
    of_student.total.backward()
    with torch.no_grad():
        changed = finished(cut_student(model, masks, "mistral")[0], dtypes)
    model.eval().requires_grad_(True)
    of_masked = distill(model, masks, ids, **options)
    of_masked.total.backward()
    for name in ("total", "kl", "lm", "layer"):
        found, expected = getattr(of_student, name), getattr(of_masked, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
    down = "c_proj" if family == "gpt2" else "down_proj"
    masked = {n: p.grad for n, p in model.named_parameters()}
    seen = 0
    for name, p in student.named_parameters():
        if f"mlp.{down}.weight" in name:
            grad = masked[name]
            expected = grad[keep] if family == "gpt2" else grad[:, keep]
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-6)
            seen += 1
        assert p.requires_grad == (p.grad is not None), name
    assert seen == masks.shape.layers
    # Untrained, it is the export to the bit.
    whole = export(model, masks).state_dict()
    for name, p in changed.state_dict().items():
        assert torch.equal(p, whole[name]), name


def test_its_first_loss_is_that_of_adapters_from_the_same_compensation():
    ours, theirs = run(), run(train="adapters", lora_r=2)
    assert torch.equal(ours.masks.ffn, theirs.masks.ffn)
    for name in ("loss", "kl", "lm"):
        assert ours.trace[0][name] == pytest.approx(theirs.trace[0][name], rel=1e-4)
    assert ours.trace[-1]["kl"] != theirs.trace[-1]["kl"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, family):
    small = {"sparsity": 0.15} if family == "gpt_neox" else {}
    whole = run(tmp_path / "whole", family=family, save_steps=12, **small)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    again = run(tmp_path / "again", family=family, resume=True, save_steps=12, **small)
    assert torch.equal(whole.masks.ffn, again.masks.ffn)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name
    assert again.difference == whole.difference and again.shape == whole.shape
    ours = [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in again.trace]
    assert ours == [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in whole.trace]


def test_a_model_in_bfloat16_trains_in_float32_and_is_returned_as_it_came():
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            seen.append({p.dtype for p in model.parameters()})

    config = PruneConfig(**(QUICK | {"autocast": "bfloat16"}))
    model = tiny_model("llama", num_hidden_layers=3).to(torch.bfloat16)
    result = prune(model, None, data(), config, quiet=True, callbacks=[Watch()])
    assert seen == [{torch.float32}] * QUICK["steps"]
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.difference.relative < 0.1
    assert result.model.config.dtype == torch.bfloat16


def test_a_model_in_float64_stays_so():
    result = run(dtype=torch.float64, autocast="none")
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}
    assert result.difference.relative < 1e-10


def test_a_run_of_adapters_is_not_resumed_as_one_of_weights(tmp_path):
    run(tmp_path, train="adapters", save_steps=12)
    with pytest.raises(ValueError, match="that run trained no weights"):
        run(tmp_path, resume=True, save_steps=12)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"compensate": False}])
def test_other_settings_work_with_it(changes):
    result = run(**changes)
    assert result.trace[-1]["locked"] and result.difference.relative < 1e-4


def test_gradient_checkpointing_changes_no_loss(monkeypatch):
    seen, honest = [], checkpoint.checkpoint

    def watched(*args, **kw):
        seen.append(1)
        return honest(*args, **kw)

    plain, saving = run(), None
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and getattr(module, "checkpoint", None) is honest:
            monkeypatch.setattr(module, "checkpoint", watched)
    monkeypatch.setattr(checkpoint, "checkpoint", watched)
    saving = run(gradient_checkpointing=True)
    # Three blocks in each of the steps.
    assert len(seen) == 3 * QUICK["steps"]
    assert not saving.model.is_gradient_checkpointing
    assert plain.trace[-1]["loss"] == pytest.approx(saving.trace[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "maskprune"}, "learned masks cut it at the end.*--method"),
        ({"method": "auto", "reach": 0.3}, "learned masks cut it at the end"),
        ({"shard": "full"}, "--shard none"),
        ({"lora_r": 4}, "lora_r of adapters"),
        ({"lora_targets": "q_proj,v_proj"}, "lora_targets of adapters"),
        ({"train": "all"}, "expected one of adapters, weights"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**(QUICK | changes))


def test_the_rate_follows_what_is_trained():
    of_weights = PruneConfig(train="weights", steps=100)
    assert of_weights.rate(128) == pytest.approx(4 * of_weights.rate(512))
    assert PruneConfig(steps=100).rate(128) == PruneConfig(steps=100).rate(512) == 1e-3
    assert PruneConfig(steps=100, train="weights", learning_rate=0.5).rate(64) == 0.5
