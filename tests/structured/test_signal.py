"""What the trace says of learning: units that moved across the cut, and signal over noise."""

from __future__ import annotations

import torch
from models import tiny_config

from maskprune.structured.budget import Budget
from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax
from maskprune.structured.signal import MaskSignal


def solver_of(s_ffn: int):
    config = tiny_config("llama")
    budget = Budget(config, 0.3, multiple_of=4)
    masks = Masks(budget.shape, "kv_group", "llama")
    solver = Minimax(masks, budget, 100)
    from maskprune.ops.minimax_step import INDEX

    solver.state[INDEX["s_ffn"]] = s_ffn
    return masks, solver


def test_moved_counts_units_across_the_first_cut_and_how_far():
    masks, solver = solver_of(4)
    rows, units = masks.ffn.shape
    start = {
        "head": masks.head.detach().clone(),
        "ffn": torch.arange(units).repeat(rows, 1) / units,
    }
    masks.ffn.data.copy_(start["ffn"])
    signal = MaskSignal(masks, start)
    assert signal.row(solver)["moved_ffn"] == 0
    # The unit of rank 9 takes the place of that of rank 0, in one row.
    masks.ffn.data[0, 9], masks.ffn.data[0, 0] = 0.0, 1.0
    row = signal.row(solver)
    assert row["moved_ffn"] == 1 / (4 * rows)
    assert abs(row["moved_rank_ffn"] - (9 - 3) / units) < 1e-6
    assert "signal_ffn" not in row, "no gradient was counted"


def test_the_signal_tells_a_direction_from_noise_and_forgets_after_a_row():
    masks, solver = solver_of(4)
    start = {name: m.detach().clone() for name, m in masks.named_parameters()}
    signal = MaskSignal(masks, start)
    g = torch.Generator().manual_seed(0)

    def over(direction: float) -> float:
        for _ in range(50):
            masks.ffn.grad = direction + torch.randn(masks.ffn.shape, generator=g)
            signal.add_gradients()
        return signal.row(solver)["signal_ffn"]

    noise, clear = over(0.0), over(1.0)
    assert 0.1 < noise < 1.5 and clear > 20
    assert 0.1 < over(0.0) < 1.5
