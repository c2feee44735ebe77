"""ops.scale_heads: x with head h times mask[h], the same laws on every backend."""

import sys

import pytest
import torch
from backends import DEVICE, available_isas, skip_without_extension
from torch.autograd import gradcheck

from maskprune import ops
from maskprune.ops.backend import extension

heads = sys.modules["maskprune.ops.scale_heads"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, heads, head size: powers of two, 80 and 96 as in Phi and others, odd ones.
SIZES = ((1, 1, 1), (5, 3, 7), (40, 9, 64), (17, 4, 96), (6, 2, 80), (3, 1, 700), (9, 33, 128))
ERROR_BUDGET, TRUNCATION_BUDGET = 2.0, 4.0
FLOOR = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tensors(rows, count, size, dtype=torch.float32, seed=0):
    """x, dout (rows, count * size) and a mask with exact zeros and ones in it."""
    generator = torch.Generator().manual_seed(seed)
    x, dout = (torch.randn(rows, count * size, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(count, generator=generator)
    mask[1::3], mask[2::5] = 0.0, 1.0
    return tuple(v.to(DEVICE) for v in (x, dout, mask))


def gradients(function, x, dout, mask):
    """out, dx, dmask."""
    leaves = [v.detach().requires_grad_() for v in (x, mask)]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def run(backend, x, dout, mask):
    return gradients(lambda x, m: ops.scale_heads(x, m, backend=backend), x, dout, mask)


def plain(x, m):
    """The unfused form that users write, in the dtype of x."""
    return x * m.to(x.dtype).repeat_interleave(x.shape[-1] // m.numel())


def partial_sum(x, dout, mask):
    """Four roundings at the size a sum over rows has on its way: the root of its sum of squares."""
    return (x.double() * dout.double()).view(len(x), len(mask), -1).square().sum(
        (0, 2)
    ).max() ** 0.5 * 4


def within_budget(results, inputs, budget=ERROR_BUDGET):
    """Every result is no further from float64 than `budget` times plain torch."""
    exact = gradients(plain, *(v.double() for v in inputs))
    usual = gradients(plain, *inputs)
    for name, got, torchs, want in zip(("out", "dx", "dmask"), results, usual, exact, strict=True):
        error, allowed = (got.double() - want).abs().max(), (torchs.double() - want).abs().max()
        size = want.abs().max() if name != "dmask" else partial_sum(*inputs)
        floor = FLOOR[got.dtype] * size
        assert error <= max(budget * allowed, floor), f"{name}: {error:.3g} > {allowed:.3g}"


def test_worked_example(backend):
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6], [-1, -2, -3, -4, -5, -6]], device=DEVICE)
    dout = torch.tensor([[1.0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 2]], device=DEVICE)
    mask = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)
    out, dx, dmask = run(backend, x, dout, mask)
    assert out.tolist() == [[1, 2, 1.5, 2, 0, 0], [-1, -2, -1.5, -2, 0, 0]]
    assert dx.tolist() == [[1, 0, 0.5, 0, 0, 0], [0, 1, 0, 0.5, 0, 0]]
    assert dmask.tolist() == [1 - 2, 3 - 4, 5 - 12]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, count, size", SIZES)
def test_is_as_near_to_float64_as_plain_torch(backend, dtype, rows, count, size):
    inputs = tensors(rows, count, size, dtype)
    truncates = backend == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16
    within_budget(run(backend, *inputs), inputs, TRUNCATION_BUDGET if truncates else ERROR_BUDGET)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_ones_changes_nothing_to_the_bit(backend, dtype):
    x, dout, mask = tensors(10, 5, 12, dtype)
    out, dx, _ = run(backend, x, dout, torch.ones_like(mask))
    assert torch.equal(out, x) and torch.equal(dx, dout)


def test_float32_is_the_unfused_form_to_the_bit(backend):
    x, _, mask = tensors(10, 5, 12)
    assert torch.equal(ops.scale_heads(x, mask, backend=backend), plain(x, mask))


def test_a_head_with_mask_zero_gives_nothing_and_can_come_back(backend):
    x, dout, mask = tensors(10, 5, 12)
    out, dx, dmask = run(backend, x, dout, mask)
    gone = mask == 0
    assert gone.any() and (dmask[gone] != 0).all()
    for result in (out, dx):
        assert not result.view(10, 5, 12)[:, gone].any()


def test_gradcheck_of_the_reference_in_float64():
    x, _, mask = (v.double().requires_grad_() for v in tensors(3, 2, 4))
    assert gradcheck(lambda x, m: ops.scale_heads(x, m, backend="reference"), (x, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_written_gradients_are_those_of_autograd(dtype):
    x, dout, mask = tensors(6, 3, 5, dtype)
    _, dx, dmask = gradients(heads.reference, x, dout, mask)
    written = heads.reference_backward(dout, x, mask)
    assert torch.equal(written[0], dx)
    torch.testing.assert_close(written[1], dmask)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_an_empty_batch_gives_zero_gradients(backend, shape):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    mask = torch.ones(4, device=DEVICE, requires_grad=True)
    out = ops.scale_heads(x, mask, backend=backend)
    out.sum().backward()
    assert out.shape == shape and x.grad.shape == shape
    assert torch.equal(mask.grad, torch.zeros_like(mask))


def test_any_strides_give_the_contiguous_result(backend):
    x, dout, mask = tensors(12, 3, 6)
    expected = run(backend, x, dout, mask)
    wide = torch.cat((x, x), 1)[:, :18]
    attention = x.view(12, 3, 6).transpose(0, 1).contiguous().transpose(0, 1).reshape(12, 18)
    for view in (wide, attention, x.T.contiguous().T):
        for a, b in zip(run(backend, view, dout, mask), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0 if backend != "reference" else 1e-6, atol=1e-6)
    cubes = run(backend, x.view(2, 6, 18), dout.view(2, 6, 18), mask)
    for a, b in zip(cubes, expected, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_own_outputs_and_no_others(backend, dtype):
    x, dout, mask = tensors(4, 5, 8, dtype)
    x[1, 19] = float("nan")
    out, dx, dmask = run(backend, x, dout, mask)
    assert out.isnan().nonzero().tolist() == [[1, 19]]
    assert not dx.isnan().any()
    assert dmask.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype):
    skip_without_extension()
    x, dout, mask = (v.cpu() for v in tensors(300, 12, 64, dtype))
    threads, results = torch.get_num_threads(), []
    for isa in available_isas():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            forward = heads.cpp_forward(x, mask, isa)
            results.append((forward, *heads.cpp_backward(dout, x, mask, isa)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_runs_repeat_to_the_bit(backend):
    inputs = tensors(67, 9, 32)
    first = run(backend, *inputs)
    for _ in range(2):
        for a, b in zip(run(backend, *inputs), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    x, dout, mask = tensors(4, 3, 2, dtype)
    leaves = (x.detach().requires_grad_(), mask.detach().requires_grad_())
    torch.library.opcheck(torch.ops.maskprune.scale_heads, (*leaves, backend))
    torch.library.opcheck(torch.ops.maskprune.scale_heads_backward, (dout, x, mask, backend))


def test_compiles_as_one_graph(backend):
    inputs = tensors(5, 3, 8)

    def step(x, m):
        return ops.scale_heads(x * 2, m, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, *inputs), gradients(step, *inputs), strict=True):
        assert torch.equal(a, b)


def test_errors_say_what_was_given_and_what_to_do():
    x, m = torch.zeros(2, 12), torch.ones(4)
    with pytest.raises(ValueError, match=r"x is \(2, 12\), mask \(5,\); expected .*one mask value"):
        ops.scale_heads(x, torch.ones(5))
    with pytest.raises(ValueError, match=r"mask \(0,\)"):
        ops.scale_heads(x, torch.ones(0))
    with pytest.raises(TypeError, match=r"mask torch.float16; expected .* convert with .to\(\)"):
        ops.scale_heads(x, m.half())
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, triton"):
        ops.scale_heads(x, m, backend="numpy")
    if extension() is not None:
        with pytest.raises(TypeError, match="use backend='reference'"):
            ops.scale_heads(x.double(), m.double(), backend="cpp")
