"""Tiny checkpoints on disk and their streaming export, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import randomise, tiny_model
from safetensors.torch import load_file, save_file

from maskprune.hf.checkpoint_files import save_stock
from maskprune.streaming.export import export_checkpoint
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def prepared(folder: Path, family="llama", unit="kv_group", prune=(1, 8), save="20KB", **changes):
    """(source folder, masks file, model, masks) of a tiny random checkpoint."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder / "source", max_shard_size=save)
    masks = randomise(attach_masks(model, head_unit=unit), *prune)
    masks.save(folder / "masks.safetensors")
    return folder / "source", folder / "masks.safetensors", model, masks


def in_memory(folder: Path, model, masks, source: Path) -> Path:
    out = folder / "in_memory"
    out.mkdir()
    save_stock(export(model, masks), out, source=source, max_shard_size="12KB")
    return out


def stream(source: Path, masks: Path, out: Path, **options):
    options = {"max_shard_size": "12KB", "progress": False} | options
    return export_checkpoint(source, masks, out, **options)


def assert_same_files(given: Path, expected: Path) -> None:
    a, b = contents(given), contents(expected)
    assert a.pop("README.md", b"").startswith(b"---")
    b.pop("README.md", None)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def rewrite(source: Path, change) -> None:
    """Save the source's weights as one file after `change` of its state dict."""
    state = change(weights(source))
    for file in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        file.unlink()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def edit_config(source: Path, **changes) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
