"""What a run shows outside its steps, and what that does to the steps' rate and time left."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, tiny_model

from maskprune.config import PruneConfig
from maskprune.structured import prune as loop
from maskprune.training import progress
from maskprune.training.progress import Progress, reporting
from maskprune.training.trace import TraceCallback


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_a_report_is_a_line_every_ten_seconds_with_the_time_left(clock, capsys):
    with reporting("ranking the units", 16_384, quiet=False) as report:
        for done in range(1, 11):
            clock.now += 6.0
            report(done, 10)
    assert capsys.readouterr().err.splitlines() == [
        "ranking the units on 16,384 tokens",
        "batch 2/10 left 00:00:48",
        "batch 4/10 left 00:00:36",
        "batch 6/10 left 00:00:24",
        "batch 8/10 left 00:00:12",
        "batch 10/10 left 00:00:00",
    ]


def test_a_quiet_report_says_nothing(capsys):
    with reporting("ranking the units", 16_384, quiet=True) as report:
        report(1, 1)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_report_is_a_bar_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with reporting("ranking the units", 16_384, quiet=False) as report:
        report(1, 2)
        report(2, 2)
    assert "2/2" in capsys.readouterr().err


def test_time_outside_the_steps_is_not_in_the_time_left(clock, capsys):
    shown = Progress(10)
    clock.now += 10.0
    shown.skip(8.0)
    shown.show(1, "")
    assert capsys.readouterr().err == "step 1/10 left 00:00:18\n"


def test_compensation_counts_neither_in_tokens_per_second_nor_in_the_time_left(
    clock, tmp_path, monkeypatch
):
    """Every step takes a second, compensation an hour."""
    slow, advance = loop.compensate, TraceCallback.on_step_end

    def compensate(*arguments, **kw):
        clock.now += 3600.0
        return slow(*arguments, **kw)

    def on_step_end(self, *arguments, **kw):
        clock.now += 1.0
        advance(self, *arguments, **kw)

    monkeypatch.setattr(loop, "compensate", compensate)
    monkeypatch.setattr(TraceCallback, "on_step_end", on_step_end)
    config = PruneConfig(
        sparsity=0.3,
        steps=20,
        batch_size=2,
        seq_len=16,
        warm_start_blocks=2,
        compensation_tokens=32,
        logging_steps=4,
        autocast="none",
        multiple_of=4,
    )
    blocks = torch.randint(3, VOCAB, (20, 16))
    result = loop.prune(tiny_model("llama"), None, blocks, config, run_dir=tmp_path, quiet=True)
    assert clock.now >= 3600
    assert all(row["tokens_per_s"] == pytest.approx(32) for row in result.trace)
