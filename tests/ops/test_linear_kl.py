"""ops.linear_kl: the KL of two models' next-token distributions, in chunks of tokens."""

import itertools
import sys

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from maskprune import ops

module = sys.modules["maskprune.ops.linear_kl"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIRECTIONS = module.KL_DIRECTIONS
# tokens, hidden size, vocabulary, chunk
SIZES = ((1, 1, 1, 1), (1, 5, 7, 3), (7, 3, 63, 2), (100, 16, 101, 33), (64, 8, 50, 64))


def tensors(n, d, vocabulary, dtype=torch.float64, seed=0):
    """Hidden states of student and teacher, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (n, d), (vocabulary, d), (vocabulary,))
    s, t, W, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(DEVICE, dtype) for x in (s.requires_grad_(), t, W, b))


def run(function, s, *args, **options):
    """Loss, and its gradient with respect to the student's hidden states."""
    s = s.detach().clone().requires_grad_()
    loss = function(s, *args, **options)
    (gradient,) = torch.autograd.grad(loss, s)
    return loss.detach(), gradient


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_is_the_kl_of_the_softmax_of_the_capped_scaled_logits(direction):
    s, t, W, b = tensors(3, 4, 5)
    p, q = ((0.5 * (h @ W.T + b) / 2).tanh().mul(2).softmax(-1) for h in (s, t))
    p, q = (q, p) if direction == "student_teacher" else (p, q)
    expected = functional.kl_div(p.log(), q, reduction="batchmean")
    for function in (ops.linear_kl, module.reference):
        got = function(s, t, W, b, scale=0.5, softcap=2.0, direction=direction)
        torch.testing.assert_close(got, expected)


def test_equal_models_have_no_loss_and_no_gradient():
    s, _, W, b = tensors(9, 4, 11, torch.float32)
    loss, gradient = run(ops.linear_kl, s, s, W, b)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("n, d, vocabulary, chunk", SIZES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_and_gradient_equal_the_definition(n, d, vocabulary, chunk, direction):
    s, t, W, b = tensors(n, d, vocabulary)
    for bias, scale, softcap in itertools.product((None, b), (1.0, 0.25), (None, 3.0)):
        options = dict(scale=scale, softcap=softcap, direction=direction)
        expected = run(module.reference, s, t, W, bias, **options)
        got = run(ops.linear_kl, s, t, W, bias, chunk=chunk, **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.5, 2.0)])
def test_gradcheck(direction, scale, softcap):
    s, t, W, b = tensors(5, 3, 7)

    def loss(s):
        return ops.linear_kl(s, t, W, b, scale=scale, softcap=softcap, direction=direction, chunk=2)

    assert gradcheck(loss, s)


@pytest.mark.parametrize("n, d, vocabulary, chunk", SIZES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mixture_with_the_cross_entropy_equals_the_definition(n, d, vocabulary, chunk, direction):
    s, t, W, b = tensors(n, d, vocabulary)
    g = torch.Generator().manual_seed(1)
    some = torch.randint(-vocabulary, vocabulary, (n,), generator=g).to(DEVICE)
    for targets in (some, some.abs() % vocabulary, torch.full_like(some, -1)):
        for weight, (bias, scale, softcap) in itertools.product(
            (0.0, 0.3, 1.0), ((None, 1.0, None), (b, 0.25, 3.0))
        ):
            options = dict(scale=scale, softcap=softcap, direction=direction)
            results = []
            for function in (module.distillation_reference, ops.linear_distillation):
                x = s.detach().clone().requires_grad_()
                more = {"chunk": chunk} if function is ops.linear_distillation else {}
                loss, kl, lm = function(x, t, W, targets, weight, bias, **options, **more)
                (gradient,) = torch.autograd.grad(loss, x)
                results.append((loss.detach(), kl.detach(), lm.detach(), gradient))
                if more:
                    assert not kl.requires_grad and not lm.requires_grad
            torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "targets, weight, error, message",
    [
        (torch.zeros(4, dtype=torch.int64), 0.5, ValueError, r"are \(4,\); expected \(5,\)"),
        (torch.zeros(5), 0.5, TypeError, "are torch.float32; expected torch.int64"),
        (torch.zeros(5, dtype=torch.int64), 1.5, ValueError, "lm_weight is 1.5; expected a share"),
    ],
)
def test_bad_targets_are_named(targets, weight, error, message):
    with pytest.raises(error, match=message):
        ops.linear_distillation(
            torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(7, 3), targets, weight
        )


def test_leading_axes_are_tokens():
    s, t, W, _ = tensors(12, 3, 7)
    loss, gradient = run(ops.linear_kl, s, t, W)
    cube, cube_gradient = run(ops.linear_kl, s.view(2, 6, 3), t.view(2, 6, 3), W)
    assert torch.equal(loss, cube) and torch.equal(gradient, cube_gradient.view(12, 3))
    strided = ops.linear_kl(s.view(2, 6, 3)[:, :-1], t.view(2, 6, 3)[:, :-1], W)
    picked = s.view(2, 6, 3)[:, :-1].reshape(-1, 3), t.view(2, 6, 3)[:, :-1].reshape(-1, 3)
    assert torch.equal(strided, ops.linear_kl(*picked, W))
    assert torch.equal(ops.linear_kl(s[0], t[0], W), ops.linear_kl(s[:1], t[:1], W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_error_is_at_most_twice_that_of_whole_logits(dtype, direction):
    s, t, W, b = tensors(100, 16, 101, dtype)
    expected = run(module.reference, *(x.double() for x in (s, t, W, b)), direction=direction)
    plain = run(module.reference, s, t, W, b, direction=direction)
    got = run(ops.linear_kl, s, t, W, b, direction=direction, chunk=33)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    ulp = torch.finfo(dtype).eps
    for name, exact, theirs, ours in zip(("loss", "gradient"), expected, plain, got, strict=True):
        error, allowed = (float((x.double() - exact).abs().max()) for x in (ours, theirs))
        assert error <= 2 * allowed + ulp * float(exact.abs().max()), name


def test_a_scaled_loss_keeps_gradients_that_float16_would_lose():
    s, t, W, _ = tensors(4096, 4, 1001, torch.float16)
    t = s.detach() + 0.3 * t
    exact = run(module.reference, s.double(), t.double(), W.double())[1]
    _, gradient = run(lambda *a: 2.0**14 * ops.linear_kl(*a), s, t, W)
    assert (gradient.double() / 2.0**14 - exact).norm() < 0.01 * exact.norm()


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    s, t, W, b = tensors(20, 8, 31, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradient = run(ops.linear_kl, s, t, W, b)
    lower = [x.bfloat16() for x in (s, t, W, b)]
    expected, lower_gradient = run(ops.linear_kl, *lower)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    assert torch.equal(gradient, lower_gradient.float())
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = ops.linear_kl(s.bfloat16(), t, W, b)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_compiles_as_one_graph(softcap):
    s, t, W, b = tensors(20, 8, 31, torch.float32)

    def loss(s, t):
        return 3 * ops.linear_kl(2 * s, t, W, b, softcap=softcap, chunk=7)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s.detach(), t), loss(s.detach(), t))
    for got, expected in zip(run(compiled, s, t), run(loss, s, t), strict=True):
        assert torch.equal(got, expected)


def test_opcheck():
    s, t, W, b = tensors(5, 3, 7, torch.float32)
    operation = torch.ops.maskprune.linear_kl
    for arguments in (
        (s, t, W, b, 0.5, 2.0, True, 2, True, None, 0.0),
        (s.detach(), t, W, None, 1.0, None, False, 64, False, None, 0.0),
        (s, t, W, None, 1.0, None, False, 2, True, torch.arange(5, device=DEVICE) - 1, 0.3),
    ):
        torch.library.opcheck(operation.default, arguments)


def test_gradients_of_micro_batches_add_up():
    s, t, W, _ = tensors(12, 3, 7)
    _, whole = run(ops.linear_kl, s, t, W)
    s = s.detach().requires_grad_()
    for rows in (slice(0, 6), slice(6, 12)):
        (ops.linear_kl(s[rows], t[rows], W) / 2).backward()
    torch.testing.assert_close(s.grad, whole)


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused():
    s, t, W, _ = tensors(5, 3, 7)
    loss = ops.linear_kl(s, t, W)
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    (second,) = torch.autograd.grad(loss, s, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, s, create_graph=True)


@pytest.mark.parametrize("targets, lm_weight", [(None, 0.0), (torch.arange(3), 0.3)])
def test_the_definition_of_the_mixture_is_the_text_book_s(targets, lm_weight):
    s, t, W, b = tensors(3, 4, 5)
    targets = torch.tensor([4, -1, 2], device=DEVICE) if targets is None else targets.to(DEVICE)
    p, q = ((h @ W.T + b).softmax(-1) for h in (s, t))
    kl = (q * (q / p).log()).sum(-1).mean()
    counted = [i for i in range(3) if targets[i] >= 0]
    lm = -torch.stack([p[i, targets[i]].log() for i in counted]).mean()
    for function in (module.distillation_reference, ops.linear_distillation):
        got = function(s, t, W, targets, lm_weight, b)
        torch.testing.assert_close(got, ((1 - lm_weight) * kl + lm_weight * lm, kl, lm))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    s, t, W, _ = tensors(200, 4, 300, torch.float32)
    with Largest() as seen:
        module._forward(s.detach(), t, W, None, 1.0, None, False, 10, True)
    assert seen.elements == 10 * 300
    with Largest() as seen:
        run(module.reference, s, t, W)
    assert seen.elements == 200 * 300


class Chunks(TorchDispatchMode):
    """The memory of all tensors of so many elements that operations returned; none is freed."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.kept = elements, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() == self.elements:
                self.kept[x.untyped_storage().data_ptr()] = x
        return out


@pytest.mark.parametrize("targets", [None, torch.arange(200) - 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_chunks_compute_in_the_same_memory(reverse, targets):
    s, t, W, _ = tensors(200, 4, 300, torch.float32)
    targets = targets if targets is None else targets.to(DEVICE)
    with Chunks(10 * 300) as seen:
        module._forward(s.detach(), t, W, None, 1.0, None, reverse, 10, True, targets, 0.3)
    assert len(seen.kept) == 3


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"teacher_hidden": torch.zeros(3, 3)}, ValueError, r"teacher_hidden \(3, 3\)"),
        ({"weight": torch.zeros(7, 4)}, ValueError, r"weight \(7, 4\); expected \(..., d\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias is \(6,\); expected \(7,\)"),
        ({"weight": torch.zeros(7, 3).half()}, TypeError, "weight torch.float16"),
        ({"weight": torch.zeros(7, 3, requires_grad=True)}, ValueError, "weight.detach()"),
        ({"direction": "sideways"}, ValueError, "kl_direction is 'sideways'"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; expected more than 0"),
        ({"chunk": 0}, ValueError, "chunk is 0; expected at least 1"),
        (
            {"student_hidden": torch.zeros(0, 3), "teacher_hidden": torch.zeros(0, 3)},
            ValueError,
            "expected some tokens",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    good = dict(
        student_hidden=torch.zeros(5, 3), teacher_hidden=torch.zeros(5, 3), weight=torch.zeros(7, 3)
    )
    given = good | changes
    targets = torch.zeros(len(given["student_hidden"]), dtype=torch.int64)
    mixture = {"targets": targets, "lm_weight": 0.3}
    for name, further in (("linear_kl", {}), ("linear_distillation", mixture)):
        own = "" if "kl_direction" in message else f"{name}: .*"
        with pytest.raises(error, match=own + message):
            getattr(ops, name)(**given, **further)
