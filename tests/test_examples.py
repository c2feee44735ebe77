"""Each example runs as printed, in under 40 lines of code, and leaves a stock model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints_on_disk import WORDS, write_checkpoint
from rank_jobs import script
from ranks import run_ranks

from maskprune.two_four import is_two_four, oriented, prunable

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_runs_and_its_result_loads(example, tmp_path):
    from transformers import AutoModelForCausalLM

    write_checkpoint(
        tmp_path / "model",
        max_position_embeddings=128,
        hidden_size=64,
        head_dim=16,
        intermediate_size=96,
    )
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 40))
    arguments = ["model", "text.txt", "out", "24"]
    if example.stem == "ddp_loop":
        run_ranks(2, script, tmp_path / "ranks", example, tmp_path, arguments)
    else:
        command = [sys.executable, str(example), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if example.stem == "two_four_loop":
        assert all(is_two_four(oriented(module)) for module in prunable(small).values())
        return
    assert small.config.intermediate_size < 96 or small.config.num_attention_heads < 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_the_example_is_short(example):
    lines = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
