"""A small model on disk, and what `maskprune prune` made of it."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest
from checkpoints_on_disk import PRUNE, write_checkpoint, write_text

from maskprune.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model", num_hidden_layers=3)
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def pruned(place) -> Path:
    out = place / "out"
    arguments = [str(place / "model"), "-o", str(out), *PRUNE, "--data", str(place / "text.jsonl")]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("always")
        code = main(["prune", *arguments])
    assert code == 0
    (place / "said.txt").write_text(said.getvalue())
    return out
