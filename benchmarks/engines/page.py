"""docs/engines.md, and README's table of engines, from committed rows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import read_rows
from benchmarks.harness.rows import replace_file
from benchmarks.uniform.page import BLOCK, markdown
from maskprune.hf.engines import ENGINES, TRIED

Row = Mapping[str, Any]
PAGES = [Path("docs/engines.md"), Path("README.md")]
# Where the dense model is further off itself, no ratio is shown.
NOISY = 0.05
UNITS = {
    "dense": "not pruned",
    "kv_group": "fewer KV groups",
    "query_head": "fewer query heads",
    "ffn": "FFN alone",
}


def render(page: Path, rows: Sequence[Row]) -> str:
    """The page's text with every block between `<!-- begin: NAME -->` and `<!-- end -->` anew.

    Names are summary, machines, families, demo, speed, heterogeneous and quality; others stay.
    """
    blocks = {
        "summary": summary(rows),
        "machines": machines(rows),
        "families": families(rows),
        "demo": demo(rows),
        "speed": speed(rows),
        "heterogeneous": heterogeneous(rows),
        "quality": quality(rows),
    }

    def fill(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            return match[0]
        return f"{match[1]}{blocks[match[2]]}\n{match[3]}"

    return BLOCK.sub(fill, page.read_text())


def small(row: Row) -> bool:
    """Whether a row is of the small random models, of which every family has some."""
    return bool(
        row["what"] == "agreement" and row["model"] == f"{row['family']} {row['head_unit']}"
    )


def summary(rows: Sequence[Row]) -> str:
    """A line for each engine that ran: families, pruned models that load, tokens that agree."""
    lines = []
    for engine in ENGINES:
        tried = [
            row
            for row in rows
            if row["engine"] == engine and small(row) and row["head_unit"] != "dense"
        ]
        if not tried:
            continue
        ran = [row for row in tried if row["loads"]]
        families = [len({row["family"] for row in some}) for some in (ran, tried)]
        agree, of = (sum(row.get(key, 0) for row in ran) for key in ("same_tokens", "tokens"))
        version = max(tried, key=lambda row: str(row["date"]))["packages"].split()[0]
        counts = (f"{families[0]} of {families[1]}", f"{len(ran)} of {len(tried)}")
        lines.append((engine, f"`{version}`", *counts, f"{agree:,} of {of:,}"))
    head = ("engine", "package", "families", "pruned models that load")
    return markdown((*head, "greedy tokens as in transformers"), lines)


def machines(rows: Iterable[Row]) -> str:
    """Every engine: what was run, where; or how what is said of it is known."""
    seen: dict[str, dict[tuple[str, ...], None]] = {engine: {} for engine in ENGINES}
    for row in rows:
        where = (f"{row['cpu']}, {row['threads']} thread", row["transformers"], row["date"][:10])
        seen[row["engine"]].setdefault((row["packages"], *where))
    lines = []
    for engine, runs in seen.items():
        lines += [(engine, *run) for run in runs]
        if not runs:
            lines.append((engine, f"no rows; {TRIED[engine]}", "", "", ""))
    return markdown(("engine", "packages", "machine", "transformers", "date"), lines)


def families(rows: Iterable[Row]) -> str:
    """Agreement of the small models: a line for each engine and family, a column a head unit."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if small(row):
            found.setdefault((row["engine"], row["family"]), {})[row["head_unit"]] = row
    lines = []
    for (engine, family), by_unit in found.items():
        cells, reasons = [], {}
        for unit in UNITS:
            if not (row := by_unit.get(unit)):
                cells.append("")
                continue
            tokens, difference, name = said(row)
            if not row["loads"]:
                reasons[difference] = None
                difference = ""
            cells.append(" ".join(f"`{row['class']}` {tokens} {difference} {name}".split()))
        lines.append((engine, family, *cells, next(iter(reasons), "")))
    return markdown(("engine", "family", *UNITS.values(), "why refused, in its words"), lines)


def demo(rows: Iterable[Row]) -> str:
    """Agreement of the demo model's checkpoints."""
    lines = [
        (row["engine"], row["model"], row["shape"], *said(row))
        for row in rows
        if row["what"] == "agreement" and row["model"] in ("dense", "pruned", "uniform 50 %")
    ]
    head = ("engine", "checkpoint", "shape", "same tokens", "largest difference", "row")
    return markdown(head, lines)


def said(row: Row) -> tuple[str, str, str]:
    """(tokens, difference, id) of a row of agreement."""
    name = f"`{row['id']}`"
    if not row["loads"]:
        return "refused", plain(row["error"]), name
    if "tokens" not in row:
        return "loads", "", name
    return f"{row['same_tokens']} of {row['tokens']}", f"{row['logprob_difference']:.1e}", name


def plain(error: str) -> str:
    """An engine's message, short and without what would break a table."""
    error = error.rpartition("error loading model: ")[2].removeprefix("check_tensor_dims: ")
    return " ".join(error.replace("|", "/").split())[:140]


def speed(rows: Iterable[Row]) -> str:
    """Tokens a second of the demo model, and ratios to the dense one in the same rounds."""
    lines = [
        (row["engine"], row["type"], row["model"], row["shape"], f"{row['bytes'] / 1e6:.1f}",
         *(cell for p in ("prefill", "decode") for cell in pace(row, p)), f"`{row['id']}`")
        for row in rows
        if row["what"] == "speed" and not row["model"].startswith("zeros")
    ]  # fmt: skip
    head = ("engine", "type", "checkpoint", "shape", "MB", "prefill tok/s", "of dense")
    return markdown((*head, "decode tok/s", "of dense", "row"), lines)


def pace(row: Row, what: str) -> tuple[str, str]:
    """(tokens a second, ratio to dense with the noise of dense against itself)."""
    ratio, noise = row[f"{what}_against_dense"], row[f"{what}_noise"]
    shown = "1" if row["model"] == "dense" else "noisy" if noise > NOISY else f"{ratio:.2f}x"
    return f"{row[f'{what}_tokens_s']:.1f}", f"{shown} (±{noise:.2f})"


def heterogeneous(rows: Sequence[Row]) -> str:
    """The same cost as zeros, as other widths in every layer, and uniform: what an engine makes."""
    lines = []
    for row in rows:
        if row["what"] == "agreement" and row["model"] == "shapes 50 %" and not row["loads"]:
            why = f"refused: {plain(row['error'])}"
            lines.append((row["engine"], "", "other widths in every layer", why, "", "", ""))
            lines[-1] = (*lines[-1][:6], f"`{row['id']}`")
    names = {"zeros 50 %": "zeros in the dense shape", "uniform 50 %": "uniform"}
    for row in rows:
        if row["what"] == "speed" and row["model"] in names:
            paces = (pace(row, "prefill")[1], pace(row, "decode")[1])
            size = f"{row['bytes'] / 1e6:.1f}"
            lines.append((row["engine"], row["type"], names[row["model"]], "loads", size, *paces))
            lines[-1] = (*lines[-1][:5], f"{paces[0]}; {paces[1]}", f"`{row['id']}`")
    raced = {row["engine"] for row in rows if row["what"] == "speed"}
    for row in rows:
        if row["what"] == "agreement" and row["model"] in names and row["engine"] not in raced:
            tokens, _, name = said(row)
            tokens = f"loads, {tokens}" if row["loads"] else tokens
            lines.append((row["engine"], "", names[row["model"]], tokens, "", "", name))
    head = ("engine", "type", "half of the demo model, as", "the engine", "MB")
    return markdown((*head, "speed of dense: prefill; decode", "row"), lines)


def quality(rows: Iterable[Row]) -> str:
    """Quantised files, dense and pruned, by size."""
    chosen = sorted((r for r in rows if r["what"] == "quality"), key=lambda r: -r["bytes"])
    lines = [
        (row["engine"], row["model"], row["type"], f"{row['bytes'] / 1e6:.1f}", f"{row['ppl']:.2f}",
         *(pace(row, p)[0] for p in ("prefill", "decode")), f"`{row['id']}`")
        for row in chosen
    ]  # fmt: skip
    head = ("engine", "checkpoint", "type", "MB", "perplexity", "prefill tok/s", "decode tok/s")
    return markdown((*head, "row"), lines)


def main() -> int:
    """Rewrite the pages, or with --check say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="benchmarks.engines.page", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--from", dest="rows", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args()
    rows, stale = read_rows(args.rows), []
    for page in args.pages:
        text = render(page, rows)
        if text != page.read_text():
            stale.append(page)
            if not args.check:
                replace_file(page, text)
    if args.check and stale:
        print(f"not up to date: {', '.join(map(str, stale))}; run `make docs`")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
