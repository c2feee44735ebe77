"""The picture of perplexity over tokens draws the rows that it says it draws."""

from __future__ import annotations

from benchmarks.harness.rows import read_rows
from benchmarks.quality import picture


def test_seeds_stand_together_in_the_order_of_tokens_and_other_settings_are_left_out():
    row = {"provider": "taylor-split-compensated", "sparsity": 0.5, "learning_rate": 5e-3}
    rows = [
        {"provider": "dense", "ppl_held_out": 42.98},
        row | {"tokens_read": 2000, "ppl_held_out": 49.0},
        row | {"tokens_read": 1000, "ppl_held_out": 51.0},
        row | {"tokens_read": 1000, "ppl_held_out": 52.0},
        row | {"tokens_read": 1000, "ppl_held_out": 99.0, "learning_rate": 1e-3},
        row | {"tokens_read": 1000, "ppl_held_out": 99.0, "sparsity": 0.2},
        row | {"tokens_read": 1000, "ppl_held_out": 99.0, "train": "weights"},
        row
        | {"tokens_read": 1000, "ppl_held_out": 48.0, "train": "weights", "learning_rate": 2e-3},
        row | {"tokens_read": 1000, "ppl_held_out": 47.0, "refine_passes": 3},
    ]
    found = picture.points(rows[1:], 0.5)
    assert found == {
        "taylor-split-compensated": {1000: [51.0, 52.0], 2000: [49.0]},
        "taylor-split-compensated, weights": {1000: [48.0]},
        "taylor-split-compensated, refined": {1000: [47.0]},
    }
    assert list(found["taylor-split-compensated"]) == [1000, 2000]


def test_the_committed_rows_make_a_picture(tmp_path):
    rows = [row for row in read_rows(picture.RESULTS) if row["provider"] != "dense"]
    found = picture.points(rows, 0.5)
    assert "taylor-split-compensated" in found and "maskprune-shuffled" in found
    picture.draw(found, 42.98, tmp_path / "quality.svg")
    assert "<svg" in (tmp_path / "quality.svg").read_text()
