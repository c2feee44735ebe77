"""ops.gumbel_two_four: W * m under a Gumbel-softmax sample of m, the same laws on every backend."""

import sys

import pytest
import torch
from backends import DEVICE, available_isas, skip_without_extension
from torch.autograd import gradcheck

from maskprune import ops
from maskprune.ops.backend import extension

gumbel = sys.modules["maskprune.ops.gumbel_two_four"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 4), (3, 28), (17, 252), (40, 100), (9, 4096))
# kappa and tau of MaskLLM: at the start of its run, at the end, and neutral.
SETTINGS = ((100.0, 4.0), (500.0, 0.05), (1.0, 1.0))
# Of torch's own error in the same dtype; the interpreter truncates to bfloat16 instead of rounding.
ERROR_BUDGET, TRUNCATION_BUDGET = 2.0, 4.0
# One unit in the last place of the largest value, where torch's own error happens to be zero.
FLOOR = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# What the approximate logarithm of CUDA may add to g; tests/test_gumbel_noise.py derives it.
APPROXIMATE_G = 5e-6
SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 0x299F31D0A4093822, -1, -(2**63))


def tensors(rows, width, dtype=torch.float32, generator_seed=0, std=0.01):
    """W, dmasked (O, I), logits (6, O, I / 4) and dnorm_sq."""
    generator = torch.Generator().manual_seed(generator_seed)
    W, dmasked = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    logits = std * torch.randn(6, rows, width // 4, generator=generator)
    return tuple(x.to(DEVICE) for x in (W, dmasked, logits, torch.tensor(0.3)))


def gradients(function, W, dmasked, logits, dnorm_sq):
    """masked, norm_sq, dlogits."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = function(W, leaf)
    (dlogits,) = torch.autograd.grad(outputs, leaf, (dmasked, dnorm_sq))
    return (*(x.detach() for x in outputs), dlogits)


def run(backend, inputs, seed=7, kappa=100.0, tau=4.0):
    return gradients(
        lambda W, pi: ops.gumbel_two_four(W, pi, seed, kappa, tau, backend=backend), *inputs
    )


def plain(inputs, seed=7, kappa=100.0, tau=4.0):
    """The unfused form that users write: the mask rounded to the dtype of W, by autograd."""

    def eager(W, pi):
        scalars = [torch.tensor(v, dtype=pi.dtype, device=DEVICE) for v in (kappa, tau)]
        p = gumbel.soft_choice(pi, torch.tensor(seed, device=DEVICE), *scalars)
        masked = W * gumbel.soft_mask(p).to(W.dtype)
        return masked, masked.to(pi.dtype).square().sum()

    return gradients(eager, *inputs)


def doubles(inputs):
    return tuple(x.double() for x in inputs)


def choices(backend, logits, seed, kappa, tau):
    """p (6, groups) of any backend, from gradients: with W = 1 and dmasked = 1 in the first slot
    alone, dpi_k = kappa / tau * p_k * ([k keeps slot 0] - m_0), and likewise from the last slot."""
    W = torch.ones(logits.shape[1], 4 * logits.shape[2], device=DEVICE)
    halves = []
    for slot, planes in ((0, slice(0, 3)), (3, slice(3, 6))):
        dmasked = torch.zeros_like(W)
        dmasked[:, slot::4] = 1.0
        zero = torch.zeros((), device=DEVICE)
        masked, _, dlogits = run(backend, (W, dmasked, logits, zero), seed, kappa, tau)
        keeps = torch.tensor([slot in gumbel.SLOTS[k] for k in range(6)], device=DEVICE)
        share = keeps[:, None, None].float() - masked[:, slot::4]
        halves.append((dlogits / (kappa / tau * share))[planes])
    return torch.cat(halves).flatten(1)


def hard(backend, logits, seed, kappa):
    """The candidate drawn for each group, by the sample at a temperature next to zero."""
    W = torch.ones(logits.shape[1], 4 * logits.shape[2], device=DEVICE)
    masked, _ = ops.gumbel_two_four(W, logits, seed, kappa, 1e-6, backend=backend)
    kept = masked.unflatten(-1, (-1, 4)) > 0.5
    pairs = torch.zeros(6, 4, dtype=torch.bool, device=DEVICE)
    for k, pair in enumerate(gumbel.SLOTS):
        pairs[k, list(pair)] = True
    return (kept[..., None, :] == pairs).all(-1).int().argmax(-1).flatten()


@pytest.mark.parametrize("first", [0, 5, 2**32 - 3, 2**40 + 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_backend_draws_the_same_integers(backend, seed, first):
    seed = torch.tensor(seed, device=DEVICE)
    expected = gumbel.noise(seed, 1000, first)
    if backend == "cpp":
        for isa in available_isas():
            assert torch.equal(gumbel.cpp_noise(seed, 1000, first, isa).long(), expected)
    if backend == "triton":
        from maskprune.kernels.gumbel_two_four import noise

        assert torch.equal(noise(seed, 1000, first).long(), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_seed_gives_one_sample_on_every_backend(backend, seed):
    """Integers off by one would show: the tail of g moves by half at its last step."""
    inputs = tensors(13, 76)
    for got, want in zip(
        run(backend, inputs, seed), run("reference", doubles(inputs), seed), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_worked_example(backend):
    """Group 0 of seed 0, from the published words by hand, at kappa = 0 and tau = 1."""
    n = torch.tensor([0xCC4FD, 0x1C2D38, 0x178AF5, 0x13601B, 0x3558D, 0x1133D8]).double()
    e = -1 / torch.log((n + 0.5) / 2**21)
    p = e / e.sum()
    a, b, c, d, e, f = p.tolist()
    W = torch.tensor([[1.0, 2.0, -3.0, 4.0]], device=DEVICE)
    logits = torch.zeros(6, 1, 1, device=DEVICE)
    expected = [a + b + c, 2 * (a + d + e), -3 * (b + d + f), 4 * (c + e + f)]
    masked, norm_sq = ops.gumbel_two_four(W, logits, 0, 0.0, 1.0, backend=backend)
    assert masked[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert norm_sq.item() == pytest.approx(sum(x * x for x in expected), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kappa, tau", SETTINGS)
@pytest.mark.parametrize("rows, width", SHAPES)
def test_is_as_near_to_float64_as_plain_torch(backend, dtype, rows, width, kappa, tau):
    inputs = tensors(rows, width, dtype)
    truncates = backend == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16
    budget = TRUNCATION_BUDGET if truncates else ERROR_BUDGET
    exact = plain(doubles(inputs), 7, kappa, tau)
    usual = plain(inputs, 7, kappa, tau)
    results = run(backend, inputs, 7, kappa, tau)
    approximate = APPROXIMATE_G / tau if (backend, DEVICE.type) == ("triton", "cuda") else 0.0
    # What kappa * pi + g loses to float32 at its size here, as a share of p.
    inherent = 16 * 2.0**-24 / tau
    for name, got, torchs, want in zip(
        ("masked", "norm_sq", "dlogits"), results, usual, exact, strict=True
    ):
        error, allowed = (got.double() - want).abs().max(), (torchs.double() - want).abs().max()
        floor = (FLOOR[got.dtype] + inherent + approximate) * want.abs().max()
        assert error <= max(budget * allowed, floor), f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("kappa, tau", SETTINGS)
def test_the_mask_lies_in_0_to_1_and_sums_to_2(backend, kappa, tau):
    _, _, logits, _ = tensors(20, 400)
    W = torch.ones(20, 400, device=DEVICE)
    m, norm_sq = ops.gumbel_two_four(W, logits, 5, kappa, tau, backend=backend)
    assert 0 <= m.min() and m.max() <= 1 + 2.0**-22
    sums = m.unflatten(-1, (-1, 4)).sum(-1)
    assert (sums - 2).abs().max() <= 2.0**-20
    torch.testing.assert_close(norm_sq, m.double().square().sum().float(), rtol=1e-6, atol=0)


def test_a_low_temperature_is_the_argmax(backend):
    _, _, logits, _ = tensors(50, 400)
    seed, kappa, one = torch.tensor(11), torch.tensor(100.0).double(), torch.tensor(1.0)
    p = gumbel.soft_choice(logits.cpu().double(), seed, kappa, one).flatten(1)
    two = p.log().topk(2, 0).values
    clear = two[0] - two[1] > 1e-3
    assert clear.sum() > 4900
    drawn = hard(backend, logits, 11, 100.0).cpu()
    assert torch.equal(drawn[clear], p.argmax(0)[clear])


def test_seeds_differ_and_repeat(backend):
    inputs = tensors(8, 64)
    first, again, other = (run(backend, inputs, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).float().mean() > 0.99
    inputs = (*inputs[:3], inputs[3] * 0)
    high = run(backend, inputs, 1 + 2**32)
    assert (first[0] != high[0]).float().mean() > 0.99


def test_without_logits_every_candidate_is_drawn_as_often(backend):
    logits = torch.zeros(6, 120, 500, device=DEVICE)
    counts = hard(backend, logits, 3, 1.0).bincount(minlength=6).double()
    assert counts.sum() == 60_000
    # The 1e-4 quantile of chi-square with 5 degrees of freedom.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 25.74


@pytest.mark.parametrize("kappa, expected", [(1.0, 0.255), (100.0, 0.274), (1000.0, 0.678)])
def test_the_largest_share_at_the_first_temperature_is_known(backend, kappa, expected):
    generator = torch.Generator().manual_seed(1)
    logits = (0.01 * torch.randn(6, 100, 200, generator=generator)).to(DEVICE)
    largest = choices(backend, logits, 9, kappa, 4.0).max(0).values
    assert largest.mean().item() == pytest.approx(
        expected, abs=5e-4 + 4 * largest.std().item() / 20_000**0.5
    )


def test_a_prior_of_strength_three_is_drawn_in_732_of_1000_groups(backend):
    generator = torch.Generator().manual_seed(1)
    logits = 0.01 * torch.randn(6, 100, 200, generator=generator)
    prior = torch.randint(6, (100, 200), generator=generator)
    shared = torch.tensor([[len({*a} & {*b}) for b in gumbel.SLOTS] for a in gumbel.SLOTS])
    logits += 3 * 0.01 * (shared[prior] - 1.0).movedim(-1, 0)
    drawn = hard(backend, logits.to(DEVICE), 4, 100.0).cpu()
    share = (drawn == prior.flatten()).float().mean().item()
    assert share == pytest.approx(0.732, abs=5e-4 + 4 * (0.732 * 0.268 / 20_000) ** 0.5)


def test_gradcheck_of_the_reference_in_float64():
    W, _, logits, _ = doubles(tensors(3, 8, std=1.0))
    assert gradcheck(
        lambda pi: ops.gumbel_two_four(W, pi, 3, 1.5, 0.7, backend="reference"),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_written_gradient_is_that_of_autograd(dtype):
    inputs = tensors(6, 20, dtype)
    scalars = torch.tensor(5), torch.tensor(100.0), torch.tensor(0.5)
    scalars = [x.to(DEVICE) for x in scalars]
    *_, by_autograd = gradients(lambda W, pi: gumbel.reference(W, pi, *scalars), *inputs)
    W, dmasked, logits, dnorm_sq = inputs
    written = gumbel.reference_backward(dmasked, dnorm_sq, W, logits, *scalars)
    torch.testing.assert_close(written, by_autograd, rtol=1e-4, atol=1e-5)


def test_either_output_alone_has_its_gradient(backend):
    W, dmasked, logits, dnorm_sq = tensors(5, 24)
    both = run(backend, (W, dmasked, logits, dnorm_sq))[2]
    parts = []
    for which, grad in ((0, dmasked), (1, dnorm_sq)):
        leaf = logits.clone().requires_grad_()
        out = ops.gumbel_two_four(W, leaf, 7, 100.0, 4.0, backend=backend)[which]
        parts += torch.autograd.grad(out, leaf, grad)
    torch.testing.assert_close(parts[0] + parts[1], both, rtol=1e-5, atol=1e-5)


def test_the_gradient_over_candidates_sums_to_zero(backend):
    *_, dlogits = run(backend, tensors(30, 96))
    assert dlogits.sum(0).abs().max() <= 1e-5 * dlogits.abs().max()


@pytest.mark.parametrize("rows, width", [(0, 8), (3, 0), (0, 0)])
def test_empty_weights_give_empty_results(backend, rows, width):
    inputs = tensors(rows, width)
    masked, norm_sq, dlogits = run(backend, inputs)
    assert masked.shape == (rows, width) and dlogits.shape == (6, rows, width // 4)
    assert norm_sq.item() == 0


def test_any_strides_give_the_contiguous_result(backend):
    W, dmasked, logits, dnorm_sq = tensors(12, 24)
    expected = run(backend, (W, dmasked, logits, dnorm_sq))
    grouped = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for view in (lambda x: torch.cat((x, x), 1)[:, :24], lambda x: x.T.contiguous().T):
        got = run(backend, (view(W), view(dmasked), grouped, dnorm_sq))
        for a, b in zip(got, expected, strict=True):
            # Without C++ and Triton, the strides decide in what order torch sums.
            torch.testing.assert_close(a, b, rtol=0 if backend != "reference" else 1e-5, atol=1e-6)
        assert got[0].is_contiguous() and got[2].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_weight_reaches_its_group_and_no_other(backend, dtype):
    W, dmasked, logits, dnorm_sq = tensors(4, 40, dtype)
    W[1, 9] = float("nan")
    masked, norm_sq, dlogits = run(backend, (W, dmasked, logits, dnorm_sq))
    assert masked.isnan().nonzero().tolist() == [[1, 9]]
    assert norm_sq.isnan()
    assert dlogits.isnan().nonzero().tolist() == [[k, 1, 2] for k in range(6)]


@pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("plane", range(6))
def test_nan_in_a_logit_reaches_its_whole_group_and_no_other(backend, plane, bits):
    W, dmasked, logits, dnorm_sq = tensors(4, 40)
    nan = torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32, device=DEVICE)
    logits[plane, 1, 2] = nan.view(torch.float32)
    masked, norm_sq, dlogits = run(backend, (W, dmasked, logits, dnorm_sq))
    assert masked.isnan().nonzero().tolist() == [[1, i] for i in range(8, 12)]
    assert norm_sq.isnan()
    assert dlogits.isnan().nonzero().tolist() == [[k, 1, 2] for k in range(6)]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_candidate_can_be_forbidden_by_minus_infinity(backend):
    W, dmasked, logits, dnorm_sq = tensors(4, 40)
    logits[:5] = -torch.inf
    masked, _, dlogits = run(backend, (W, dmasked, logits, dnorm_sq))
    expected = W.unflatten(-1, (-1, 4)) * torch.tensor([0.0, 0, 1, 1], device=DEVICE)
    assert torch.equal(masked, expected.flatten(-2)) and not dlogits.any()


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_the_smallest_temperature_is_a_hard_mask(backend):
    _, _, logits, _ = tensors(4, 40)
    W = torch.ones(4, 40, device=DEVICE)
    m, _ = ops.gumbel_two_four(W, logits, 1, 100.0, 2.0**-100, backend=backend)
    assert ((m == 0) | (m == 1)).all() and (m.sum() == 80)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype):
    skip_without_extension()
    # Three work items, the last of them ragged.
    W, dmasked, logits, dnorm_sq = (x.cpu() for x in tensors(300, 500, dtype))
    scalars = torch.tensor(5), torch.tensor(100.0), torch.tensor(0.5)
    threads, results = torch.get_num_threads(), []
    for isa in available_isas():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            forward = gumbel.cpp_forward(W, logits, *scalars, isa)
            dlogits = gumbel.cpp_backward(dmasked, dnorm_sq, W, logits, *scalars, isa)
            results.append((*forward, dlogits))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_runs_repeat_to_the_bit(backend):
    inputs = tensors(67, 516)
    first = run(backend, inputs)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(backend, inputs), first, strict=True))


def test_backward_keeps_only_the_inputs(backend):
    W, _, logits, _ = tensors(8, 16)
    scalars = [torch.tensor(x, device=DEVICE) for x in (7, 100.0, 4.0)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, id):
        ops.gumbel_two_four(W, logits.requires_grad_(), *scalars, backend=backend)
    assert sorted(kept) == sorted(x.data_ptr() for x in (W, logits, *scalars))


def test_numbers_and_tensors_are_the_same(backend):
    W, _, logits, _ = tensors(8, 16)
    scalars = [torch.tensor(x, device=DEVICE) for x in (7, 100.0, 4.0)]
    by_tensors = ops.gumbel_two_four(W, logits, *scalars, backend=backend)
    by_numbers = ops.gumbel_two_four(W, logits, 7, 100.0, 4.0, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(by_tensors, by_numbers, strict=True))


def test_a_seed_that_changed_before_backward_is_an_error(backend):
    W, _, logits, _ = tensors(8, 16)
    seed = torch.tensor(7, device=DEVICE)
    _, norm_sq = ops.gumbel_two_four(W, logits.requires_grad_(), seed, 1.0, 1.0, backend=backend)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norm_sq.backward()


def test_a_second_derivative_is_refused(backend):
    W, _, logits, _ = tensors(8, 16)
    _, norm_sq = ops.gumbel_two_four(W, logits.requires_grad_(), 1, 1.0, 1.0, backend=backend)
    (dlogits,) = torch.autograd.grad(norm_sq, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of its gradient.*without create_graph"):
        dlogits.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    W, dmasked, logits, dnorm_sq = tensors(4, 8, dtype)
    scalars = [torch.tensor(x, device=DEVICE) for x in (7, 100.0, 4.0)]
    arguments = (W, logits, *scalars, backend)
    torch.library.opcheck(
        torch.ops.maskprune.gumbel_two_four_backward, (dmasked, dnorm_sq, *arguments)
    )
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.maskprune.gumbel_two_four, arguments)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_as_one_graph(backend, as_tensor):
    inputs = tensors(5, 24)
    seed = torch.tensor(3, device=DEVICE) if as_tensor else 3

    def step(W, pi):
        masked, norm_sq = ops.gumbel_two_four(W, pi * 2, seed, 100.0, 4.0, backend=backend)
        return masked + 1, norm_sq * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, *inputs), gradients(step, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    W, dmasked, logits, dnorm_sq = tensors(64, 256, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (7, torch.full((), 7, device=DEVICE)):
            run("triton", (W, dmasked, logits, dnorm_sq), seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_errors_say_what_was_given_and_what_to_do():
    W, pi = torch.zeros(2, 8), torch.zeros(6, 2, 2)

    def call(W=W, pi=pi, seed=0, kappa=1.0, tau=1.0, **keywords):
        return ops.gumbel_two_four(W, pi, seed, kappa, tau, **keywords)

    with pytest.raises(ValueError, match=r"requires grad; .* pass weight.detach\(\)"):
        call(torch.zeros(2, 8, requires_grad=True))
    with pytest.raises(ValueError, match=r"weight is \(2, 7\); expected \(O, I\) with I divisible"):
        call(W[:, :7])
    with pytest.raises(ValueError, match=r"logits is \(2, 2, 6\); expected \(6, 2, 2\)"):
        call(pi=pi.movedim(0, -1))
    with pytest.raises(TypeError, match=r"logits torch.bfloat16; expected .* convert with .to\(\)"):
        call(pi=pi.bfloat16())
    with pytest.raises(TypeError, match="weight is torch.int8"):
        call(W.to(torch.int8))
    for tau in (0.0, -1.0, float("nan"), float("inf"), 1e-40):
        with pytest.raises(ValueError, match=f"tau is {tau}; expected tau >= 2.-100.*argmax"):
            call(tau=tau)
    for kappa in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"kappa is {kappa}; expected kappa >= 0"):
            call(kappa=kappa)
    with pytest.raises(ValueError, match="seed is 18446744073709551615; expected the 64 bits"):
        call(seed=2**64 - 1)
    with pytest.raises(TypeError, match=r"seed is torch.int32 of shape \(\); .* convert with"):
        call(seed=torch.tensor(1, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"tau is torch.float32 of shape \(1,\)"):
        call(tau=torch.ones(1))
    with pytest.raises(ValueError, match="kappa is on meta, logits on cpu; move it there"):
        call(kappa=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="weight is on cpu, logits on meta; move them"):
        call(pi=pi.to("meta"))
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, triton"):
        call(backend="numpy")
    if extension() is not None:
        with pytest.raises(TypeError, match="use backend='reference'"):
            call(W.double(), pi.double(), backend="cpp")
        with pytest.raises(ValueError, match='"sse9" is unknown or not on this machine'):
            gumbel.cpp_noise(torch.tensor(0), 1, isa="sse9")
