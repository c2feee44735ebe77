"""The benchmarks' own ground: interleaved timing, checked rows, one-line errors."""

import gc
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Times, interleaved, measure, read_rows, same_as, timing, write_rows
from benchmarks.harness.__main__ import main as print_table

ROOT = Path(__file__).parents[2]
ROW = {"op": "double", "provider": "mul", "N": 4, "median_ms": 1.0, "checked": True}


@pytest.mark.parametrize(
    ("samples", "q", "expected"),
    [((3.0, 1.0, 2.0), 0.5, 2.0), ((1.0, 2.0), 0.5, 1.5), ((5.0,), 0.9, 5.0), ((0, 10), 0.1, 1.0)],
)
def test_quantiles_interpolate_between_the_nearest_samples(samples, q, expected):
    assert math.isclose(Times(samples).quantile(q), expected)


def test_every_provider_is_sampled_once_a_round_and_never_twice_in_a_row_by_chance_of_order():
    calls = []
    providers = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(providers, warmup=1, rounds=10, min_sample_ms=0.0)
    assert {name: len(t.samples) for name, t in times.items()} == {"a": 10, "b": 10, "c": 10}
    rounds = [calls[3 + 3 * i : 6 + 3 * i] for i in range(10)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_a_fast_call_is_repeated_until_the_sample_is_long_enough():
    count = 0

    def call():
        nonlocal count
        count += 1

    interleaved({"a": call}, warmup=1, rounds=1, min_sample_ms=1.0)
    assert count > 100


def test_before_runs_ahead_of_each_call():
    events = []
    interleaved(
        {"a": lambda: events.append("call")},
        before=lambda: events.append("before"),
        warmup=1,
        rounds=3,
    )
    assert events == ["before", "call"] * 4


def test_max_seconds_ends_the_rounds_but_not_before_the_fifth():
    times = interleaved({"a": lambda: None}, rounds=1000, max_seconds=0.0)
    assert len(times["a"].samples) == 5


def test_a_ratio_is_taken_within_rounds_so_a_slow_spell_cancels():
    slow, fast = Times((2.0, 2.2, 6.0, 6.0, 6.0)), Times((1.0, 1.0, 3.0, 3.0, 1.0))
    assert harness.ratio([slow], [fast]) == 2.0
    assert harness.ratio([slow, slow], [fast]) == 2.0
    assert harness.ratio([Times((1.0,)), Times((3.0,))], [Times((1.0,))]) == 2.0


def test_no_garbage_is_collected_while_calls_are_timed():
    states = []
    interleaved({"a": lambda: states.append(gc.isenabled())}, warmup=1, rounds=2)
    assert not any(states) and gc.isenabled()


def test_a_wrong_provider_has_no_row(capsys):
    x = torch.arange(4.0)
    rows = measure(
        "double",
        {"mul": lambda: x * 2, "wrong": lambda: x * 3},
        check=same_as(x * 2),
        sizes={"N": 4},
        bytes_moved=32,
        rounds=2,
    )
    assert [row["provider"] for row in rows] == ["mul"]
    assert "double: wrong is wrong, no row" in capsys.readouterr().err
    assert {"checked", "median_ms", "p10_ms", "p90_ms", "gb_s", "threads", "seed", "date"} <= set(
        rows[0]
    )


def test_a_row_that_was_not_checked_is_refused(tmp_path):
    with pytest.raises(ValueError, match="double mul was not checked"):
        write_rows(tmp_path / "rows.jsonl", [{**ROW, "checked": False}])
    assert list(tmp_path.iterdir()) == []


def test_rows_are_added_kept_and_replaced_only_on_request(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = write_rows(path, [ROW])
    assert read_rows(path) == first and len(first[0]["id"]) == 8
    write_rows(path, [{**ROW, "median_ms": 2.0}, {**ROW, "N": 8}])
    assert [row["median_ms"] for row in read_rows(path)] == [1.0, 2.0, 1.0]
    write_rows(path, [{**ROW, "median_ms": 3.0}], overwrite=True)
    assert [(row["N"], row["median_ms"]) for row in read_rows(path)] == [(8, 1.0), (4, 3.0)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_rows_prints_as_a_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [ROW, {**ROW, "N": 8, "speedup": 2.5}])
    monkeypatch.setattr("sys.argv", ["rows", str(path), "--columns", "op", "N", "speedup"])
    print_table()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["op", "N", "speedup"],
        ["double", "4", "-"],
        ["double", "8", "2.5"],
    ]


def test_pytest_benchmark_gives_the_same_row_or_only_checks(benchmark):
    x = torch.arange(4.0)
    row = harness.pytest_row(benchmark, "double", "mul", lambda: x * 2, check=same_as(x * 2), N=4)
    if benchmark.disabled:
        assert row is None
    else:
        assert row["checked"] and row["median_ms"] > 0 and row["N"] == 4
        json.dumps(row)


def test_pytest_benchmark_does_not_time_what_is_wrong(benchmark):
    x = torch.arange(4.0)
    with pytest.raises(AssertionError):
        harness.pytest_row(benchmark, "double", "mul", lambda: x, check=same_as(x * 2))
    benchmark(lambda: None)


def test_what_pytest_benchmark_times_is_written_as_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
           "benchmarks/ops/test_ops.py", "-k", "gather_rows and reference",
           "--benchmark-max-time=0.01"]  # fmt: skip
    # Under xdist, whose workers' environment would switch the timing off.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    for more in ([], ["--overwrite"]):
        subprocess.run(
            [*run, "--rows", path, *more], cwd=ROOT, env=env, check=True, capture_output=True
        )
        rows = read_rows(path)
        assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
        assert all(row["op"] == "gather_rows" and row["checked"] and row["id"] for row in rows)
    subprocess.run([*run, "--rows", path, "--benchmark-disable"], cwd=ROOT, env=env, check=True)
    assert read_rows(path) == rows


def test_no_call_is_timed_right_after_itself():
    def a(): ...

    def b(): ...

    calls, order = {"a": a, "a again": a, "b": b, "b again": b}, ["a", "b", "a again", "b again"]
    shuffler, seen = random.Random(0), set()
    for _ in range(50):
        last, order = order[-1], timing.mixed(order, calls, shuffler)
        line = [calls[name] for name in (last, *order)]
        assert all(x is not y for x, y in zip(line, line[1:], strict=False))
        seen.add(tuple(order))
    assert len(seen) > 3
    assert sorted(timing.mixed(["x", "y"], {"x": a, "y": a}, shuffler)) == ["x", "y"]


def test_a_bad_argument_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as exit:
        harness.Parser(prog="bench.py").parse_args(["--threads", "two"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_shows_a_missing_value_as_a_dash():
    assert harness.show([{"a": 1.23456, "b": None}], ["a", "b"]).splitlines()[1].split() == [
        "1.235",
        "-",
    ]


def test_every_row_that_a_page_names_is_committed():
    ids = {row["id"] for path in ROOT.glob("benchmarks/results/*.jsonl") for row in read_rows(path)}
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]
    named = {
        (page.name, found)
        for page in pages
        for found in re.findall(r"\b[0-9a-f]{8}\b", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 100
    assert not {(page, name) for page, name in named if name not in ids}
