"""`kill -9` during `maskprune prune` loses at most the steps since the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkpoints_on_disk import write_checkpoint, write_text
from safetensors.torch import load_file

from maskprune.cli import main

SETTINGS = (
    "--sparsity 0.3 --steps 60 --batch-size 2 --seq-len 16 --multiple_of 4 --warm-start-blocks 4 "
    "--lora-r 2 --output-r 4 --autocast none --learning-rate 3e-3 --save-steps 5 --reach 0.5"
).split()


def command(place: Path, out: str) -> list[str]:
    data = str(place / "text.jsonl")
    return ["prune", str(place / "model"), "-o", str(place / out), *SETTINGS, "--data", data]


def kill_when(appears: str, run: Path, arguments: list[str]) -> None:
    """Run the command in a process of its own until a path matches, then kill it."""
    start = "import sys; from maskprune.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 240
    while not any(run.glob(appears)):
        assert child.poll() is None, f"it ended by itself before {appears} was there"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_a_killed_run_never_looks_finished_and_resumes_to_the_same_model(tmp_path):
    write_checkpoint(tmp_path / "model", num_hidden_layers=3)
    write_text(tmp_path / "text.jsonl")
    assert main(command(tmp_path, "whole")) == 0

    out, run = tmp_path / "out", tmp_path / "out.run"
    # In the middle of a checkpoint that is being written, and between two of them.
    kill_when("checkpoint-10/*.safetensors", run, command(tmp_path, "out"))
    assert not out.exists()
    kill_when("checkpoint-30/complete.json", run, [*command(tmp_path, "out"), "--resume"])
    assert not out.exists()
    assert main([*command(tmp_path, "out"), "--resume"]) == 0
    assert not run.exists()
    for name in (
        "model.safetensors",
        "maskprune/masks.safetensors",
        "maskprune/adapter/adapter_model.safetensors",
    ):
        # Not the files' bytes: safetensors writes a header's entries in any order.
        ours, theirs = load_file(out / name), load_file(tmp_path / "whole" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
