"""Result rows: JSON lines, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MEASURED = (
    *("id", "date", "commit", "median_ms", "p10_ms", "p90_ms", "samples", "speedup"),
    *("gb_s", "tflop_s", "copy_gb_s", "of_copy", "over_lora"),
)


def row_id(row: Mapping[str, Any]) -> str:
    """Eight hex digits of the row's content, by which a page can name it."""
    content = json.dumps({k: v for k, v in row.items() if k != "id"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` at once: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_rows(
    path: Path | str,
    rows: Iterable[Mapping[str, Any]],
    *,
    overwrite: bool = False,
    ignore: Iterable[str] = MEASURED,
) -> list[dict[str, Any]]:
    """Add rows to the JSON lines file `path`, atomically.

    Existing rows stay; with `overwrite`, those equal in every field but `ignore` are replaced.
    Returns the rows as written, with their ids. Raises ValueError for a row without
    `checked: True` that holds a time: it was not compared with the reference.
    """
    path = Path(path)
    added = [dict(row) | {"id": row_id(row)} for row in rows]
    for row in added:
        if row.get("median_ms") is not None and row.get("checked") is not True:
            raise ValueError(f"write_rows: {row.get('op')} {row.get('provider')} was not checked")
    ignored = set(ignore)

    def case(row: Mapping[str, Any]) -> str:
        return json.dumps({k: v for k, v in row.items() if k not in ignored}, sort_keys=True)

    old = read_rows(path) if path.exists() else []
    replaced = {case(row) for row in added} if overwrite else set()
    every = [row for row in old if case(row) not in replaced] + added
    replace_file(path, "".join(json.dumps(row) + "\n" for row in every))
    return added


def show(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """The rows as an aligned text table; a value that is missing is a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    head = list(columns)
    lines = [head] + [[cell(row.get(column)) for column in head] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(v.rjust(w) for v, w in zip(r, widths, strict=True)) for r in lines)
