"""Fill the tables and the sentences with numbers of docs/uniform.md from committed rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import read_rows
from benchmarks.harness.rows import replace_file
from benchmarks.uniform import verdicts
from benchmarks.uniform.breakdown import by_part
from benchmarks.uniform.structure import TP_SIZES
from benchmarks.uniform.variants import SPREADS

Row = Mapping[str, Any]
NOTHING = "Not measured yet."
BLOCK = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: Path, sources: Sequence[Path]) -> None:
    """Rewrite every block between `<!-- begin: NAME -->` and `<!-- end -->` of `page`.

    Raises:
        ValueError: a block whose name is none of machines, prefill, decode, train, compiled,
            layout, structure, losses, profile.
    """
    rows = [row for path in sources for row in read_rows(path)]
    blocks = {
        "machines": machines(rows),
        **{regime: speeds(rows, regime) for regime in ("prefill", "decode", "train")},
        "layout": against_others(rows),
        "compiled": compiled(rows),
        "structure": structure(rows),
        "losses": losses(rows),
        "profile": parts(rows),
    }

    def fill(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            raise ValueError(f"{page}: unknown block {match[2]!r}; expected {', '.join(blocks)}")
        return f"{match[1]}{blocks[match[2]]}\n{match[3]}"

    replace_file(page, BLOCK.sub(fill, page.read_text()))


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A markdown table, or the word that there is nothing yet."""
    body = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    if not body:
        return NOTHING
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


def losses(rows: Iterable[Row]) -> str:
    """Where uniform is slower than another variant, and where no difference is seen."""
    lines = [
        (*where(case), verdicts.listed(slower) or "-", verdicts.listed(alike) or "-")
        for case, slower, alike in verdicts.where_not_faster(rows)
    ]
    head = ("model", "sparsity", "case", "slower than", "no difference seen from")
    return markdown(head, lines) if lines else "No such case in the rows."


def where(case: tuple[Any, ...]) -> tuple[Any, Any, str]:
    """The cells that name a case: model, sparsity, `prefill eager 1 x 128`."""
    return case[0], case[3], f"{case[4]} {case[5]} {case[6]} x {case[7]}"


def parts(rows: Iterable[Row]) -> str:
    """Each part of a prefill, dense beside uniform, and its share of the dense total."""
    lines = []
    for (model, _, sparsity, batch, length), by_variant in by_part(rows).items():
        for part, row in by_variant.items():
            dense, uniform = row["dense"], row.get("uniform")
            if uniform is None or uniform["noisy"]:
                continue
            ratio = verdicts.faster(uniform, dense)
            lines.append(
                (model, sparsity, f"{batch} x {length}", part, f"{dense['median_ms']:.3g}",
                 f"{uniform['median_ms']:.3g}", f"{ratio:.2f}", f"{dense['share']:.0%}",
                 f"`{dense['id']}` `{uniform['id']}`")
            )  # fmt: skip
    head = ("model", "sparsity", "batch x tokens", "part", "dense ms", "uniform ms", "speed-up")
    return markdown((*head, "share of dense", "rows"), lines)


def machines(rows: Iterable[Row]) -> str:
    """Where the rows were taken; devices without a row are said to be without one."""
    seen = {}
    for row in rows:
        device = row.get("gpu") or f"{row['cpu']}, {row['threads']} threads"
        seen[device, row["torch"], row["commit"], row["date"][:10]] = None
    lines = [list(key) for key in seen]
    for gpu in ("H200", "A100"):
        if not any(gpu in line[0] for line in lines):
            lines.append([gpu, "not measured", "", ""])
    return markdown(("device", "torch", "commit", "date"), lines)


def quiet(rows: Iterable[Row]) -> list[tuple[tuple[Any, ...], dict[str, Row]]]:
    """The cases free of noise that have a uniform row."""
    return [
        (case, by_variant)
        for case, by_variant in verdicts.cases(rows).items()
        if "uniform" in by_variant and not by_variant["uniform"]["noisy"]
    ]


def speeds(rows: Iterable[Row], regime: str) -> str:
    """Uniform against dense in one regime, beside the ideal."""
    lines = []
    for case, by_variant in quiet(rows):
        if case[4] == regime and (row := by_variant["uniform"])["speedup"]:
            share = "-" if row["gain_share"] is None else f"{row['gain_share']:.0%}"
            lines.append(
                (case[0], case[3], case[5], f"{case[6]} x {case[7]}", row["tokens_s"],
                 f"{row['speedup']:.2f}", f"{row['ideal']:.2f}", share, f"`{row['id']}`")
            )  # fmt: skip
    head = ("model", "sparsity", "mode", "batch x tokens", "tokens/s", "speed-up", "ideal")
    return markdown((*head, "share of the gain", "row"), lines)


def against_others(rows: Iterable[Row]) -> str:
    """Uniform against models of equal parameters and FLOPs: times faster, row ids below."""
    rivals = ("unaligned", *SPREADS)
    lines = []
    for case, by_variant in quiet(rows):
        if any(v in by_variant for v in rivals):
            cells = []
            for rival in rivals:
                other = by_variant.get(rival)
                if other is None or other["noisy"]:
                    cells.append("-")
                    continue
                cells.append(f"{verdicts.gain(by_variant['uniform'], other):.2f} `{other['id']}`")
            lines.append((*where(case), *cells))
    return markdown(("model", "sparsity", "case", *rivals), lines)


def compiled(rows: Iterable[Row]) -> str:
    """Compiled graphs and compile seconds of each variant."""
    lines = []
    for case, by_variant in verdicts.cases(rows).items():
        for variant, row in by_variant.items():
            if row["graphs"] is not None:
                lines.append(
                    (case[0], case[3], f"{case[4]} {case[5]}", variant, row["graphs"],
                     f"{row['compile_s']:.1f}", f"`{row['id']}`")
                )  # fmt: skip
    head = ("model", "sparsity", "case", "variant", "graphs", "compile s", "row")
    return markdown(head, lines)


def structure(rows: Iterable[Row]) -> str:
    """Sharding, stages, one block and stock loading of each variant, by its newest row."""
    lines = []
    words = {True: "yes", False: "no", None: "not tried"}
    facts = (row for row in rows if row["op"] == "structure")
    case = ("model", "weights", "dtype", "sparsity", "provider")
    for taken in verdicts.runs(facts, case, ()).values():
        row = taken[-1][()]
        shards = [f"{row[f'tp{n}_imbalance']:.2f} ({row[f'tp{n}_undivided']})" for n in TP_SIZES]
        stage = row.get("pp4_equal_count")
        best = row.get("pp4_best_cut")
        lines.append(
            (row["model"], row["sparsity"], row["provider"], row["distinct_layers"], *shards,
             "-" if stage is None else f"{stage:.2f} / {best:.2f}", words[row["one_block"]],
             words[row.get("from_pretrained")], words[row.get("vllm")],
             words[row.get("llama_cpp")], f"`{row['id']}`")
        )  # fmt: skip
    head = ("model", "sparsity", "variant", "layer shapes", *(f"TP {n}" for n in TP_SIZES))
    return markdown(
        (*head, "4 stages", "one block", "`from_pretrained`", "vLLM", "llama.cpp", "row"), lines
    )
