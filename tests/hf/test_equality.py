"""The comparison of two models' logits: exact, and never with a whole tensor of them."""

from __future__ import annotations

import math

import pytest
import torch
from models import VOCAB, tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BloomConfig

from maskprune.hf import equality
from maskprune.hf.equality import compare_logits, require_equal
from maskprune.hf.families import FAMILIES


def expected(a, b, ids):
    """Largest difference, largest logit, agreement, from whole logits."""
    with torch.no_grad():
        x, y = (model(ids).logits.double() for model in (a, b))
    agree = (x.argmax(-1) == y.argmax(-1)).double().mean()
    return float((x - y).abs().max()), float(x.abs().max()), float(agree)


def bloom(seed):
    torch.manual_seed(seed)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "a family that is not in the table"])
def test_slices_give_what_whole_logits_give(family, monkeypatch):
    monkeypatch.setattr(equality, "TOKENS_AT_ONCE", 7)
    make = (lambda seed: tiny_model(family, seed)) if family in FAMILIES else bloom
    a, b, ids = make(0), make(1), tokens(3, 20)
    a.train()
    difference = compare_logits(a, b, ids)
    assert a.training and not b.training
    a.eval()
    got = (difference.largest, difference.largest_logit, difference.top1_agreement)
    assert got == pytest.approx(expected(a, b, ids), rel=1e-5)
    same = compare_logits(a, a, ids)
    assert same.largest == 0 and same.top1_agreement == 1


class LargestLogits(TorchDispatchMode):
    """Elements of the largest tensor over the vocabulary that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == 4096:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(equality, "TOKENS_AT_ONCE", 40)
    models = [tiny_model("llama", seed, vocab_size=4096) for seed in (0, 1)]
    with LargestLogits() as seen:
        compare_logits(*models, tokens(3, 60))
    assert seen.elements == 40 * 4096


def test_a_nan_logit_is_never_equal():
    a, b = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        b.lm_head.weight = torch.nn.Parameter(b.lm_head.weight.clone())
        b.lm_head.weight[5, 3] = math.nan
    difference = compare_logits(a, b, tokens())
    assert math.isnan(difference.largest)
    with pytest.raises(RuntimeError, match="differ"):
        require_equal(difference, torch.float32)
