"""The least-s proximal step, on every backend that this machine can run."""

import math

import pytest
import torch
from backends import DEVICE, available_isas, skip_unless_available, skip_without_extension
from torch._subclasses import FakeTensor, FakeTensorMode

from maskprune import ops
from maskprune.ops.least_s_prox import ISAS, LeastS, cpp, reference

BACKENDS = ["reference", *(f"cpp:{isa}" for isa in ISAS), "triton"]
SUM_RTOL = 2e-6
NAN = float("nan")


@pytest.fixture
def prox(backend):
    """(mask, s, shrink) -> LeastS by one backend, as a function with a device."""
    name, _, isa = backend.partition(":")

    def run(mask, s, shrink):
        s = torch.as_tensor(s, dtype=torch.float32, device=mask.device)
        if isa:
            return cpp(mask, s, torch.as_tensor(shrink, dtype=torch.float32), isa)
        return ops.least_s_prox_(mask, s, shrink, backend=name)

    run.device = DEVICE if name == "triton" else torch.device("cpu")
    run.interpreted = name == "triton" and DEVICE.type == "cpu"
    return run


INF = float("inf")
# Worked examples: mask, s, shrink -> mask after, sum_sq, next_sq.
EXAMPLES = {
    "two smallest of four": ([0.5, 1, 0.25, 0.75], 2, 0.5, [0.25, 1, 0.125, 0.75], 5 / 64, 9 / 16),
    "ties go to the lower index": ([1, 1, 1], 2, 0.5, [0.5, 0.5, 1], 0.5, 1),
    "rank is by magnitude": ([-0.5, 0.25, -1], 2, 0.5, [-0.25, 0.125, -1], 5 / 64, 1),
    "ceil of a fraction": ([0.5, 0.25, 1], 1.0001, 0.0, [0, 0, 1], 0, 1),
    "nothing": ([0.5, 0.25], 0, 0.5, [0.5, 0.25], 0, 1 / 16),
    "below nothing": ([0.5, 0.25], -3, 0.5, [0.5, 0.25], 0, 1 / 16),
    "everything": ([0.5, 0.25], 2, 0.5, [0.25, 0.125], 5 / 64, 1 / 16),
    "more than everything": ([0.5, 0.25], 7, 0.5, [0.25, 0.125], 5 / 64, 1 / 16),
    "one entry": ([0.5], 1, 0.5, [0.25], 1 / 16, 1 / 16),
    "infinity is the largest": ([INF, 0.5, 1], 2, 0.5, [INF, 0.25, 0.5], 5 / 16, INF),
    "a NaN freezes the row": ([0.5, NAN, 1], 1, 0.5, [0.5, NAN, 1], NAN, NAN),
    "a NaN s freezes the row": ([0.5, 1], NAN, 0.5, [0.5, 1], NAN, NAN),
    "a NaN shrink freezes the row": ([0.5, 1], 1, NAN, [0.5, 1], NAN, NAN),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_worked_example(prox, example):
    before, s, shrink, after, sum_sq, next_sq = EXAMPLES[example]
    mask = torch.tensor([before], dtype=torch.float32, device=prox.device)
    result = prox(mask, s, shrink)
    expected = torch.tensor([after], dtype=torch.float32)
    torch.testing.assert_close(mask.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    for value, expected in zip(result, (sum_sq, next_sq), strict=True):
        torch.testing.assert_close(
            value.cpu(), torch.tensor([float(expected)]), rtol=0, atol=0, equal_nan=True
        )


def rows_of(kind, R, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(R, N, generator=g)
    match kind:
        case "random":
            return u
        case "signed":
            return torch.randn(R, N, generator=g)
        case "ones":
            return torch.ones(R, N)
        case "quantised":
            return (u * 7).round() / 7
        case "zeros":
            return torch.where(torch.rand(R, N, generator=g) < 0.4, 0.0, u)
        case "denormal":
            return u * 1e-40
        case "sorted":
            return u.sort(1).values
        case "descending":
            return -u.sort(1, descending=True).values
        case "clustered":
            return 1 - 1e-6 * u
        case "neighbours":
            # The k-th entry differs from the next in the last of 31 bits.
            row = 1 + (u * 4).floor() * 2**-23
            row[:, 0], row[:, -1] = 1e18, 0
            return row
        case "misleading":
            # The sampled places hold one value and the k-th entry is elsewhere.
            return torch.where(torch.arange(N) % 256 < 64, torch.tensor(0.5), u)
    raise KeyError(kind)


KINDS = (
    "random signed ones quantised zeros denormal sorted descending clustered neighbours misleading"
).split()


def assert_as_the_reference(prox, mask, s, shrink=0.37):
    expected = mask.clone()
    s = torch.as_tensor(s, dtype=torch.float32)
    stats = reference(expected, s, torch.tensor(shrink))
    got = mask.clone().to(prox.device)
    result = prox(got, s, shrink)
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32)), "the mask, bitwise"
    assert torch.equal(result.next_sq.cpu(), stats.next_sq), "next_sq, bitwise"
    torch.testing.assert_close(result.sum_sq.cpu(), stats.sum_sq, rtol=SUM_RTOL, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 7, 63, 128, 1000, 4099])
def test_equals_the_reference_bit_for_bit(prox, kind, N):
    s = torch.tensor([0.3, 0.0, N - 1, N / 3, 1.0, N / 2 + 0.001, N, N + 5])
    if prox.interpreted and N > 128:
        s = s[::3]
    assert_as_the_reference(prox, rows_of(kind, len(s), N), s)


# Where one Triton kernel takes over from another, the interpreter runs these kinds too.
MORE = "quantised sorted neighbours".split()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [11008, 18433, 28672, 53248, 53249, 70001])
def test_equals_the_reference_on_long_rows(prox, kind, N):
    s = [0.71 * N, 0.03 * N]
    if prox.interpreted:
        few = "signed ones".split()
        if kind not in (few if N in (11008, 28672, 70001) else [*few, *MORE]):
            pytest.skip("slow in the interpreter; the short rows cover it")
        s = s[:1]
    assert_as_the_reference(prox, rows_of(kind, len(s), N), s)


@pytest.mark.parametrize("s", [0, 1, 3.5, 63, 64, 1e9])
def test_exactly_ceil_s_entries_shrink(prox, s):
    mask = torch.ones(3, 64, device=prox.device)
    prox(mask, s, 0.5)
    assert (mask == 0.5).sum(1).tolist() == [min(math.ceil(s), 64)] * 3


def test_ceil_is_taken_in_float32(prox):
    mask = torch.ones(1, 8192, device=prox.device)
    prox(mask, torch.tensor(5504.0005), 0.5)
    assert int((mask == 0.5).sum()) == 5505


def test_every_entry_left_is_at_least_every_entry_shrunk(prox):
    before = rows_of("signed", 4, 500).to(prox.device)
    mask = before.clone()
    prox(mask, 123, 0.5)
    shrunk = mask != before
    assert shrunk.sum(1).tolist() == [123] * 4
    smallest_left = before.abs().masked_fill(shrunk, INF).amin(1)
    assert bool((before.abs().masked_fill(~shrunk, 0).amax(1) <= smallest_left).all())


def test_rows_have_their_own_s(prox):
    mask = torch.ones(4, 100, device=prox.device)
    prox(mask, torch.tensor([0.0, 1.0, 49.2, 100.0]), 0.0)
    assert (mask == 0).sum(1).tolist() == [0, 1, 50, 100]


def test_a_nan_row_leaves_the_others_alone(prox):
    mask = rows_of("random", 3, 5000)
    mask[1, 4321] = NAN
    expected, got = mask.clone(), mask.clone().to(prox.device)
    reference(expected, torch.tensor(1700.0), torch.tensor(0.5))
    result = prox(got, 1700.0, 0.5)
    assert torch.equal(got.cpu().view(torch.int32), expected.view(torch.int32))
    assert torch.equal(got[1].cpu().view(torch.int32), mask[1].view(torch.int32))
    assert result.sum_sq.isnan().tolist() == result.next_sq.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_empty_masks_sum_to_zero(prox, shape):
    result = prox(torch.empty(shape, device=prox.device), 2.0, 0.5)
    assert result.sum_sq.tolist() == result.next_sq.tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("N", [100, 4096])
def test_rows_may_be_any_distance_apart(prox, N):
    whole = rows_of("random", 6, N + 13)
    expected = whole.clone()
    reference(expected[::2, 5 : 5 + N], torch.tensor(33.0), torch.tensor(0.5))
    whole = whole.to(prox.device)
    prox(whole[::2, 5 : 5 + N], 33.0, 0.5)
    assert torch.equal(whole.cpu(), expected)


def test_two_runs_agree_to_the_bit(prox):
    first, second = (rows_of("zeros", 5, 9000).to(prox.device) for _ in range(2))
    a, b = prox(first, 4444.0, 0.5), prox(second, 4444.0, 0.5)
    assert torch.equal(first, second)
    assert torch.equal(a.sum_sq, b.sum_sq) and torch.equal(a.next_sq, b.next_sq)


def test_instruction_sets_and_threads_agree_to_the_bit():
    skip_without_extension()
    threads = torch.get_num_threads()
    results = []
    try:
        for isa in available_isas():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                mask = rows_of("zeros", 7, 9001)
                result = cpp(mask, torch.tensor(4321.0), torch.tensor(0.3), isa)
                results.append(torch.cat([mask.flatten(), *result]))
    finally:
        torch.set_num_threads(threads)
    assert len(results) >= 3
    assert all(torch.equal(results[0], other) for other in results)


ERRORS = {
    "one dimension": (torch.ones(3), 1.0, 0.5, "auto", ValueError, r"mask is \(3,\); expected \(R"),
    "half": (torch.ones(1, 3).half(), 1.0, 0.5, "auto", TypeError, "float16; expected float32"),
    "transposed": (torch.ones(3, 2).T, 1.0, 0.5, "auto", ValueError, "a last stride of 1"),
    "expanded": (torch.ones(1, 3).expand(2, 3), 1.0, 0.5, "auto", ValueError, "share no memory"),
    "s too long": (torch.ones(2, 3), torch.ones(3), 0.5, "auto", ValueError, r"0-dim or \(2,\)"),
    "integer s": (torch.ones(2, 3), torch.tensor(1), 0.5, "auto", TypeError, "s is torch.int64"),
    "shrink per row": (torch.ones(2, 3), 1.0, torch.ones(2), "auto", ValueError, "shrink is"),
    "s elsewhere": (
        torch.ones(2, 3),
        torch.ones((), device="meta"),
        0.5,
        "auto",
        ValueError,
        "s is on meta, mask on cpu; move it",
    ),
    "no such backend": (torch.ones(2, 3), 1.0, 0.5, "cuda", ValueError, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_given_and_what_to_do(case):
    mask, s, shrink, backend, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text):
        ops.least_s_prox_(mask, s, shrink, backend=backend)


def test_unknown_instruction_set_is_refused():
    skip_without_extension()
    with pytest.raises(ValueError, match='least_s_prox_: instruction set "neon" is unknown or not'):
        cpp(torch.ones(1, 2), torch.tensor(1.0), torch.tensor(0.5), "neon")


def test_parameters_are_changed_outside_autograd():
    mask = torch.nn.Parameter(torch.ones(2, 8))
    loss = (mask * mask).sum()
    result = ops.least_s_prox_(mask, 3.0, 0.5)
    assert isinstance(result, LeastS) and not result.sum_sq.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


REGISTERED = pytest.mark.parametrize("name", ["reference", "cpp"])


@REGISTERED
def test_opcheck(name):
    skip_unless_available(name)
    s, shrink = torch.tensor([2.0, 5.0]), torch.tensor(0.5)
    torch.library.opcheck(
        torch.ops.maskprune.least_s_prox_.default, (torch.rand(2, 40), s, shrink, name)
    )


def test_fake_tensors_meet_the_registered_operation():
    with FakeTensorMode():
        result = ops.least_s_prox_(torch.empty(3, 8), 2.0, 0.5)
    assert type(result.sum_sq) is type(result.next_sq) is FakeTensor
    assert result.sum_sq.shape == result.next_sq.shape == (3,)


@REGISTERED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_s_and_shrink_that_require_gradients_pass_none_on(name, dtype):
    skip_unless_available(name)
    s, shrink = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (3.0, 0.5))
    mask = torch.ones(1, 8)
    result = ops.least_s_prox_(mask, s, shrink, backend=name)
    assert mask.tolist() == [[0.5] * 3 + [1.0] * 5] and not mask.requires_grad
    assert result.sum_sq.tolist() == [0.75] and not result.sum_sq.requires_grad


def test_compiles_into_one_graph():
    def step(mask, s, y):
        result = ops.least_s_prox_(mask, s, 1 / (1 + 2 * y))
        return result.sum_sq.mean() + result.next_sq.mean()

    eager, compiled = rows_of("random", 4, 3000), rows_of("random", 4, 3000)
    s, y = torch.tensor(1000.5), torch.tensor(0.7)
    expected = step(eager, s, y)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, s, y)
    assert torch.equal(eager, compiled) and torch.equal(got, expected)
