"""Moments in eight bits: a fourth of the memory, and one clear line without their library. Groups
whose parameters share one second moment."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from models import tiny_model
from rank_jobs import blocks

from maskprune.config import PruneConfig, SparsifyConfig
from maskprune.structured.prune import prune
from maskprune.training.optimizer import adamw
from maskprune.two_four.sparsify import sparsify

SETTINGS = dict(
    steps=20, batch_size=4, seq_len=16, autocast="none", optimizer_bits=8, save_steps=10
)


def test_eight_bits_without_their_library_are_refused_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r'needs torchao.*pip install "maskprune\[eight-bit\]"'):
        prune(model, None, blocks(), PruneConfig(sparsity=0.3, **SETTINGS), run_dir=tmp_path)
    with pytest.raises(ValueError, match="needs torchao"):
        sparsify(model, None, blocks(), SparsifyConfig(**SETTINGS), run_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="optimizer_bits is 4; expected 8 or 32"):
        PruneConfig(sparsity=0.3, optimizer_bits=4)


@pytest.fixture
def torchao():
    """torchao without its compilation, which takes longer than what is tested."""
    pytest.importorskip("torchao", exc_type=ImportError)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_moments_of_eight_bits_learn_as_those_of_32(torchao):
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(64, 64, generator=generator)
    found = {}
    for bits in (32, 8):
        weight = torch.nn.Parameter(torch.zeros_like(goal))
        optimizer = adamw([weight], bits, lr=0.05, weight_decay=0.0)
        for _ in range(200):
            (weight - goal).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[bits] = (weight - goal).abs().mean().item()
        moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        if bits == 8:
            assert all(moment.codes.dtype == torch.uint8 for moment in moments)
    assert found[32] < 0.05 and found[8] < 0.1


def test_a_run_with_eight_bits_resumes_to_the_bit(torchao, tmp_path):
    def run(resume):
        torch.manual_seed(0)
        model = tiny_model("llama", hidden_size=64, num_attention_heads=8)
        return sparsify(
            model, None, blocks(), SparsifyConfig(**SETTINGS), run_dir=tmp_path, resume=resume
        )

    whole = run(False)
    shutil.rmtree(tmp_path / "checkpoint-20")
    again = run(True)
    assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
    last, as_before = ({**row, "tokens_per_s": 0} for row in (again.trace[-1], whole.trace[-1]))
    assert last == as_before and last["step"] == 20


GRADIENTS = [torch.tensor([[1.0, 2.0, 0.0], [0.0, -4.0, 0.0]]), torch.full((2, 3), -0.5)]


def steps(bits=32, mini=True, lr=0.5, shape=(2, 3)):
    """A tensor after a step on each of GRADIENTS, beside one that AdamW trains."""
    p, other = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer = adamw([{"params": [other]}, {"params": [p], "mini": mini}], bits, lr=lr)
    for gradient in GRADIENTS:
        p.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    return p.detach(), other.detach(), optimizer


def test_one_scale_serves_a_whole_tensor():
    one, two = GRADIENTS
    m1, v1 = 0.1 * one, 1e-3 * one.square().mean()
    m2, v2 = 0.9 * m1 + 0.1 * two, 0.999 * v1 + 1e-3 * two.square().mean()
    want = 1 - 0.5 * (m1 / 0.1) / (v1 / 1e-3).sqrt()
    want -= 0.5 * (m2 / (1 - 0.9**2)) / (v2 / (1 - 0.999**2)).sqrt()
    p, other, _ = steps()
    torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)
    # The first step is as the gradient; Adam's has its signs alone.
    alone, _, _ = steps(mini=False)
    assert torch.equal(alone, other) and not torch.allclose(p, other)


def test_a_tensor_of_one_number_is_trained_as_by_adam():
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    ours, adam = adamw([{"params": [p], "mini": True}], 32, lr=0.1), torch.optim.Adam([q], 0.1)
    for gradient in (0.3, -2.0, 5.0):
        p.grad, q.grad = torch.tensor([gradient]), torch.tensor([gradient])
        ours.step()
        adam.step()
    torch.testing.assert_close(p, q)


def test_one_scale_beside_eight_bits(torchao):
    torch.testing.assert_close(steps(8)[0], steps(32)[0])


def test_parameters_without_numbers_or_gradients_are_left_alone():
    empty, idle = torch.nn.Parameter(torch.ones(0, 0)), torch.nn.Parameter(torch.ones(3))
    empty.grad = torch.ones(0, 0)
    optimizer = adamw([{"params": [empty, idle], "mini": True}], 32)
    optimizer.step()
    assert torch.equal(idle, torch.ones(3)) and not optimizer.state


def test_the_state_is_saved_and_loaded():
    p, _, optimizer = steps()
    _, _, again = steps(shape=(2, 3), lr=0.0)
    again.load_state_dict(optimizer.state_dict())
    state, loaded = (o.state[o.param_groups[1]["params"][0]] for o in (optimizer, again))
    assert state.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert again.param_groups[1]["mini"] and loaded["exp_avg_sq"].shape == ()
