"""The comparison of two checkouts times every operation of the package."""

from __future__ import annotations

import torch

from benchmarks.ops import compare
from maskprune import ops

# A type; the losses, which have a benchmark of their own; and what runs within `Minimax.step`.
ELSEWHERE = {"LeastS", "linear_distillation", "linear_kl", "minimax_step_"}


def test_every_operation_is_timed_and_every_case_runs():
    cases = compare.cases()
    assert {op for op, _ in cases} == set(ops.__all__) - ELSEWHERE | {"Minimax.step"}
    with torch.no_grad():
        for run in cases.values():
            run()
