"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OWN_FOLDER = "maskprune"


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a kill leaves the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def own_file(result: Path, name: str) -> Path:
    """Where a result keeps a file of ours: in its folder maskprune/, in older results at the top.

    Apart from the weights, because engines take every safetensors file at the top for weights.
    """
    inside, top = result / OWN_FOLDER / name, result / name
    return top if top.exists() and not inside.exists() else inside


def require_new_folder(path: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists and is not empty.

    Raises:
        ValueError: it exists; says how to go on.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {path} is a file; expected a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(
            f"output folder {path} exists and is not empty; choose another, or pass --overwrite"
        )


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at `path` whole, when the context ends well, or not at all.

    Yields a hidden sibling to write into. What a killed run left behind under that name is
    removed by the next run.
    """
    path = path.absolute()
    require_new_folder(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.incomplete"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        for file in building.rglob("*"):
            sync(file)
        sync(building)
        replaced = path.parent / f".{path.name}.replaced"
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        os.replace(building, path)
        sync(path.parent)
        # Also what a run killed between the two renames left behind.
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
