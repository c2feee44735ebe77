"""Moments in eight bits: a fourth of the memory, and one clear line without their library."""

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
