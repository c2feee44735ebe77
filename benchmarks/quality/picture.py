"""Perplexity of the small Llama over the tokens read, a line per arm, from its rows.

python -m benchmarks.quality.picture -o docs/quality.svg
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import read_rows

RESULTS = Path(__file__).parents[1] / "results" / "quality_small.jsonl"
# Arms in the order of the legend, each with its name and colour.
ARMS = {
    "taylor-split-compensated": ("Taylor at once", "#0072B2"),
    "taylor-split-compensated, weights": ("Taylor at once, all weights", "#56B4E9"),
    "taylor-split-compensated, refined": ("Taylor at once, refined", "#332288"),
    "taylor-split-compensated, weights, refined": (
        "Taylor at once, refined, all weights",
        "#882255",
    ),
    "wanda-sp-split-compensated": ("Wanda-sp at once", "#009E73"),
    "random-split-compensated": ("random at once", "#8A8A8A"),
    "maskprune": ("masks learned", "#D55E00"),
    "maskprune-shuffled": ("the same, mask gradients shuffled", "#E69F00"),
    "maskprune-cold": ("masks learned from 1", "#AA4499"),
    "paper": ("the paper's own settings", "#000000"),
}
# The learning rate of the rows that are drawn, by what they train.
RATES = {"adapters": 5e-3, "weights": 2e-3}
# Perplexities above it would flatten the rest: they stand at the top edge with their number.
HIGHEST = 60.0
Points = dict[str, dict[int, list[float]]]


def points(rows: Iterable[dict[str, Any]], sparsity: float) -> Points:
    """Held-out perplexities by arm and tokens read, in the order of tokens."""
    found: Points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        trained = row.get("train", "adapters")
        arm = row["provider"] + (", weights" if trained == "weights" else "")
        arm += ", refined" if row.get("refine_passes") else ""
        if arm not in ARMS or row["learning_rate"] != RATES[trained]:
            continue
        if abs(row["sparsity"] - sparsity) < 0.01:
            found[arm][row["tokens_read"]].append(row["ppl_held_out"])
    return {arm: dict(sorted(found[arm].items())) for arm in ARMS if arm in found}


def draw(found: Points, dense: float, out: Path) -> None:
    """A line through the means, bars from the least to the largest of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    plt.rcParams["svg.hashsalt"] = "maskprune"
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for arm, by_tokens in found.items():
        name, colour = ARMS[arm]
        for tokens, values in by_tokens.items():
            if min(values) > HIGHEST:
                axes.annotate(
                    f"{name}: {min(values):.0f}",
                    (tokens, HIGHEST),
                    (tokens, HIGHEST - 1.5),
                    color=colour,
                    fontsize=9,
                    ha="right",
                    arrowprops={"arrowstyle": "->", "color": colour},
                )
        by_tokens = {t: v for t, v in by_tokens.items() if min(v) <= HIGHEST}
        if not by_tokens:
            continue
        means = [sum(v) / len(v) for v in by_tokens.values()]
        below = [m - min(v) for m, v in zip(means, by_tokens.values(), strict=True)]
        above = [max(v) - m for m, v in zip(means, by_tokens.values(), strict=True)]
        axes.errorbar(
            list(by_tokens), means, [below, above],
            color=colour, marker="o", markersize=4, capsize=3, linewidth=1.6, label=name,
        )  # fmt: skip
    axes.axhline(dense, color="#444444", linestyle=":", linewidth=1.2, label="dense")
    axes.set_xscale("log")
    axes.set_ylim(dense - 1, HIGHEST)
    axes.xaxis.set_major_locator(FixedLocator([3e5, 5e5, 1e6, 2e6, 3e6, 5e6, 1e7]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g} M"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens read, ranking and compensation counted")
    axes.set_ylabel("held-out perplexity")
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args(given)
    rows = read_rows(RESULTS)
    dense = next(row["ppl_held_out"] for row in rows if row["provider"] == "dense")
    draw(points(rows, args.sparsity), dense, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
