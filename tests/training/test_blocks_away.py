"""Calibration block by block: one block is away at a time, and all come home."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from calibration_jobs import (
    CPU,
    JOBS,
    TRAVELS,
    adapted,
    bits,
    require_equal,
    stock,
    subject,
    three_batches,
    work,
)
from models import tokens
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from maskprune.hf.families import FAMILIES, ffn_output, layers_of, stock_model
from maskprune.hf.head import head_of
from maskprune.training import layer_by_layer
from maskprune.training.layer_by_layer import Walk, lent
from maskprune.two_four import one_shot_masks


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    three_batches(monkeypatch)


class Watch:
    """Where each tensor of a model is: at home, or in a copy that `place` made."""

    def __init__(self, model, monkeypatch):
        base = stock_model(model)
        self.layers = layers_of(model)
        self.owner = {}
        for index, layer in enumerate(self.layers):
            self.owner |= {id(t): index for t in (*layer.parameters(), *layer.buffers())}
        self.tensors = [*base.parameters(), *base.buffers()]
        self.homes = {id(t): t.data_ptr() for t in self.tensors}
        self.where = {t.data_ptr(): self.owner.get(id(t), "around") for t in self.tensors}
        self.travelled, self.copies, self.most = [], [], 0
        self.seen = []
        monkeypatch.setattr(layer_by_layer, "place", self.place)
        for index, layer in enumerate(self.layers):
            module = ffn_output(layer, FAMILIES[base.config.model_type])
            module.register_forward_pre_hook(lambda *_, index=index: self.see(index))
        head_of(model).module.register_forward_pre_hook(lambda *_: self.see("head"))

    def place(self, tensor, device):
        self.travelled.append(self.where[tensor.data_ptr()])
        copy = tensor.to(device, copy=True)
        self.copies.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        self.copies = [(ref, size) for ref, size in self.copies if not ref.expired()]
        self.most = max(self.most, sum(size for _, size in self.copies))
        return copy

    def away(self):
        return {
            self.owner.get(id(t), "around")
            for t in self.tensors
            if t.numel() and t.data_ptr() != self.homes[id(t)]
        }

    def see(self, what):
        away = self.away()
        # Only to learn what a block returns is one there together with what is around the blocks.
        assert away in ({what}, {"around"} if what == "head" else {"around", 0})
        for t in self.tensors:
            if t.numel() and self.owner.get(id(t), "around") in away:
                assert t.data_ptr() != self.homes[id(t)], "part of it stayed at home"
        self.seen.append((what, away))

    def bytes_of(self, *parts):
        return sum(t.nbytes for t in self.tensors if self.owner.get(id(t), "around") in parts)

    def require_home(self):
        assert not self.away()
        assert all(ref.expired() for ref, _ in self.copies), "a copy outlives its turn"


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
@pytest.mark.parametrize("job", JOBS)
def test_one_block_is_away_at_a_time_and_travels_once_a_pass(job, family, monkeypatch):
    model, masks = subject(job, family, **({} if family == "gpt_neo" else {"num_hidden_layers": 4}))
    watch = Watch(model, monkeypatch)
    work(job, model, masks, CPU)
    watch.require_home()
    owners = [watch.owner.get(id(t)) for t in watch.tensors]
    sizes = {index: owners.count(index) for index in range(len(watch.layers))}
    # Walks: one, and another where the ranking's sums come first.
    walks = 1 + (job == "compensate on both")
    for index, size in sizes.items():
        extra = index == 0
        assert watch.travelled.count(index) == size * (TRAVELS[job] + extra) * walks
    # What is around the blocks: before the first one, and for the logits where there is a loss.
    walked = walks + job.startswith("taylor")
    assert watch.travelled.count("around") == owners.count(None) * walked
    assert watch.most <= watch.bytes_of("around", 0)
    alone = [what for what, away in watch.seen if away == {what}]
    assert all(alone.count(index) >= 3 for index in sizes), "batches did not run in their turn"


def test_a_pass_that_brought_weights_for_every_batch_would_be_seen(monkeypatch):
    model = stock()
    watch = Watch(model, monkeypatch)
    walk = Walk(model, tokens(5, 20).split(2), CPU)
    with torch.no_grad(), walk.turn(0), walk.turn(1), pytest.raises(AssertionError):
        walk.run(0, replace=True)
    watch.require_home()


@pytest.mark.parametrize("job", JOBS)
def test_parameters_are_the_same_objects_in_the_same_memory(job):
    model, masks = subject(job)
    before = [(t, t.data_ptr(), t.requires_grad) for t in model.parameters()]
    values = bits(model)
    work(job, model, masks, CPU)
    after = list(model.parameters())
    assert all(p is q for (p, _, _), q in zip(before, after, strict=True))
    assert [(p.data_ptr(), p.requires_grad) for p in after] == [b[1:] for b in before]
    assert all(p.grad is None for p in after)
    if job in ("wanda", "sparsegpt", "wanda_sp", "taylor", "taylor per sequence"):
        require_equal(bits(model), values)


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


def break_in(where, model, monkeypatch):
    second = layers_of(model)[1]
    if where == "in the second block":
        second.register_forward_hook(fail)
    elif where == "at the head":
        head_of(model).module.register_forward_hook(fail)
    else:
        place, fourth = layer_by_layer.place, list(second.parameters())[3].data_ptr()

        def broken(tensor, device):
            return fail() if tensor.data_ptr() == fourth else place(tensor, device)

        monkeypatch.setattr(layer_by_layer, "place", broken)


@pytest.mark.parametrize("where", ["in the second block", "while it travels", "at the head"])
@pytest.mark.parametrize("job", JOBS)
def test_an_error_brings_all_home(job, where, monkeypatch):
    if where == "at the head" and not job.startswith("taylor"):
        pytest.skip("it does not get there")
    model, masks = subject(job)
    before, trained = bits(model), [p.requires_grad for p in model.parameters()]
    watch = Watch(model, monkeypatch)
    break_in(where, model, monkeypatch)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(Broken):
        work(job, model, masks, CPU)
    gc.collect()
    watch.require_home()
    # What updates weights has finished the first block.
    now, finished = bits(model), job in ("sparsegpt, updating", "compensate")
    same = {name: torch.equal(now[name], before[name]) for name in before}
    assert all(same.values()) is not finished
    assert all(same[name] for name in same if ".0." not in name)
    assert all("forward" not in vars(layer) for layer in watch.layers)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not model.training and (masks is None or masks.enabled)


def test_what_is_kept_comes_home_and_nothing_else_does():
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    homes = a.data_ptr(), b.data_ptr()
    with torch.no_grad(), lent([a, b], CPU, keep=[a]):
        a.fill_(1)
        b.fill_(1)
        assert (a.data_ptr(), b.data_ptr()) != homes
    assert (a.data_ptr(), b.data_ptr()) == homes
    assert a.tolist() == [1, 1, 1] and b.tolist() == [0, 0, 0]
    with contextlib.suppress(KeyError), torch.no_grad(), lent([a], CPU, keep=[a]):
        a.fill_(2)
        raise KeyError
    assert a.tolist() == [1, 1, 1]


def test_autocast_forgets_what_it_cast_of_weights_that_are_home_again():
    w, x = torch.nn.Parameter(torch.zeros(2, 2)), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with lent([w], CPU):
            with torch.no_grad():
                w.fill_(1)
            assert functional.linear(x, w).tolist() == [[2, 2]]
        assert functional.linear(x, w).tolist() == [[0, 0]]


def test_a_block_s_own_forward_is_put_back():
    model = stock()
    first = layers_of(model)[0]
    own = first.forward
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    first.forward = counted
    expected = one_shot_masks(stock(), "wanda", tokens(5, 20))
    require_equal(one_shot_masks(model, "wanda", tokens(5, 20), device=CPU), expected)
    assert vars(first)["forward"] is counted and calls


def test_taylor_keeps_no_activation_of_a_block_alive():
    model, masks = adapted()
    alive, most = [], 0

    def note(module, args):
        nonlocal most
        alive.append(weakref.ref(args[0]))
        gc.collect()
        most = max(most, sum(x() is not None for x in alive))

    for layer in layers_of(model):
        ffn_output(layer, FAMILIES["llama"]).register_forward_pre_hook(note)
    work("taylor", model, masks, CPU)
    gc.collect()
    # Twelve runs of W_down, each batch's graph gone before the next one's.
    assert len(alive) == 13 and most == 1
    assert not any(x() is not None for x in alive)
