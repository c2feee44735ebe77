"""The solver's laws: on budget inside the run, uniform, bounded, whatever the landscape."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from maskprune.hf.shape import Shape
from maskprune.ops.minimax_step import INDEX
from maskprune.structured.budget import Budget
from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.saliency import start_masks

ARCHITECTURES = {
    "gqa-narrow": LlamaConfig(
        hidden_size=576, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, intermediate_size=1536,
    ),
    "mha": LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        head_dim=32, intermediate_size=688,
    ),
    "gqa-wide": Qwen2Config(
        hidden_size=384, num_hidden_layers=5, num_attention_heads=12, num_key_value_heads=2,
        intermediate_size=1024,
    ),
    "mqa": LlamaConfig(
        hidden_size=256, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=1,
        head_dim=32, intermediate_size=512,
    ),
}  # fmt: skip


def simulate(
    config, sparsity, T, *, unit="kv_group", warm=True, seed=0, lr=1e-2, kind=Minimax, **options
):
    """Noisy quadratic losses on the masks under Adam, as a run without a model."""
    g = torch.Generator().manual_seed(seed)
    budget = Budget(config, sparsity, head_unit=unit)
    shape = budget.shape
    masks = Masks(shape, unit, config.model_type)
    curvature = [torch.exp(torch.randn(m.shape, generator=g)) for m in (masks.head, masks.ffn)]
    if warm:
        head = torch.exp(torch.randn(shape.layers, shape.heads, generator=g)) * 20
        start_masks(masks, budget, (head, curvature[1]))
    reach = 0.1 if warm else 0.6
    solver = kind(masks, budget, T, **({"reach": reach} | options))
    optimizer = torch.optim.AdamW(masks.parameters(), lr=lr, weight_decay=0.0)
    for t in range(T):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (1 - t / T) / 0.1)
        for m, c in zip(masks.parameters(), curvature, strict=True):
            noise = 0.5 * c.sqrt() * torch.randn(m.shape, generator=g)
            m.grad = -c * (1 - m.detach()) + noise
        optimizer.step()
        solver.step()
    return masks, budget, solver


def test_autograd_knows_that_a_step_changed_the_masks():
    config = ARCHITECTURES["gqa-narrow"]
    budget = Budget(config, 0.5)
    masks = Masks(budget.shape, "kv_group", config.model_type)
    losses = [m.square().sum() for m in (masks.head, masks.ffn)]
    Minimax(masks, budget, 100).step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("T", [100, 300])
@pytest.mark.parametrize("sparsity", [0.2, 0.25, 0.5])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_budget_is_reached_inside_the_run_with_vanished_masks(name, warm, sparsity, T):
    masks, budget, solver = simulate(ARCHITECTURES[name], sparsity, T, warm=warm)
    now = solver.read()
    assert now["locked"] and now["locked_at"] < 0.9 * T
    assert now["R"] <= budget.R_star + 1e-6
    left = solver.finish()
    assert max(left.values()) < 1e-2
    split = solver.split()
    assert ((masks.ffn == 0).sum(1) == split.ffn).all()
    assert ((masks.head == 0).sum(1) == split.head).all()
    assert any(split.head == s.head and split.ffn == s.ffn for s in budget.splits)


@pytest.mark.parametrize("T", [20, 2500])
def test_very_short_and_long_runs_end_on_budget_too(T):
    _, budget, solver = simulate(ARCHITECTURES["mqa"], 0.3, T)
    assert solver.locked and solver.read()["R"] <= budget.R_star + 1e-6
    assert max(solver.residuals().values()) < 1e-2


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_scheduled_mode_ends_on_budget_with_near_equal_fractions(unit):
    config = ARCHITECTURES["mha" if unit == "kv_group" else "gqa-wide"]
    _, budget, solver = simulate(config, 0.5, 100, unit=unit, mode="scheduled")
    split = solver.split()
    assert split.R <= budget.R_star + 1e-6
    assert abs(split.head / budget.head_units - split.ffn / budget.ffn_units) < 0.3


def test_a_warm_start_puts_the_cheap_kind_first():
    config = ARCHITECTURES["mha"]
    for scale, expected in ((1e6, 0), (1e-6, None)):
        budget = Budget(config, 0.2)
        masks = Masks(budget.shape, "kv_group", "llama")
        g = torch.Generator().manual_seed(0)
        head = scale * torch.rand(4, 8, generator=g)
        start_masks(masks, budget, (head, torch.rand(4, 688, generator=g)))
        solver = Minimax(masks, budget, 100, reach=0.2)
        for _ in range(100):
            solver.step()
        split = solver.split()
        assert split.head == 0 if expected == 0 else split.head >= 4
        far = masks.ffn.max() if expected == 0 else masks.ffn.min()
        assert far == 1.0, "units far from the budget are left as they are"


def test_r_never_falls_below_the_budget_and_never_jumps():
    config, T = ARCHITECTURES["gqa-narrow"], 100
    budget = Budget(config, 0.5)
    masks = Masks(budget.shape, "kv_group", "llama")
    solver = Minimax(masks, budget, T, reach=0.5)
    before = 1.0
    for _ in range(T):
        solver.step()
        now = solver.read()
        if now["locked"]:
            break
        assert now["R"] >= budget.R_star - 1e-6
        assert before - now["R"] <= 1.25 * 0.5 / (0.5 * T) + 1e-6
        before = now["R"]
    assert now["locked"]


def test_nan_masks_stop_the_run_clearly_and_are_left_as_they_were():
    config = ARCHITECTURES["mqa"]
    masks = Masks(Budget(config, 0.3).shape, "kv_group", "llama")
    solver = Minimax(masks, Budget(config, 0.3), 100)
    solver.step()
    masks.ffn.data[1, 5] = float("nan")
    kept = masks.ffn.data.clone()
    before = solver.state.clone()
    solver.step()
    assert torch.equal(masks.ffn.data.nan_to_num(-1), kept.nan_to_num(-1))
    before[INDEX["failed"]] = 1.0
    assert torch.equal(solver.state, before)
    with pytest.raises(RuntimeError, match="became NaN at step 1.*lower learning rate"):
        solver.require_healthy()


def sparsity_norm(masks, solver):
    """S of the masks as they are, at the s of now."""
    now, budget = solver.read(), solver.budget
    total = 0.0
    for m, s, a in (
        (masks.head, now["s_head"], budget.a_head),
        (masks.ffn, now["s_ffn"], budget.a_ffn),
    ):
        least = m.detach().sort(dim=1).values[:, : math.floor(s)]
        total += a * float(least.pow(2).sum(1).mean()) / m.shape[1]
    return total


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_y_from_the_prox_own_s_instead_of_the_new_s_ends_in_the_same_shape(sparsity):
    """Algorithm 1 prints S at the new s, which would cost a second selection every step."""

    class Literal(Minimax):
        def step(self):
            y = self.read()["y"]
            super().step()
            self.state[INDEX["y"]] = y + self.rates.eta3 * sparsity_norm(self.masks, self)

    ends = {}
    for kind in (Minimax, Literal):
        masks, _, solver = simulate(ARCHITECTURES["gqa-narrow"], sparsity, 300, kind=kind)
        now = solver.read()
        solver.finish()
        split = (now["s_head"], now["s_ffn"])
        ends[kind] = split, now["locked_at"], masks.ffn.detach() == 0
    (split, at, gone), (literal_split, literal_at, literal_gone) = ends.values()
    # Measured: the literal order grows y sooner and locks up to 2 % of the run later.
    assert split == literal_split and abs(at - literal_at) <= 0.03 * 300
    agreement = float((gone & literal_gone).sum() / gone.sum())
    assert agreement > 0.9, "chance alone would give the pruned fraction"


def test_saved_state_continues_and_other_settings_are_refused():
    config = ARCHITECTURES["mqa"]
    budget = Budget(config, 0.3)
    masks = Masks(budget.shape, "kv_group", "llama")
    first = Minimax(masks, budget, 100)
    for _ in range(7):
        first.step()
    again = Minimax(masks, budget, 100)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again.state, first.state)
    with pytest.raises(ValueError, match="other settings.*eta2"):
        Minimax(masks, budget, 50).load_state_dict(first.state_dict())


def test_wrong_calls_say_what_to_do():
    config = ARCHITECTURES["mqa"]
    budget = Budget(config, 0.3)
    masks = Masks(budget.shape, "kv_group", "llama")
    with pytest.raises(ValueError, match="total_steps is 5; the schedule needs at least 20"):
        Minimax(masks, budget, 5)
    with pytest.raises(ValueError, match="mode is 'x'; expected one of minimax, scheduled"):
        Minimax(masks, budget, 100, mode="x")
    with pytest.raises(ValueError, match="make both from the same model"):
        Minimax(Masks(Shape(1, 1, 1, 8, 8), "kv_group", "llama"), budget, 100)
    with pytest.raises(ValueError, match="give both the same head_unit"):
        Minimax(Masks(budget.shape, "query_head", "llama"), budget, 100)
    with pytest.raises(RuntimeError, match="budget is not reached.*train to the end"):
        Minimax(masks, budget, 100).finish()


@pytest.mark.parametrize("head, ffn", [(0.0, 0.5), (1 / 3, 0.25)])
@pytest.mark.parametrize("mode", ["minimax", "scheduled"])
def test_a_split_by_hand_binds_from_the_first_step(head, ffn, mode):
    """No kind loses more on the way than it loses in the end, and kept masks stay up."""
    config = ARCHITECTURES["gqa-narrow"]
    budget = Budget(config, head_sparsity=head, ffn_sparsity=ffn)
    masks = Masks(budget.shape, "kv_group", config.model_type)
    solver = Minimax(masks, budget, 60, mode=mode)
    most = {"head": 0.0, "ffn": 0.0}
    for _ in range(60):
        masks.ffn.data.sub_(1e-6)
        solver.step()
        now = solver.read()
        most = {k: max(v, now[f"r_{k}"]) for k, v in most.items()}
    (split,) = budget.splits
    assert (solver.split().head, solver.split().ffn) == (split.head, split.ffn)
    assert most["head"] == pytest.approx(split.head / 3, abs=1e-6)
    assert most["ffn"] == pytest.approx(split.ffn / 1536, abs=1e-6)
    assert ((masks.head > 0.9).sum(1) == 3 - split.head).all()
    assert ((masks.ffn > 0.9).sum(1) == 1536 - split.ffn).all()


def test_no_unit_shrinks_before_it_is_due_as_a_whole():
    """Two thirds of a KV group are no group: its mask is left alone."""
    config = ARCHITECTURES["gqa-narrow"]
    budget = Budget(config, 0.2)
    masks = Masks(budget.shape, "kv_group", config.model_type)
    solver = Minimax(masks, budget, 100)
    for s_head, shrunk in ((0.0, 0), (0.67, 0), (1.0, 1), (1.9, 1), (2.0, 2)):
        masks.head.data.fill_(1.0)
        masks.ffn.data.sub_(1e-6)
        solver.state[INDEX["s_head"]] = s_head
        solver.step()
        assert ((masks.head < 1).sum(1) == shrunk).all(), s_head


def test_settled_masks_are_0_and_1_and_stay():
    masks, _, solver = simulate(ARCHITECTURES["mha"], 0.25, 100)
    order = masks.ffn.detach().sort(dim=1, stable=True).indices
    left = solver.settle()
    assert set(masks.ffn.unique().tolist()) | set(masks.head.unique().tolist()) <= {0.0, 1.0}
    split = solver.split()
    assert (masks.ffn.gather(1, order[:, : split.ffn]) == 0).all()
    assert ((masks.ffn == 0).sum(1) == split.ffn).all()
    assert ((masks.head == 0).sum(1) == split.head).all()
    assert left["ffn"] > 0 and solver.residuals() == {"head": 0.0, "ffn": 0.0}
    masks, _, resumed = simulate(ARCHITECTURES["mha"], 0.25, 100)
    resumed.load_state_dict(solver.state_dict())
    assert solver.finish() == resumed.finish() == left


def test_masks_do_not_settle_before_the_budget_is_reached():
    config = ARCHITECTURES["mha"]
    budget = Budget(config, 0.25)
    solver = Minimax(Masks(budget.shape, "kv_group", config.model_type), budget, 100)
    with pytest.raises(RuntimeError, match="the budget is not reached"):
        solver.settle()
