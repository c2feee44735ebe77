"""Blocks that learn the dense block's output: what is trained, by what, and what it is worth."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from models import tiny_model, tokens
from short_runs import SHORT, data
from transformers import TrainerCallback

from maskprune.config import PruneConfig
from maskprune.hf.families import layers_of
from maskprune.structured.prune import prune
from maskprune.structured.refine import refine
from maskprune.training import layer_by_layer

DENSE = contextlib.nullcontext
FAMILIES = ["llama", "qwen2", "phi3", "gemma3", "gemma3_text", "gpt_neox", "opt", "gpt2"]
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
    assert all(b[1] < 0.8 * a[1] for a, b in zip(first, losses, strict=True))
    assert all(last < first for first, last in losses)
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
        assert loss == pytest.approx([float(off / added)] * 2, rel=1e-4)


def test_it_learns_under_autocast():
    losses = []
    for passes, rate in ((1, 1e-12), (20, 3e-3)):
        student, teacher = pair()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(refined(student, teacher, passes=passes, rate=rate))
    assert all(b[1] < 0.8 * a[1] for a, b in zip(*losses, strict=True))


def test_a_student_that_is_the_teacher_is_left_as_it_is():
    teacher = tiny_model("llama", num_hidden_layers=3).requires_grad_(False)
    student = tiny_model("llama", num_hidden_layers=3)
    assert refined(student, teacher) == [(0.0, 0.0)] * 3
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
    for blocks in (data(1), data(7)):
        assert all(0 < a < 100 and 0 < b < 100 for a, b in refined(student, teacher, blocks=blocks))


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_a_batch_in_parts_makes_the_same_steps(parts):
    (whole, teacher), (apart, _) = pair(), pair()
    losses = refined(whole, teacher)
    again = refined(apart, teacher, gradient_accumulation=parts)
    assert torch.tensor(again).allclose(torch.tensor(losses), rtol=1e-3)
    for a, b in zip(whole.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_block_with_nothing_to_train_is_passed_by():
    student, teacher = pair()
    for p in layers_of(student)[1].parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in layers_of(student)[1].parameters()]
    losses = refined(student, teacher, passes=20)
    assert losses[1][0] == losses[1][1] > 0 and losses[2][1] < losses[2][0]
    after = list(layers_of(student)[1].parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_dense_block_that_is_the_identity_is_learnt_too():
    student, teacher = pair()
    with torch.no_grad():
        for name, p in layers_of(teacher)[1].named_parameters():
            if name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                p.zero_()
    losses = refined(student, teacher, passes=20)
    assert losses[1][1] < 0.8 * losses[1][0]


def test_hidden_states_that_do_not_fit_go_to_the_host(monkeypatch):
    found = []
    for share in (layer_by_layer.STATES_SHARE, 0.0):
        monkeypatch.setattr(layer_by_layer, "STATES_SHARE", share)
        student, teacher = pair()
        refined(student, teacher)
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*found)


def test_a_dense_model_in_half_precision_teaches_weights_in_float32():
    student, teacher = pair()
    before, after = refined(pair()[0], teacher.bfloat16(), passes=1, rate=1e-12), None
    after = refined(student, teacher, passes=20)
    assert all(b[1] < 0.8 * a[1] for a, b in zip(before, after, strict=True))


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


@pytest.mark.parametrize(
    ("changes", "refined_by"),
    [
        (dict(train="adapters"), 10),
        (dict(train="weights"), 10),
        (dict(method="maskprune", reach=0.1), 10),
        (dict(method="maskprune", reach=0.8), 24),
        (dict(gradient_checkpointing=True, gradient_accumulation=2), 10),
    ],
)
def test_a_resumed_run_refines_once(tmp_path, changes, refined_by, monkeypatch):
    """Killed in step 15 it goes on from step 10."""
    whole = run(**changes)

    class Killed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, save_steps=10, callbacks=[Killed()], **changes)
    times = []

    def counted(*args, **kwargs):
        times.append(1)
        return refine(*args, **kwargs)

    monkeypatch.setattr("maskprune.structured.prune.refine", counted)
    again = run(tmp_path, save_steps=10, resume=True, **changes)
    assert len(times) == (refined_by > 10)
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


def test_a_model_spread_over_processes_is_refused():
    with pytest.raises(ValueError, match="refine_passes is 4.*shard is full.*--refine-passes 0"):
        PruneConfig(**(QUICK | dict(shard="full")))


@pytest.mark.parametrize("sample", [4, 30])
def test_it_reads_the_text_that_the_compensation_read(monkeypatch, sample):
    """That of the ranking too, where its pass summed what the compensation needs."""
    read = {}

    def watched(student, teacher, teaching, blocks, **kwargs):
        read["refined"] = len(blocks)
        return refine(student, teacher, teaching, blocks, **kwargs)

    monkeypatch.setattr("maskprune.structured.prune.refine", watched)
    run(warm_start_blocks=sample, compensation_tokens=160, refine_passes=1, steps=20)
    assert read["refined"] == max(sample, 10)


def test_a_run_says_how_near_the_blocks_came(capsys):
    config = PruneConfig(**(QUICK | dict(steps=20)))
    prune(tiny_model("llama"), None, data(40), config)
    said = capsys.readouterr().err
    found = re.search(
        r"distance from the dense ones (\S+) in the first pass, (\S+) at the end", said
    )
    assert 0 < float(found[2]) <= float(found[1])
