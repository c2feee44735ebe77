"""The quality benchmark of structured pruning: runs that are killed and run again."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from models import tiny_model, tokens
from transformers import TrainerCallback

from benchmarks.quality import structured


class Steps(TrainerCallback):
    """Counts the steps of a run, and kills it before one."""

    def __init__(self, killed_at=None):
        self.killed_at, self.made = killed_at, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.killed_at:
            raise KeyboardInterrupt
        self.made += 1


@pytest.fixture
def one_run(monkeypatch):
    """Runs an arm on a tiny model; returns its row, its weights and how many steps it made."""
    monkeypatch.setattr(structured, "load", lambda name: (tiny_model("llama"), None))
    monkeypatch.setattr(structured, "demo_text", lambda: (Path(), Path()))
    monkeypatch.setattr(structured, "token_blocks", lambda *_, **__: tokens(160, 16))
    prune = structured.prune

    def run(runs, arm="taylor-split-compensated", killed_at=None, steps=60, **chosen):
        steps_made, weights = Steps(killed_at), {}

        def watched(*given, callbacks, **kept):
            return prune(*given, callbacks=[*callbacks, steps_made], **kept)

        def look(args, model, *_):
            weights.update(model.state_dict())
            return {}

        monkeypatch.setattr(structured, "prune", watched)
        monkeypatch.setattr(structured, "qualities", look)
        chosen = {"compensation_tokens": 256, "warm_start_blocks": 4} | chosen
        args = argparse.Namespace(
            **{"model": "tiny", "sparsity": 0.5, "steps": steps, "batch_size": 2, "seq_len": 16},
            **{"learning_rate": None, "quiet": True, "runs": runs, "set": list(chosen.items())},
        )
        row, _ = structured.one_run(args, arm, 1, structured.Shape(0, 0, 1, 0, 16))
        return row, weights, steps_made.made

    return run


@pytest.mark.parametrize(
    ("arm", "chosen"),
    [
        ("taylor-split-compensated", {}),
        ("taylor-split-compensated", {"train": "weights"}),
        ("maskprune", {"reach": 0.3}),
        ("maskprune-shuffled", {"reach": 0.9}),
    ],
)
def test_a_killed_run_goes_on_to_the_bit_and_a_finished_one_is_only_measured(
    tmp_path, one_run, monkeypatch, arm, chosen
):
    whole, weights, steps = one_run(None, arm, **chosen)
    assert steps == 60 and whole["train_seconds"] > 0
    monkeypatch.setattr(structured, "machine", lambda device: {"commit": "first"})
    with pytest.raises(KeyboardInterrupt):
        one_run(tmp_path, arm, killed_at=55, **chosen)
    monkeypatch.setattr(structured, "machine", lambda device: {"commit": "later"})
    again, same, steps = one_run(tmp_path, arm, **chosen)
    assert steps == 10
    measured, also, steps = one_run(tmp_path, arm, **chosen)
    assert steps == 0
    for row, tensors in ((again, same), (measured, also)):
        assert row == whole | {"train_seconds": None, "commit": "first"}
        assert tensors.keys() == weights.keys()
        assert all(torch.equal(tensors[n], w) for n, w in weights.items())


def test_a_run_begun_anew_has_the_commit_that_it_began_anew_at(tmp_path, one_run, monkeypatch):
    monkeypatch.setattr(structured, "machine", lambda device: {"commit": "first"})
    with pytest.raises(KeyboardInterrupt):
        one_run(tmp_path, killed_at=5)
    monkeypatch.setattr(structured, "machine", lambda device: {"commit": "later"})
    row, _, steps = one_run(tmp_path)
    assert steps == 60 and row["commit"] == "later"
    (run,) = tmp_path.iterdir()
    (run / "commit.txt").unlink()
    assert one_run(tmp_path)[0]["commit"] == "unknown"


def test_other_settings_another_model_or_text_take_another_folder(tmp_path, one_run, monkeypatch):
    one_run(tmp_path)
    for changed in ({"steps": 61}, {"lm_weight": 0.0}, {"arm": "random-split-compensated"}):
        assert one_run(tmp_path, **changed)[2] == changed.get("steps", 60)
    monkeypatch.setattr(structured, "load", lambda name: (tiny_model("llama", seed=1), None))
    assert one_run(tmp_path)[2] == 60
    monkeypatch.setattr(structured, "token_blocks", lambda *_, **__: tokens(160, 16, seed=1))
    assert one_run(tmp_path)[2] == 60
    assert len(list(tmp_path.iterdir())) == 6
