"""What result rows say, in tables and plain sentences; and two files of them side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness import NOISE_LIMIT, read_rows, show
from variants import SPREADS

CASE = ("model", "weights", "dtype", "sparsity", "regime", "mode", "batch", "length")
COLUMNS = ("variant", "median_ms", "p10_ms", "p90_ms", "tokens/s", "speedup", "ideal", "gain share")
DERIVED = (
    "tokens_s", "speedup", "ratio", "gain_share", "noise", "noisy", "peak_mib", "compile_s",
    "joules", "apart", "cache_apart",
)  # fmt: skip

Row = Mapping[str, Any]


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The timed rows by case, and within a case by variant; of equal ones the last."""
    found: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["op"] == "latency" and row.get("median_ms"):
            found[tuple(row[key] for key in CASE)][row["provider"]] = row
    return dict(found)


def name(case: tuple[Any, ...]) -> str:
    """A case in words."""
    model, _, dtype, sparsity, regime, mode, batch, length = case
    return (
        f"{model} {dtype}, sparsity {sparsity:g}, {regime} {mode}, batch {batch}, {length} tokens"
    )


def table(by_variant: Mapping[str, Row]) -> str:
    """One case as a text table; ratios are left out where the self-check found noise."""
    shown = []
    for variant, row in by_variant.items():
        ratio = not row["noisy"]
        line = {
            "variant": variant,
            **{key: row[key] for key in ("median_ms", "p10_ms", "p90_ms")},
            "tokens/s": row["tokens_s"],
            "speedup": row["speedup"] if ratio else None,
            "ideal": row["ideal"],
            "gain share": row["gain_share"] if ratio else None,
            "graphs": row["graphs"],
            "compile s": row["compile_s"],
            "id": row["id"],
        }
        shown.append(line)
    compiled = any(row["graphs"] is not None for row in by_variant.values())
    return show(shown, (*COLUMNS, *(("graphs", "compile s") if compiled else ()), "id"))


def faster(fast: Row, slow: Row) -> float:
    """How many times faster the first row is than the second."""
    return slow["median_ms"] / fast["median_ms"]


def where_not_faster(rows: Iterable[Row]) -> list[str]:
    """A line for each case where uniform is not faster than dense or a heterogeneous model.

    Not faster is: not by more than the noise limit. Noisy cases say nothing.
    """
    lines = []
    for case, by_variant in cases(rows).items():
        uniform = by_variant.get("uniform")
        if uniform is None or uniform["noisy"]:
            continue
        for rival in ("dense", "unaligned", *SPREADS):
            if (other := by_variant.get(rival)) is None:
                continue
            ratio = faster(uniform, other)
            if ratio <= 1 + NOISE_LIMIT:
                verb = "slower than" if ratio < 1 - NOISE_LIMIT else "not faster than"
                lines.append(f"uniform is {verb} {rival} ({ratio:.2f}x): {name(case)}")
    return lines


def report(rows: list[dict[str, Any]]) -> str:
    """The tables, what was skipped, where uniform is not faster, and the structural facts."""
    parts = []
    for case, by_variant in cases(rows).items():
        apart = next(iter(by_variant.values()))["noise"]
        noisy = any(row["noisy"] for row in by_variant.values())
        check = f"dense against itself {apart:.1%}" + (": too noisy for ratios" if noisy else "")
        parts.append(f"{name(case)} ({check})\n{table(by_variant)}")
    parts += [
        f"skipped {row['model']} {row['provider']} {row.get('regime', '')} "
        f"{row.get('mode', '')}: {row['skipped']}"
        for row in rows
        if row.get("skipped")
    ]
    if facts := [row for row in rows if row["op"] == "structure"]:
        columns = ("model", "sparsity", "provider", "distinct_layers", "tp2_imbalance",
                   "tp4_imbalance", "tp8_imbalance", "tp4_undivided", "pp4_equal_count",
                   "one_block", "from_pretrained")  # fmt: skip
        parts.append("what else uniform layers buy\n" + show(facts, columns))
    if timed := cases(rows):
        losses = where_not_faster(rows)
        quiet = sum(not next(iter(v.values()))["noisy"] for v in timed.values())
        if not quiet:
            losses = ["no case was free of noise: nothing is said about what is faster"]
        elif not losses:
            losses = [f"uniform is the fastest in all {quiet} cases free of noise"]
        parts.append("\n".join(losses))
    return "\n\n".join(parts)


def compare(a: Path, b: Path) -> str:
    """Medians of two rows files, case by case, and their ratio; what is in one alone is counted."""
    first, second = (
        {(case, v): row for case, by in cases(read_rows(path)).items() for v, row in by.items()}
        for path in (a, b)
    )
    shown = [
        {
            "case": name(case),
            "variant": variant,
            "a ms": row["median_ms"],
            "b ms": second[case, variant]["median_ms"],
            "a / b": faster(second[case, variant], row),
            "noisy": "yes" if row["noisy"] or second[case, variant]["noisy"] else "",
        }
        for (case, variant), row in first.items()
        if (case, variant) in second
    ]
    lines = [f"a: {a}", f"b: {b}"]
    for key in ("cpu", "gpu", "threads", "torch", "commit"):
        values = [{str(row.get(key)) for row in side.values()} for side in (first, second)]
        if values[0] != values[1]:
            lines.append(f"{key} differs: {', '.join(values[0])} | {', '.join(values[1])}")
    lines.append(show(shown, shown[0]) if shown else "no case is in both")
    alone = len(first.keys() ^ second.keys())
    return "\n".join(lines + ([f"{alone} rows are in one file only"] if alone else []))
