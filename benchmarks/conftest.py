"""`--rows FILE`: what pytest-benchmark times goes out as the rows of every other benchmark."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("maskprune benchmarks")
    group.addoption("--rows", type=Path, help="JSON lines file the rows are added to")
    group.addoption("--overwrite", action="store_true", help="replace rows of equal cases")


@pytest.fixture(scope="session")
def written_rows(pytestconfig: pytest.Config) -> Iterator[list[dict[str, Any]]]:
    """Rows of this session; written to --rows, if given, when it ends."""
    path = pytestconfig.getoption("--rows")
    if path:
        harness.fix_threads()
    rows: list[dict[str, Any]] = []
    yield rows
    if path and rows:
        harness.write_rows(path, rows, overwrite=pytestconfig.getoption("--overwrite"))


@pytest.fixture
def bench(benchmark: Any, written_rows: list[dict[str, Any]]) -> Callable[..., None]:
    """`harness.pytest_row` whose row is kept for --rows."""

    def run(*args: Any, **keywords: Any) -> None:
        if row := harness.pytest_row(benchmark, *args, **keywords):
            written_rows.append(row)

    return run
