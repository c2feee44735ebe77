"""The memory benchmark finds every phase of a run."""

from __future__ import annotations

import sys

import pytest
from checkpoints_on_disk import write_checkpoint, write_text

from benchmarks.quality import memory


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of the peak")
@pytest.mark.parametrize("method", ["auto", "maskprune"])
def test_every_phase_of_a_prune_has_its_peak(tmp_path, method):
    write_checkpoint(tmp_path / "model", num_hidden_layers=3)
    write_text(tmp_path / "text.jsonl")
    options = "--sparsity 0.3 --batch-size 2 --seq-len 16 --multiple_of 4 --warm-start-blocks 4"
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl"), *options.split()]
    arguments += ["--method", method]
    found = memory.measure(arguments, steps=20)
    assert set(found) == {*memory.PHASES, "training", "all"}
    for row in found.values():
        assert 0.05 < row["peak_rss_gb"] <= found["all"]["peak_rss_gb"] and row["seconds"] > 0
