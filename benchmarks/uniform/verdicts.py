"""Result rows in tables and plain sentences; and two files of rows side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import NOISE_LIMIT, read_rows, show
from benchmarks.uniform.variants import SPREADS

CASE = ("model", "weights", "dtype", "sparsity", "regime", "mode", "batch", "length")
COLUMNS = ("variant", "median_ms", "p10_ms", "p90_ms", "tokens/s", "speedup", "ideal", "gain share")
DERIVED = (
    "tokens_s", "speedup", "ratio", "gain_share", "share", "noise", "noisy", "peak_mib",
    "compile_s", "joules", "apart", "cache_apart",
)  # fmt: skip

Row = Mapping[str, Any]


def runs(rows: Iterable[Row], case: Sequence[str], member: Sequence[str]) -> dict[Any, list[Any]]:
    """Rows by case, and in a case run by run, {member: row}: a repeated member starts a new run.

    case, member: the fields that distinguish cases, and the rows of one run of a case.
    """
    by_case: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        taken, one = by_case[tuple(row[key] for key in case)], tuple(row[key] for key in member)
        if not taken or one in taken[-1]:
            taken.append({})
        taken[-1][one] = row
    return dict(by_case)


def is_noisy(run: Mapping[Any, Row]) -> bool:
    """Whether the self-check of any row of a run found noise."""
    return any(row["noisy"] for row in run.values())


def cases(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The timed rows by case, and within a case by variant: the newest run free of noise.

    The newest of all where none is. Variants too large to be held together come in runs of dense
    and one other, so a run without `uniform` adds to the others; their ratios are those of the
    speed-ups, each against the dense model of its own run.
    """
    timed = (row for row in rows if row["op"] == "latency" and row.get("median_ms"))
    by_case = {}
    for case, taken in runs(timed, CASE, ("provider",)).items():
        best: dict[Any, Row] = {}
        for run in taken:
            if ("uniform",) not in run:
                best |= {k: row for k, row in run.items() if k not in best or not row["noisy"]}
            elif ("uniform",) not in best or is_noisy(best) or not is_noisy(run):
                best = run
        by_case[case] = {variant: row for (variant,), row in best.items()}
    return by_case


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


def gain(uniform: Row, other: Row) -> float:
    """How many times faster uniform is than another variant, by their speed-ups over dense."""
    return float(uniform["speedup"] / other["speedup"])


def where_not_faster(
    rows: Iterable[Row],
) -> list[tuple[tuple[Any, ...], dict[str, float], dict[str, float]]]:
    """Each case that uniform does not win against all: (case, slower than, no difference seen).

    The last two hold the ratios by variant, below 1 - the noise limit and within the limit of 1.
    Noisy cases say nothing.
    """
    losses = []
    for case, by_variant in cases(rows).items():
        uniform = by_variant.get("uniform")
        if uniform is None or uniform["noisy"]:
            continue
        ratios = {
            rival: gain(uniform, by_variant[rival])
            for rival in ("dense", "unaligned", *SPREADS)
            if rival in by_variant and not by_variant[rival]["noisy"]
        }
        slower = {v: ratio for v, ratio in ratios.items() if ratio < 1 - NOISE_LIMIT}
        alike = {v: r for v, r in ratios.items() if abs(r - 1) <= NOISE_LIMIT}
        if slower or alike:
            losses.append((case, slower, alike))
    return losses


def listed(ratios: Mapping[str, float]) -> str:
    """`mild 0.98, compresso 1.00`."""
    return ", ".join(f"{variant} {ratio:.2f}" for variant, ratio in ratios.items())


def sentence(case: tuple[Any, ...], slower: dict[str, float], alike: dict[str, float]) -> str:
    """One line on a case that uniform does not win against all; ratios are times faster."""
    verbs = (("uniform is slower than", slower), ("no difference seen from", alike))
    return f"{name(case)}: " + "; ".join(f"{verb} {listed(r)}" for verb, r in verbs if r)


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
        losses = [sentence(*loss) for loss in where_not_faster(rows)]
        quiet = sum("uniform" in v and len(v) > 1 and not is_noisy(v) for v in timed.values())
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
