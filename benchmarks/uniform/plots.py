"""Pictures from result rows alone: speed-up against sparsity, latency against batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STYLE = {
    "dense": ("#444444", "o"),
    "uniform": ("#0b6e4f", "o"),
    "unaligned": ("#7fb069", "s"),
    "mild": ("#f2a541", "^"),
    "nuteprune": ("#e4572e", "v"),
    "compresso": ("#a4243b", "D"),
}
LABEL = {
    "uniform": "uniform (stock model)",
    "unaligned": "uniform, odd FFN width",
    "mild": "heterogeneous, mild",
    "nuteprune": "heterogeneous, NutePrune-like",
    "compresso": "heterogeneous, Compresso-like",
}
NAMES = {
    "prefill": "prefill",
    "decode": "decode",
    "train": "LoRA step",
}


def measured(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The latency rows that hold a time."""
    return [r for r in rows if r["op"] == "latency" and r.get("median_ms")]


def place(row: Mapping[str, Any]) -> str:
    """Device, threads and dtype of a row, for the foot of a plot."""
    device = row.get("gpu") or f"{row['cpu']}, {row['threads']} threads"
    return f"{device}, {row['dtype']}, torch {row['torch']}, commit {row['commit']}"


def draw(rows: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write every plot that the rows allow into `folder`; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    rows = measured(rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for model, mode in sorted({(r["model"], r["mode"]) for r in rows}):
        chosen = [r for r in rows if r["model"] == model and r["mode"] == mode]
        paths += _speedups(chosen, folder / f"speedup-{model}-{mode}.png")
        paths += _batches(chosen, folder / f"batch-{model}-{mode}.png")
    return paths


def _figure(panels: int, title: str, foot: str) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, panels, figsize=(5.2 * panels, 4.4), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=15)
    figure.supxlabel(foot, fontsize=8, color="#777777")
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=160)
    plt.close(figure)
    return [path]


def _speedups(rows: list[Mapping[str, Any]], path: Path) -> list[Path]:
    """One panel a regime, at its smallest batch and largest length; the ideal of `uniform`."""
    rows = [r for r in rows if r["speedup"] and not r["noisy"]]
    regimes = [g for g in NAMES if any(r["regime"] == g for r in rows)]
    if not regimes:
        return []
    figure, axes = _figure(len(regimes), f"{rows[0]['model']}: speed-up over dense", place(rows[0]))
    for axis, regime in zip(axes, regimes, strict=True):
        here = [r for r in rows if r["regime"] == regime]
        batch = min(r["batch"] for r in here)
        length = max(r["length"] for r in here if r["batch"] == batch)
        here = [r for r in here if (r["batch"], r["length"]) == (batch, length)]
        kind = "bytes" if regime == "decode" else "FLOPs"
        ideal = sorted((r["sparsity"], r["ideal"]) for r in here if r["provider"] == "uniform")
        axis.plot(*zip((0, 1), *ideal, strict=True), "--", color="#888888", label=f"ideal ({kind})")
        for variant, label in LABEL.items():
            points = sorted((r["sparsity"], r["speedup"]) for r in here if r["provider"] == variant)
            if points:
                color, marker = STYLE[variant]
                x, y = zip((0, 1), *points, strict=True)
                axis.plot(x, y, color=color, marker=marker, label=label)
        axis.set_title(f"{NAMES[regime]}, batch {batch}, {length} tokens")
        axis.set_xlabel("sparsity of the layers")
        axis.axhline(1, color="#444444", linewidth=0.8)
    axes[0].set_ylabel("times faster than dense")
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _batches(rows: list[Mapping[str, Any]], path: Path) -> list[Path]:
    """Decode (or prefill) latency against batch at the highest sparsity, p10 to p90 shaded."""
    regimes = []
    for regime in ("prefill", "decode"):
        here = [r for r in rows if r["regime"] == regime]
        if len({r["batch"] for r in here}) > 1:
            regimes.append(regime)
    if not regimes:
        return []
    sparsity = max(r["sparsity"] for r in rows)
    title = f"{rows[0]['model']}: latency at sparsity {sparsity:g}"
    title += " (noisy machine)" if any(r["noisy"] for r in rows) else ""
    figure, axes = _figure(len(regimes), title, place(rows[0]))
    for axis, regime in zip(axes, regimes, strict=True):
        here = [r for r in rows if r["regime"] == regime and r["sparsity"] == sparsity]
        length = max(r["length"] for r in here)
        for variant, (color, marker) in STYLE.items():
            mine = sorted(
                (r for r in here if r["provider"] == variant and r["length"] == length),
                key=lambda r: r["batch"],
            )
            x = [r["batch"] for r in mine]
            if x:
                label = LABEL.get(variant, variant)
                axis.plot(
                    x, [r["median_ms"] for r in mine], color=color, marker=marker, label=label
                )
                low, high = [r["p10_ms"] for r in mine], [r["p90_ms"] for r in mine]
                axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{NAMES[regime]}, {length} tokens")
        axis.set_xlabel("batch")
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)
