"""One step of Algorithm 1 on every backend: all of them take the reference's step."""

import math

import pytest
import torch
from backends import DEVICE

from benchmarks.ops import minimax_step as bench_minimax_step
from maskprune.ops.backend import unavailable
from maskprune.ops.least_s_prox import ISAS
from maskprune.ops.minimax_step import (
    FIELDS,
    INDEX,
    Rates,
    cpp,
    initial_state,
    minimax_step_,
    reference,
)

# Shrink factors and scalars come from one exp and a few divisions and sums in float32.
RTOL = 5e-6
BACKENDS = [*(f"cpp:{isa}" for isa in ISAS), "triton"]
SPLITS = [(h, f) for h in range(0, 8) for f in range(0, 385, 64)]


def rates(**changes):
    given = dict(
        a_head=0.35,
        a_ffn=0.65,
        R_star=0.5,
        total_steps=200,
        eta1=0.1,
        eta1_end=10.0,
        eta2=0.1,
        eta3=0.5,
        eta4=0.02,
        reach=0.3,
        interval=4,
        lock_gap=0.05,
    )
    return Rates(**(given | changes))


@pytest.fixture
def step(backend):
    """(head, ffn, state, table, rates) in place, by one backend, on CPU tensors."""
    name, _, isa = backend.partition(":")
    device = DEVICE if name == "triton" else torch.device("cpu")

    def run(head, ffn, state, table, c):
        if isa:
            return cpp(head, ffn, state, table, c, isa)
        given = (head, ffn, state, table)
        there = [x.to(device) for x in given]
        minimax_step_(*there, c, backend=name)
        for mine, theirs in zip(given, there, strict=True):
            mine.copy_(theirs)

    return run


def legal_splits(c, D_head=8, D_ffn=448):
    kept = [
        split
        for split in SPLITS
        if 1 - c.a_head * split[0] / D_head - c.a_ffn * split[1] / D_ffn <= c.R_star
    ]
    return torch.tensor(kept, dtype=torch.float32)


def masks_of(seed, heads=(6, 8), ffn=(3, 448)):
    g = torch.Generator().manual_seed(seed)
    draw = lambda shape: 1.2 * torch.rand(shape, generator=g) - 0.1  # noqa: E731
    return draw(heads), draw(ffn)


def state_of(**values):
    state = initial_state(y0=1.0, z0=0.0)
    for name, value in values.items():
        state[INDEX[name]] = value
    return state


STATES = {
    "first": {},
    "ffn not due": {"step": 5, "y": 1.3, "z": 0.4, "r_ffn": 0.1, "s_ffn": 44.8, "s_head": 1.7},
    "ffn due": {"step": 8, "y": 1.3, "z": 0.4, "r_ffn": 0.1, "s_ffn": 44.8, "s_head": 1.7},
    "locks": {"step": 60, "y": 3, "z": 9, "r_head": 0.4, "s_head": 3.2, "r_ffn": 0.5, "s_ffn": 224},
    "locked": {
        "step": 90,
        "y": 3,
        "z": 9,
        "r_head": 0.5,
        "s_head": 4,
        "r_ffn": 4 / 7,
        "s_ffn": 256,
        "locked": 1,
        "locked_at": 70,
        "R": 0.45,
    },
    "failed": {"step": 9, "y": 3, "failed": 1},
    "last": {"step": 199, "y": 4, "z": 2, "r_ffn": 0.2, "s_ffn": 89.6},
}


def assert_same_step(step, head, ffn, state, table, c):
    expected = [x.clone() for x in (head, ffn, state)]
    reference(*expected, table, c)
    step(head, ffn, state, table, c)
    torch.testing.assert_close(head, expected[0], rtol=RTOL, atol=0, equal_nan=True)
    torch.testing.assert_close(ffn, expected[1], rtol=RTOL, atol=0, equal_nan=True)
    for name in FIELDS:
        torch.testing.assert_close(
            state[INDEX[name]],
            expected[2][INDEX[name]],
            rtol=RTOL,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("at", STATES)
def test_takes_the_reference_step(step, at, scheduled):
    c = rates(scheduled=scheduled, to_head=0.3, to_ffn=0.6)
    head, ffn = masks_of(seed=3)
    assert_same_step(step, head, ffn, state_of(**STATES[at]), legal_splits(c), c)


@pytest.mark.parametrize(
    "ffn", [(1, 1), (2, 63), (2, 1536), (2, 11008), (1, 18433), (1, 53248), (1, 53249)]
)
def test_any_ffn_width_takes_the_reference_step(step, ffn):
    c = rates()
    head, ffn = masks_of(seed=4, heads=(2, 3), ffn=ffn)
    D = ffn.shape[1]
    state = state_of(step=4, y=1.1, z=0.2, r_ffn=0.3, s_ffn=0.3 * D, s_head=1.2, r_head=0.4)
    table = torch.tensor([[2.0, math.ceil(0.7 * D)], [1.0, D - 1.0], [2.0, D - 1.0]])
    assert_same_step(step, head, ffn, state, table, c)


def test_models_without_prunable_heads_take_the_reference_step(step):
    c = rates(a_head=0.0, a_ffn=1.0)
    _, ffn = masks_of(seed=5)
    state = state_of(step=4, y=1.1, z=0.2, r_ffn=0.2, s_ffn=89.6)
    assert_same_step(step, torch.empty(0, 0), ffn, state, legal_splits(c)[-7:] * 1.0, c)


@pytest.mark.parametrize("where", ["head", "ffn"])
def test_a_nan_freezes_everything_and_says_so(step, where):
    c = rates()
    head, ffn = masks_of(seed=6)
    (head if where == "head" else ffn)[1, 2] = float("nan")
    before = head.clone(), ffn.clone()
    state = state_of(**STATES["ffn due"])
    expected = state.clone()
    expected[INDEX["failed"]] = 1
    step(head, ffn, state, legal_splits(c), c)
    assert torch.equal(head.view(torch.int32), before[0].view(torch.int32))
    assert torch.equal(ffn.view(torch.int32), before[1].view(torch.int32))
    assert torch.equal(state, expected)
    step(head.nan_to_num_(), ffn.nan_to_num_(), state, legal_splits(c), c)
    assert torch.equal(state, expected), "a failed run stays failed"


def test_a_whole_run_ends_in_a_legal_shape(step):
    c = rates(total_steps=20, interval=1, eta2=0.8, eta4=0.3)
    table, g = legal_splits(c), torch.Generator().manual_seed(1)
    head, ffn = torch.ones(2, 8), torch.ones(1, 448)
    state = state_of()
    for _ in range(12):
        head.add_(0.02 * torch.randn(head.shape, generator=g))
        ffn.add_(0.02 * torch.randn(ffn.shape, generator=g))
        step(head, ffn, state, table, c)
    v = dict(zip(FIELDS, state.tolist(), strict=True))
    assert v["locked"] == 1 and v["R"] <= c.R_star + 1e-6, v
    assert [v["s_head"], v["s_ffn"]] in table.tolist()
    assert v["step"] == 12 and not v["failed"]


def test_two_runs_agree_to_the_bit(step):
    c, results = rates(), []
    for _ in range(2):
        head, ffn = masks_of(seed=7)
        state = state_of(**STATES["ffn due"])
        step(head, ffn, state, legal_splits(c), c)
        results.append(torch.cat([head.flatten(), ffn.flatten(), state]))
    assert torch.equal(*results)


def test_errors_say_what_was_given_and_what_to_do():
    c = rates()
    head, ffn = masks_of(seed=8)
    state, table = state_of(), legal_splits(c)
    with pytest.raises(ValueError, match=r"state is \(3,\); expected \(16,\)"):
        minimax_step_(head, ffn, torch.zeros(3), table, c)
    with pytest.raises(TypeError, match="ffn is torch.float64; expected float32; use .float"):
        minimax_step_(head, ffn.double(), state, table, c)
    with pytest.raises(ValueError, match=r"ffn is on cpu with strides .* expected a contiguous"):
        minimax_step_(head, ffn.T.contiguous().T, state, table, c)
    if unavailable("triton", DEVICE) is None:
        wide = [x.to(DEVICE) for x in (torch.ones(1, 129), ffn, state, table)]
        with pytest.raises(ValueError, match="129 units; the Triton backend takes up to 128"):
            minimax_step_(*wide, c, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        minimax_step_(head, ffn, state, table, c, backend="cuda")


def test_the_definition_reads_no_value_on_the_host():
    c = rates()
    given = (*masks_of(seed=9), state_of(), legal_splits(c))
    minimax_step_(*(x.to("meta") for x in given), c)


def test_the_benchmark_measures_what_agrees_with_the_definition():
    rows = bench_minimax_step.rows_of("SmolLM2-135M", str(DEVICE), seed=0, rounds=1)
    providers = [row["provider"] for row in rows]
    assert providers[:2] == ["minimax_step_", "reference"], "a provider was refused"
    assert all(row["median_ms"] > 0 and row["speedup"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_replays():
    c = rates()
    head, ffn = (x.cuda() for x in masks_of(seed=9))
    state, table = state_of().cuda(), legal_splits(c).cuda()
    expected = [x.clone() for x in (head, ffn, state)]
    for _ in range(3):
        minimax_step_(*expected, table, c)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        minimax_step_(head, ffn, state, table, c)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        minimax_step_(head, ffn, state, table, c)
    for _ in range(2):
        graph.replay()
    for got, want in zip((head, ffn, state), expected, strict=True):
        assert torch.equal(got, want)
