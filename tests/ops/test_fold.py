"""fold_columns and gather_rows: one rounding, every dtype, every instruction set, bit for bit."""

from __future__ import annotations

import pytest
import torch
from backends import skip_unless_available, skip_without_extension

from maskprune import ops
from maskprune.ops.backend import DTYPE_CODES, compiled, extension
from maskprune.ops.fold import fold_columns_reference, scale_exactly
from maskprune.ops.least_s_prox import ISAS

INTS = {torch.float32: torch.int32, torch.float64: torch.int64}
BACKENDS = ["reference", "cpp"]
SIZES = [(1, 1, 1), (3, 63, 20), (7, 100, 100), (5, 1000, 513), (2, 4097, 2049), (33, 31, 17)]
DTYPES = pytest.mark.parametrize("dtype", list(DTYPE_CODES), ids=str)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTS.get(x.dtype, torch.int16))


def assert_same_bits(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert given.dtype == expected.dtype and given.shape == expected.shape
    different = bits(given) != bits(expected)
    assert not different.any(), (given[different][:4], expected[different][:4])


def hard_values(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bit patterns: normal numbers, denormals, infinities, NaN of every payload, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTS.get(dtype, torch.int16)
    span = 2 ** (8 * torch.empty(0, dtype=integer).element_size() - 1) - 1
    raw = torch.randint(-span, span, (rows, columns), generator=generator, dtype=torch.int64)
    x = raw.to(integer).view(dtype)
    for value in (float("inf"), -float("inf"), float("nan"), -0.0, torch.finfo(dtype).max):
        x[torch.rand(rows, columns, generator=generator) < 0.02] = value
    return x


def hard_scale(columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(columns, generator=generator)
    kind = torch.randint(0, 8, (columns,), generator=generator)
    for value, which in ((1.0, 0), (0.0, 1), (1e-39, 2), (float("inf"), 3), (float("nan"), 4)):
        scale[kind == which] = value
    return scale


def some(columns: int, kept: int, seed: int = 2) -> torch.Tensor:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return order[:kept].sort().values


@pytest.fixture(params=ISAS)
def fold_with_isa(request: pytest.FixtureRequest):
    skip_unless_available(f"cpp:{request.param}")

    def fold(weight, scale, keep, threads=1):
        factors = scale[keep]
        out = weight.new_empty(weight.shape[0], keep.numel())
        compiled().fold_columns(
            weight.data_ptr(),
            *weight.shape,
            DTYPE_CODES[weight.dtype],
            keep.data_ptr(),
            keep.numel(),
            factors.data_ptr(),
            out.data_ptr(),
            threads,
            request.param,
        )
        return out

    return fold


def test_worked_example(backend):
    weight = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
    scale = torch.tensor([0.5, 9.0, 1.0])
    out = ops.fold_columns(weight, scale, torch.tensor([0, 2]), backend=backend)
    assert out.tolist() == [[0.5, 3.0], [-2.0, 6.0]]
    assert ops.gather_rows(weight, torch.tensor([1]), backend=backend).tolist() == [[-4, 5, 6]]
    bias = torch.tensor([7.0, 8.0])
    assert ops.gather_rows(bias, torch.tensor([1, 0]), backend=backend).tolist() == [8.0, 7.0]


@DTYPES
def test_it_is_torch_on_every_value_that_is_a_number(backend, dtype):
    weight, scale = hard_values(64, 777, dtype), hard_scale(777)
    keep = some(777, 300)
    out = ops.fold_columns(weight, scale, keep, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (weight.to(wide) * scale.to(wide)).to(dtype)[:, keep]
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert_same_bits(out[number], expected[number])


@DTYPES
def test_a_factor_of_one_copies_every_bit(backend, dtype):
    weight = hard_values(16, 200, dtype)
    assert weight.isnan().any() and weight.isinf().any()
    keep = some(200, 90)
    out = ops.fold_columns(weight, torch.ones(200), keep, backend=backend)
    assert_same_bits(out, weight[:, keep])


@DTYPES
def test_a_nan_that_is_scaled_becomes_the_canonical_one(backend, dtype):
    weight = torch.tensor([[float("nan"), float("inf"), -0.0, 1.0]]).to(dtype)
    weight = bits(weight).clone().view(dtype)
    weight[0, 0] = torch.full((), float("nan"), dtype=dtype).copysign(torch.tensor(-1.0))
    scale = torch.tensor([0.5, 0.0, 0.5, float("nan")])
    out = ops.fold_columns(weight, scale, torch.arange(4), backend=backend)
    canonical = torch.full((1, 3), float("nan"), dtype=dtype)
    assert_same_bits(out[:, [0, 1, 3]], canonical)
    assert_same_bits(out[:, 2], torch.tensor([-0.0]).to(dtype))


def test_denormals_survive(backend):
    weight = torch.full((2, 40), 1e-39, dtype=torch.bfloat16)
    out = ops.fold_columns(weight, torch.full((40,), 0.5), torch.arange(40), backend=backend)
    assert_same_bits(out, (weight.float() * 0.5).bfloat16())
    assert bits(out).ne(0).all()


def test_denormals_survive_a_process_that_flushes_them():
    if extension() is None or not torch.set_flush_denormal(True):
        torch.set_flush_denormal(False)
        pytest.skip("needs the C++ extension and a CPU that can flush denormals")
    try:
        weight = torch.full((2, 40), 1e-39, dtype=torch.bfloat16)
        out = ops.fold_columns(weight, torch.full((40,), 0.5), torch.arange(40), backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(out, (weight.float() * 0.5).bfloat16())


@DTYPES
@pytest.mark.parametrize("rows, columns, kept", SIZES)
def test_every_instruction_set_gives_the_bits_of_the_reference(
    fold_with_isa, dtype, rows, columns, kept
):
    for seed in range(3):
        weight, scale = hard_values(rows, columns, dtype, seed), hard_scale(columns, seed)
        keep = some(columns, kept, seed)
        assert_same_bits(
            fold_with_isa(weight, scale, keep), fold_columns_reference(weight, scale, keep)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_times_many_factors(fold_with_isa, dtype):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024)
    keep = torch.arange(1024)
    for factor in (1.0, 0.5, 1 / 3, 0.999, 1.001, 6e-8, 3e-39, 1e30):
        scale = torch.full((1024,), factor)
        assert_same_bits(
            fold_with_isa(weight, scale, keep), fold_columns_reference(weight, scale, keep)
        )


def test_the_order_and_repeats_of_keep_are_kept(backend):
    weight, scale = hard_values(9, 130, torch.bfloat16), hard_scale(130)
    keep = torch.tensor([129, 0, 0, 64, 63, 1])
    out = ops.fold_columns(weight, scale, keep, backend=backend)
    assert_same_bits(out, fold_columns_reference(weight, scale, keep))
    rows = torch.tensor([8, 0, 0, 3])
    assert_same_bits(ops.gather_rows(weight, rows, backend=backend), weight[rows])


@DTYPES
def test_gathered_rows_and_biases_are_copies(backend, dtype):
    for shape in ((1,), (57,), (57, 1), (57, 129)):
        weight = hard_values(57, 129, dtype)[: shape[0], : (*shape, 1)[1]].reshape(shape)
        keep = some(shape[0], (shape[0] + 1) // 2)
        assert_same_bits(ops.gather_rows(weight, keep, backend=backend), weight[keep])


def test_nothing_or_everything_may_be_kept(backend):
    weight, none = torch.randn(5, 8), torch.empty(0, dtype=torch.int64)
    assert ops.fold_columns(weight, torch.ones(8), none, backend=backend).shape == (5, 0)
    assert ops.gather_rows(weight, none, backend=backend).shape == (0, 8)
    whole = ops.fold_columns(weight, torch.ones(8), torch.arange(8), backend=backend)
    assert_same_bits(whole, weight)
    assert ops.fold_columns(weight[:0], torch.ones(8), none, backend=backend).shape == (0, 0)


def test_views_are_read_correctly_and_inputs_are_unchanged(backend):
    base = torch.randn(40, 60)
    weight, scale, keep = base.t()[3:], torch.rand(80)[::2], torch.arange(40)[::3]
    before = base.clone(), scale.clone()
    out = ops.fold_columns(weight, scale, keep, backend=backend)
    assert_same_bits(out, (weight * scale)[:, keep].contiguous())
    assert_same_bits(ops.gather_rows(weight, keep, backend=backend), weight[keep].contiguous())
    assert torch.equal(base, before[0]) and torch.equal(scale, before[1])
    trained = torch.nn.Parameter(base)
    assert not ops.fold_columns(trained, torch.ones(60), keep, backend=backend).requires_grad


def test_a_second_thread_is_used():
    skip_without_extension()
    module = compiled()
    weight, scale = torch.randn(1024, 1024), torch.rand(1024)
    keep = torch.arange(1024)
    out = torch.empty_like(weight)
    pointers = keep.data_ptr(), 1024, scale.data_ptr(), out.data_ptr()
    used = module.fold_columns(weight.data_ptr(), 1024, 1024, 0, *pointers, 2, "auto")
    assert used == 2, "the extension was compiled or linked without OpenMP"
    assert_same_bits(out, weight * scale)
    used = module.gather_rows(
        weight.data_ptr(), 1024, 4096, keep.data_ptr(), 1024, out.data_ptr(), 2
    )
    assert used == 2
    assert_same_bits(out, weight)


def test_scale_exactly_broadcasts_over_rows():
    weight = hard_values(6, 5, torch.float16)
    factors = hard_scale(6)
    by_row = scale_exactly(weight, factors[:, None])
    by_column = scale_exactly(weight.t().contiguous(), factors).t().contiguous()
    assert_same_bits(by_row, by_column)


WEIGHT, SCALE, KEEP = torch.zeros(2, 3), torch.ones(3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ((WEIGHT.int(), SCALE, KEEP), TypeError, "weight is torch.int32; expected float32"),
        ((WEIGHT, SCALE.double(), KEEP), TypeError, "scale is torch.float64; expected float32"),
        ((WEIGHT, SCALE[:2], KEEP), ValueError, r"scale is \(2,\) .*expected \(3,\)"),
        ((WEIGHT, SCALE, KEEP.int()), TypeError, "keep is torch.int32; expected int64"),
        ((WEIGHT, SCALE, KEEP + 1), ValueError, "keep has 3; expected 0 to 2"),
        ((WEIGHT, SCALE, KEEP - 1), ValueError, "keep has -1; expected 0 to 2"),
        ((WEIGHT, SCALE, KEEP[None]), ValueError, r"keep is \(1, 2\)"),
        ((WEIGHT[0], SCALE, KEEP), ValueError, r"weight has shape \(3,\); expected \(O, I\)"),
    ],
)
def test_errors_say_what_was_given_and_expected(arguments, kind, text):
    with pytest.raises(kind, match=text):
        ops.fold_columns(*arguments)


def test_backends_that_are_not_available_are_refused():
    with pytest.raises(RuntimeError, match="no Triton backend"):
        ops.fold_columns(WEIGHT, SCALE, KEEP, backend="triton")
    with pytest.raises(ValueError, match="backend is 'magic'"):
        ops.gather_rows(WEIGHT, KEEP[:1], backend="magic")
    with pytest.raises(ValueError, match="keep has 2; expected 0 to 1, weight has 2 rows"):
        ops.gather_rows(WEIGHT, KEEP)
