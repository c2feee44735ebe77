"""Result rows as a text table.

python -m benchmarks.harness benchmarks/results/prox.jsonl --columns R N provider median_ms
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness.rows import read_rows, show


def main() -> None:
    """Print the rows of a file, all columns in the order in which rows bring them."""
    parser = argparse.ArgumentParser(prog="benchmarks.harness", description=main.__doc__)
    parser.add_argument("file", type=Path, help="JSON lines file of rows")
    parser.add_argument("--columns", nargs="+", help="these columns alone")
    args = parser.parse_args()
    rows = read_rows(args.file)
    print(show(rows, args.columns or dict.fromkeys(key for row in rows for key in row)))


if __name__ == "__main__":
    main()
