"""Losses from hidden states equal those from whole logits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from maskprune.hf.head import Head
from maskprune.ops import linear_kl
from maskprune.training import losses
from maskprune.training.losses import hidden_cross_entropy, hidden_kl, token_kl

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def case(dtype=torch.float32, bias=True, **head):
    """A frozen head, hidden states of two models, targets: more tokens than a chunk of 64."""
    torch.manual_seed(0)
    module = nn.Linear(16, 101, bias=bias, dtype=dtype).requires_grad_(False)
    h = torch.randn(2, 150, 16).to(dtype)
    return Head(module, **head), h[0].requires_grad_(), h[1], torch.randint(101, (150,))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "rows_at_once", lambda *_: 64)


@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"bias": False}])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("torchs_own", [True, False])
def test_cross_entropy_equals_that_of_whole_logits(head, dtype, autocast, torchs_own, monkeypatch):
    if not torchs_own:
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    head, h, _, y = case(dtype, **head)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = functional.cross_entropy(head(h).float(), y)
        got = hidden_cross_entropy(head, h, y)
    assert got.dtype == torch.float32
    (want,), (grad,) = torch.autograd.grad(expected, h), torch.autograd.grad(got, h)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_cross_entropy_trains_a_head_that_is_not_frozen():
    head, h, _, y = case()
    head.module.requires_grad_(True)
    want = torch.autograd.grad(functional.cross_entropy(head(h), y), head.module.parameters())
    got = torch.autograd.grad(hidden_cross_entropy(head, h, y), head.module.parameters())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"softcap": 2.0}, {"bias": False}])
def test_kl_of_hidden_states_equals_that_of_whole_logits(head, direction):
    head, s, t, _ = case(**head)
    expected = token_kl(head(s), head(t), direction)
    got = hidden_kl(head, s, t, direction)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s)[0] for loss in (got, expected)))
    assert got.equal(
        linear_kl(
            s,
            t,
            head.module.weight,
            head.module.bias,
            scale=head.scale,
            softcap=head.softcap,
            direction=direction,
        )
    )


def test_kl_of_a_head_with_hooks_runs_the_head_in_the_mode_of_each_model():
    head, s, t, _ = case()
    expected = token_kl(head(s), 2 * head(t))
    doubled = head.module.register_forward_hook(lambda m, a, out: factor * out)
    factor = 1

    @contextlib.contextmanager
    def as_teacher():
        nonlocal factor
        factor = 2
        yield
        factor = 1

    torch.testing.assert_close(hidden_kl(head, s, t, as_teacher=as_teacher), expected)
    doubled.remove()
