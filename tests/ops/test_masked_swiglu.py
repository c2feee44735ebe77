"""ops.masked_swiglu: out = act(gate) * up * mask, the same laws on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from backends import DEVICE, available_isas, skip_without_extension
from torch.autograd import gradcheck

from maskprune import ops
from maskprune.ops.backend import extension

swiglu = sys.modules["maskprune.ops.masked_swiglu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = ((1, 1), (3, 7), (17, 63), (40, 100), (20, 1536), (2, 11008))
# Of torch's own error in the same dtype; the interpreter truncates to bfloat16 instead of rounding.
ERROR_BUDGET, TRUNCATION_BUDGET = 2.0, 4.0
# One unit in the last place of the largest value, where torch's own error happens to be zero.
FLOOR = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tensors(rows, width, dtype=torch.float32, seed=0, scale=3.0):
    """gate, up, dout (rows, width) and a mask with exact zeros and ones in it."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, dout = (
        (scale * torch.randn(rows, width, generator=generator)).to(dtype) for _ in range(3)
    )
    mask = torch.rand(width, generator=generator)
    mask[::3], mask[1::5] = 0.0, 1.0
    return tuple(x.to(DEVICE) for x in (gate, up, dout, mask))


def run(backend, gate, up, dout, mask, activation="silu"):
    """out, dgate, dup, dmask."""
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up, mask)]
    out = ops.masked_swiglu(*leaves, activation=activation, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def plain(gate, up, dout, mask, activation="silu"):
    """The unfused form that users write, in the dtype of gate, by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up, mask)]
    g, u, m = leaves
    f = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    out = (f * u) * m.to(g.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def partial_sum(gate, up, dout, mask, activation):
    """Four roundings at the size a sum over rows has on its way: the root of its sum of squares."""
    ones = torch.ones_like(mask).double()
    terms = swiglu.reference(gate.double(), up.double(), ones, activation) * dout.double()
    return terms.square().sum(0).max() ** 0.5 * 4


def within_budget(results, inputs, activation="silu", budget=ERROR_BUDGET):
    """Every result is no further from float64 than `budget` times plain torch."""
    exact = plain(*(x.double() for x in inputs), activation)
    usual = plain(*inputs, activation)
    for name, got, torchs, want in zip(
        ("out", "dgate", "dup", "dmask"), results, usual, exact, strict=True
    ):
        error, allowed = (got.double() - want).abs().max(), (torchs.double() - want).abs().max()
        size = want.abs().max() if name != "dmask" else partial_sum(*inputs, activation)
        floor = FLOOR[got.dtype] * size
        assert error <= max(budget * allowed, floor), f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize(
    "activation, gate, up, mask, expected",
    [
        ("silu", 0.0, 5.0, 1.0, 0.0),
        ("silu", 1.0, 2.0, 1.0, 1.4621171572600098),
        ("silu", -1.0, 2.0, 0.5, -0.2689414213699951),
        ("silu", 200.0, 1.0, 0.25, 50.0),
        ("silu", -200.0, 1.0, 1.0, 0.0),
        ("gelu_tanh", 1.0, 1.0, 1.0, 0.8411919906082768),
        ("gelu_tanh", -2.0, 1.0, 1.0, -0.04540230591222494),
        ("gelu_tanh", 50.0, 2.0, 0.5, 50.0),
    ],
)
def test_worked_examples(backend, activation, gate, up, mask, expected):
    g, u, m = (torch.tensor([[x]], device=DEVICE) for x in (gate, up, mask))
    out = ops.masked_swiglu(g, u, m[0], activation=activation, backend=backend)
    assert out.item() == pytest.approx(expected, rel=2e-6, abs=1e-30)


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", WIDTHS)
def test_is_as_near_to_float64_as_plain_torch(backend, dtype, rows, width, activation):
    inputs = tensors(rows, width, dtype)
    truncates = backend == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16
    budget = TRUNCATION_BUDGET if truncates else ERROR_BUDGET
    within_budget(run(backend, *inputs, activation), inputs, activation, budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_ones_is_no_mask(backend, dtype):
    gate, up, dout, mask = tensors(9, 65, dtype)
    ones = torch.ones_like(mask)
    within_budget(
        run(backend, gate, up, dout, ones),
        (gate, up, dout, ones),
        budget=TRUNCATION_BUDGET if backend == "triton" else ERROR_BUDGET,
    )
    if backend == "reference" and dtype == torch.float32:
        assert torch.equal(ops.masked_swiglu(gate, up, ones, backend=backend), F.silu(gate) * up)


def test_a_unit_with_mask_zero_gives_nothing_and_can_come_back(backend):
    gate, up, dout, mask = tensors(20, 30)
    out, dgate, dup, dmask = run(backend, gate, up, dout, mask)
    gone = mask == 0
    for result in (out, dgate, dup):
        assert not result[:, gone].any()
    assert (dmask[gone] != 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_agrees_with_the_unfused_form_to_its_roundings(backend, dtype):
    gate, up, _, mask = tensors(33, 257, dtype)
    fused = ops.masked_swiglu(gate, up, mask, backend=backend).double()
    unfused = ((F.silu(gate) * up) * mask.to(dtype)).double()
    bound = 1e-6 if dtype == torch.float32 else 6 * 2.0**-8
    assert ((fused - unfused).abs() <= bound * unfused.abs() + 1e-30).all()


def test_gradcheck_of_the_reference_in_float64():
    gate, up, _, mask = (x.double().requires_grad_() for x in tensors(3, 5))
    for activation in swiglu.ACTIVATIONS:
        assert gradcheck(
            lambda *x, a=activation: ops.masked_swiglu(*x, activation=a, backend="reference"),
            (gate, up, mask),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_the_written_gradients_are_those_of_autograd(dtype, activation):
    gate, up, dout, mask = tensors(6, 11, dtype)
    leaves = [x.clone().requires_grad_() for x in (gate, up, mask)]
    out = swiglu.reference(*leaves, activation)
    by_autograd = torch.autograd.grad(out, leaves, dout)
    for name, a, b in zip(
        ("dgate", "dup", "dmask"),
        swiglu.reference_backward(dout, gate, up, mask, activation),
        by_autograd,
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_an_empty_batch_gives_zero_gradients(backend, shape):
    gate = torch.zeros(shape, device=DEVICE, requires_grad=True)
    mask = torch.ones(shape[-1], device=DEVICE, requires_grad=True)
    out = ops.masked_swiglu(gate, gate.detach(), mask, backend=backend)
    out.sum().backward()
    assert out.shape == shape and gate.grad.shape == shape
    assert torch.equal(mask.grad, torch.zeros_like(mask))


def test_any_strides_give_the_contiguous_result(backend):
    gate, up, dout, mask = tensors(12, 18)
    expected = run(backend, gate, up, dout, mask)
    # torch's own loops round differently on other strides; ours see the same rows.
    same = torch.allclose if backend == "reference" else torch.equal
    fused = torch.cat((gate, up), 1).chunk(2, dim=-1)
    for g, u in (fused, (gate.T.contiguous().T, up.T.contiguous().T)):
        assert not g.is_contiguous()
        got = run_views(backend, g, u, dout, mask)
        for a, b in zip(got, expected, strict=True):
            assert same(a, b)
    # The gradient of a sum is expanded: its strides are 0.
    out = ops.masked_swiglu(gate.requires_grad_(), up, mask, backend=backend)
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert same(dgate, run(backend, gate, up, torch.ones_like(dout), mask)[1])


def run_views(backend, gate, up, dout, mask):
    leaves = [x.detach().requires_grad_() for x in (gate, up, mask)]
    out = ops.masked_swiglu(*leaves, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def test_leading_axes_are_rows(backend):
    gate, up, dout, mask = tensors(12, 9)
    flat = run(backend, gate, up, dout, mask)
    cubes = run(backend, *(x.view(2, 3, 2, 9) for x in (gate, up, dout)), mask)
    one = run(backend, gate[0], up[0], dout[0], mask)
    assert torch.equal(one[0], flat[0][0])
    for a, b in zip(cubes, flat, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_own_outputs_and_no_others(backend, dtype):
    gate, up, dout, mask = tensors(4, 40, dtype)
    mask.fill_(0.5)
    gate[1, 7] = float("nan")
    up[2, 9] = float("nan")
    out, dgate, dup, dmask = run(backend, gate, up, dout, mask)
    at = [(out, [(1, 7), (2, 9)]), (dgate, [(1, 7), (2, 9)]), (dup, [(1, 7)])]
    for result, places in at:
        assert result.isnan().nonzero().tolist() == [list(p) for p in places]
    assert dmask.isnan().nonzero().flatten().tolist() == [7, 9]


@pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")
def test_large_and_infinite_gates_behave_as_in_torch(backend):
    gate = torch.tensor([[1e4, -1e4, 88.0, -88.0, 3e38, -3e38, float("inf")]], device=DEVICE)
    up, mask = torch.ones_like(gate), torch.ones(7, device=DEVICE)
    slopes = torch.tensor([1.0, 0, 1, 0, 1, 0], device=DEVICE)
    # torch's own gelu gradient is NaN where the cube overflows; ours is not.
    known = 4 if backend == "reference" else 6
    for activation in swiglu.ACTIVATIONS:
        got = run(backend, gate, up, up, mask, activation)
        want = swiglu.reference(gate.double(), up.double(), mask.double(), activation)
        torch.testing.assert_close(got[0].double(), want, rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(got[1][0, :known], slopes[:known], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype):
    skip_without_extension()
    gate, up, dout, mask = (x.cpu() for x in tensors(300, 1100, dtype))
    threads = torch.get_num_threads()
    for activation in swiglu.ACTIVATIONS:
        results = []
        for isa in available_isas():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(
                    (
                        swiglu.cpp_forward(gate, up, mask, activation, isa),
                        *swiglu.cpp_backward(dout, gate, up, mask, activation, isa),
                    )
                )
        torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_runs_repeat_to_the_bit(backend):
    inputs = tensors(33, 515)
    first = run(backend, *inputs)
    for _ in range(2):
        for a, b in zip(run(backend, *inputs), first, strict=True):
            assert torch.equal(a, b)


def test_backward_keeps_only_gate_up_and_mask(backend):
    gate, up, _, mask = tensors(8, 16)
    leaves = [x.requires_grad_() for x in (gate, up, mask)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, id):
        ops.masked_swiglu(*leaves, backend=backend)
    assert sorted(kept) == sorted(x.data_ptr() for x in leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    gate, up, dout, mask = tensors(4, 6, dtype)
    leaves = [x.requires_grad_() for x in (gate, up, mask)]
    torch.library.opcheck(torch.ops.maskprune.masked_swiglu, (*leaves, "silu", backend))
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.maskprune.masked_swiglu_backward,
            (dout, gate.detach(), up.detach(), mask.detach(), "silu", backend),
        )


def test_compiles_as_one_graph(backend):
    gate, up, dout, mask = tensors(5, 24)

    def step(g, u, m):
        return ops.masked_swiglu(g * 2, u, m, backend=backend) + 1

    leaves = [x.requires_grad_() for x in (gate, up, mask)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves, dout),
        torch.autograd.grad(step(*leaves), leaves, dout),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_errors_say_what_was_given_and_what_to_do():
    x, m = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"gate is \(2, 4\), up \(2, 3\).*expected \(\.\.\., F\)"):
        ops.masked_swiglu(x, x[:, :3], m)
    with pytest.raises(ValueError, match=r"mask \(2, 4\)"):
        ops.masked_swiglu(x, x, x)
    with pytest.raises(TypeError, match=r"mask torch.bfloat16; expected .* convert with .to\(\)"):
        ops.masked_swiglu(x, x, m.bfloat16())
    with pytest.raises(TypeError, match="up torch.float16"):
        ops.masked_swiglu(x, x.half(), m)
    with pytest.raises(ValueError, match="'relu'; expected one of silu, gelu_tanh"):
        ops.masked_swiglu(x, x, m, activation="relu")
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, triton"):
        ops.masked_swiglu(x, x, m, backend="numpy")
    if extension() is not None:
        with pytest.raises(TypeError, match="use backend='reference'"):
            ops.masked_swiglu(x.double(), x.double(), m.double(), backend="cpp")
        with pytest.raises(ValueError, match='"sse9" is unknown or not on this machine'):
            swiglu.cpp_forward(x, x, m, "silu", "sse9")
