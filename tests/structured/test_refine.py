"""Blocks that learn the dense block's output: what is trained, by what, and what it is worth."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import tiny_model, tokens
from short_runs import SHORT, data
from transformers import TrainerCallback

from maskprune.config import PruneConfig
from maskprune.hf.families import layers_of
from maskprune.structured.prune import prune
from maskprune.structured.refine import refine

DENSE = contextlib.nullcontext
FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt", "gpt2"]
QUICK = SHORT | dict(method="taylor", refine_passes=4, lm_weight=0.0)


@contextlib.contextmanager
def no_grad(model):
    with torch.no_grad():
        yield


def pair(family="llama"):
    """A dense model, and a student whose linears are its own with noise."""
    teacher = tiny_model(family, num_hidden_layers=3).requires_grad_(False)
    student = tiny_model(family, num_hidden_layers=3).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for layer in layers_of(student):
        for p in layer.parameters():
            if p.dim() == 2:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator))
        layer.requires_grad_(True)
    return student, teacher


def refined(student, teacher, passes=4, batch_size=4, rate=3e-3, blocks=None, **given):
    return refine(
        student,
        teacher,
        lambda: no_grad(teacher),
        data(16) if blocks is None else blocks,
        passes=passes,
        learning_rate=rate,
        batch_size=batch_size,
        **given,
    )


def apart(model, dense, ids):
    """Mean KL of the dense model's next tokens to the model's."""
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, dense))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def hidden_states(model, ids):
    """What enters each block, and what leaves the last."""
    seen = []

    def see(module, args, kwargs, out=None):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    layers = layers_of(model)
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).detach())
        )
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_comes_nearer_the_dense_one_and_so_does_the_whole(family):
    student, teacher = pair(family)
    kept = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    dense = {n: p.clone() for n, p in teacher.named_parameters()}
    unread = tokens(8, 16, 5)
    before = apart(student, teacher, unread)
    first = refined(pair(family)[0], teacher, passes=1, rate=1e-12)
    losses = refined(student, teacher, passes=20)
    assert all(b < 0.8 * a for a, b in zip(first, losses, strict=True))
    assert apart(student, teacher, unread) < 0.9 * before
    assert all(torch.equal(dict(student.named_parameters())[n], p) for n, p in kept.items())
    assert all(torch.equal(dict(teacher.named_parameters())[n], p) for n, p in dense.items())
    assert all(p.grad is None for p in student.parameters()) and student.training is False


def test_the_loss_is_the_distance_of_the_outputs_over_what_the_dense_block_adds():
    student, teacher = pair()
    ids = data(8)
    # At a rate that moves nothing the reported loss is that of the student as it is.
    losses = refined(student, teacher, passes=1, rate=1e-12, blocks=ids)
    ours, theirs = hidden_states(student, ids), hidden_states(teacher, ids)
    for i, loss in enumerate(losses):
        size = theirs[i + 1].square().sum(-1)
        off = ((ours[i + 1] - theirs[i + 1]).square().sum(-1) / size).sum()
        added = ((theirs[i] - theirs[i + 1]).square().sum(-1) / size).sum()
        assert loss == pytest.approx(float(off / added), rel=1e-4)


def test_it_learns_under_autocast():
    losses = []
    for passes, rate in ((1, 1e-12), (20, 3e-3)):
        student, teacher = pair()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(refined(student, teacher, passes=passes, rate=rate))
    assert all(b < 0.8 * a for a, b in zip(*losses, strict=True))


def test_a_student_that_is_the_teacher_is_left_as_it_is():
    teacher = tiny_model("llama", num_hidden_layers=3).requires_grad_(False)
    student = tiny_model("llama", num_hidden_layers=3)
    assert refined(student, teacher) == [0.0, 0.0, 0.0]
    for a, b in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_repeats_to_the_bit_and_the_order_is_the_seeds():
    found = []
    for seed in (0, 0, 1):
        student, teacher = pair()
        refined(student, teacher, seed=seed)
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_one_block_of_text_and_an_incomplete_batch_do():
    student, teacher = pair()
    assert all(0 < loss < 100 for loss in refined(student, teacher, blocks=data(1)))
    assert all(0 < loss < 100 for loss in refined(student, teacher, blocks=data(7)))


def test_a_loss_that_is_not_finite_names_the_block():
    student, teacher = pair()
    with torch.no_grad():
        next(layers_of(student)[1].parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="block 1 diverged.*--refine-passes 0"):
        refined(student, teacher)


class Begin(TrainerCallback):
    """How far the model is from the dense one when its training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.apart = apart(model, tiny_model("llama", num_hidden_layers=3), data(40))


def run(tmp_path=None, resume=False, callbacks=(), **changes):
    config = PruneConfig(**(QUICK | changes))
    model = tiny_model("llama", num_hidden_layers=3)
    return prune(
        model, None, data(40), config, run_dir=tmp_path, resume=resume, quiet=True,
        callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_a_run_begins_its_training_nearer_the_dense_model(train):
    found = {}
    for passes in (0, 8):
        begin = Begin()
        given = dict(train=train, steps=20, compensation_tokens=640)
        run(refine_passes=passes, callbacks=[begin], **given)
        found[passes] = begin.apart
    assert found[8] < 0.8 * found[0]


@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_a_resumed_run_does_not_refine_again(tmp_path, train, monkeypatch):
    whole = run(train=train)

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train=train, save_steps=10, callbacks=[Killed()])
    monkeypatch.setattr("maskprune.structured.prune.refine", lambda *a, **k: pytest.fail("again"))
    again = run(tmp_path, train=train, save_steps=10, resume=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learned_masks_are_refined_once_they_have_settled(monkeypatch):
    seen = []

    def watched(student, *args, **kwargs):
        before = [p.clone() for p in masks_of(student)]
        losses = refine(student, *args, **kwargs)
        after = masks_of(student)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in after)
        return losses

    def masks_of(model):
        return [result["masks"].head.detach(), result["masks"].ffn.detach()]

    result = {}
    from maskprune.structured import prune as module

    attach = module.attach_masks

    def kept(*args, **kwargs):
        result["masks"] = attach(*args, **kwargs)
        return result["masks"]

    monkeypatch.setattr(module, "attach_masks", kept)
    monkeypatch.setattr(module, "refine", watched)
    found = run(method="maskprune", steps=40)
    assert seen == [True] and found.shape.ffn < 24


def test_without_the_compensation_it_is_refused():
    with pytest.raises(ValueError, match="refine_passes is 2 without the compensation"):
        PruneConfig(**(QUICK | dict(refine_passes=2, compensate=False)))
