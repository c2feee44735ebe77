"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Code that reads JSON knows the types of its values.
JsonObject = dict[str, Any]

OWN_FOLDER = "maskprune"
FILE_LIST = "files.json"
STOCK_NAME = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|README\.md|(vocab|merges)\.txt"
    r"|(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json"
    r"|(tokenizer|spiece)\.model|chat_template\.(jinja|json)|LICENSE(\.txt|\.md)?|USE_POLICY\.md|NOTICE"
)


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
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def own_file(result: Path, name: str) -> Path:
    """Where a result keeps one of maskprune's own files: in maskprune/; in older ones at the top.

    Apart from the weights, because engines read every safetensors file at the top as weights.
    """
    inside, top = result / OWN_FOLDER / name, result / name
    return top if top.exists() and not inside.exists() else inside


def adapter_beside(masks: Path) -> Path | None:
    """The adapter that a run kept; None where it kept none.

    Args:
        masks: the run's folder, or the masks file in it.
    """
    adapter = own_file(masks if masks.is_dir() else masks.parent, "adapter")
    return adapter if adapter.is_dir() else None


def output_folder(name: str | Path) -> Path:
    """The absolute path that an output folder is written to; a link to a folder is followed.

    Raises:
        ValueError: a file, a link to nothing, a mount point, or a place that cannot be written.
    """
    path = Path(os.path.abspath(Path(name).expanduser()))
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"output {name} is a link to {os.readlink(path)}, which does not exist; make that "
            "folder or choose another"
        )
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {name} is a file; expected a folder that does not exist yet")
    if os.path.ismount(path):
        raise ValueError(f"output {name} is a mount point; choose a folder in it")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
        raise ValueError(
            f"output {name}: {parent} is a file; choose a folder whose parents are folders"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"output {name}: {parent} cannot be written; choose a folder that can be written"
        )
    return path


def require_new_folder(
    path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Refuse an output folder that exists and is not empty, unless it may be overwritten.

    Args:
        path: see `output_folder`.
        inputs: what the run reads; names that are not local paths, and None, are skipped.

    Raises:
        ValueError: it holds an input, or a file that is not a result's; or `overwrite` is not
            given.
    """
    for name in inputs:
        source = Path(name or "").expanduser().resolve()
        if name and source.exists() and path.resolve() in (source, *source.parents):
            raise ValueError(
                f"output folder {path} is or holds {name}, which the run reads; choose another"
            )
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"output folder {path} exists and is not empty; choose another, or pass --overwrite"
        )
    if (strange := _not_of_a_result(path)) is not None:
        raise ValueError(
            f"output folder {path} holds {strange}, which maskprune did not write, as far as "
            "it knows; --overwrite replaces only its results: move it, or choose another folder"
        )


def _not_of_a_result(folder: Path) -> str | None:
    """A file below `folder` that maskprune did not write; None where it wrote all of them.

    A run's result lists its files. An exported one has no list, only the tag in its card: there
    any name of a stock file counts as written by maskprune.
    """
    own: set[str] = set()
    with contextlib.suppress(OSError, ValueError, TypeError):
        own = set(json.loads((folder / OWN_FOLDER / FILE_LIST).read_text()))
    card = folder / "README.md"
    exported = not own and card.is_file() and "\n- maskprune\n" in card.read_text(errors="replace")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        known = name in own or name == "report.html"
        known |= name.startswith("report/") and path.suffix == ".png"
        known |= exported and STOCK_NAME.fullmatch(name) is not None
        if not known and (path.is_symlink() or not path.is_dir()):
            return name
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the output folder `path` against other processes; a lock ends with its process.

    Parent folders that it had to make are removed again if they are still empty at the end.

    Raises:
        ValueError: another process writes to `path`.
    """
    if int(os.environ.get("RANK", "0")):
        # The first process of a distributed run holds it for all.
        yield
        return
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    try:
        descriptor = _lock(lock, path)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def _lock(lock: Path, path: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another maskprune is writing to {path}; wait for it, or choose another output "
                "folder"
            ) from None
        except OSError:
            # A file system without locks.
            return descriptor
        # Its holder may have removed the file between the two calls.
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            return descriptor
        os.close(descriptor)


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuse to start writing what the disk cannot hold.

    Raises:
        ValueError: fewer than `size` bytes are free where `folder` is or will be.
    """
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free
    if free < size:
        raise ValueError(
            f"{what} need about {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free on the disk "
            f"of {folder}; free some, or choose another output folder"
        )


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears at `path` whole, when the context ends well, or not at all.

    Yields a hidden sibling to write into. What a killed run left behind under that name is
    removed by the next run. Where there is a folder maskprune/, a list of all files goes into it,
    which later tells `overwrite` what it may replace.
    """
    path = path.absolute()
    require_new_folder(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.incomplete"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        if (building / OWN_FOLDER).is_dir():
            listed = building / OWN_FOLDER / FILE_LIST
            listed.touch()
            files = [file for file in building.rglob("*") if file.is_file()]
            write_json(listed, sorted(file.relative_to(building).as_posix() for file in files))
        # The permissions that the umask gives; safetensors lets only the owner read its files.
        mode = building.stat().st_mode & 0o666
        for file in building.rglob("*"):
            if file.is_file():
                file.chmod(mode)
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
