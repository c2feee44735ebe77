"""The pictures of a run, drawn from its masks and its trace; numbered as the figures of MaskPrune.

Every function returns a matplotlib Figure. Colours are Okabe and Ito's and cividis, which people
with any kind of colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A8A8A"
PRUNED = "#EDEDED"
WIDEST = 768
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
Trace = Sequence[Mapping[str, Any]]


def series(trace: Trace, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows of a trace that have a finite number under `key`."""
    rows = [
        (row["step"], float(row[key]))
        for row in trace
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and "step" in row
    ]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.asarray(steps), np.asarray(values)


def has(trace: Trace, *keys: str) -> bool:
    """Whether any of `keys` has at least two points to draw."""
    return any(len(series(trace, key)[0]) > 1 for key in keys)


def heatmap(mask: np.ndarray, unit: str) -> Figure:
    """Mask values by layer and unit (Figures 7 and 8); pruned units in light grey.

    Few units are drawn where they lie, with their values. Many are drawn twice: where they lie
    (neighbours averaged if they are finer than the picture), and sorted, which shows the width.

    Args:
        mask: (L, N) in [0, 1].
        unit: what a column is, in the plural.
    """
    layers, units = mask.shape
    few = units <= 64
    height = 1.2 + 0.17 * min(layers, 40)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, height if few else 2 * height))
        panels = [(_pooled(mask), f"Masks of {unit}")]
        if not few:
            panels.append((-np.sort(-mask, axis=1), "The same, sorted within each layer"))
        axes = np.atleast_1d(figure.subplots(len(panels), 1))
        colours = matplotlib.colormaps["cividis"].with_extremes(under=PRUNED)
        for axis, (values, title) in zip(axes, panels, strict=True):
            image = axis.imshow(
                values,
                aspect="auto",
                cmap=colours,
                vmin=1e-6,
                vmax=1.0,
                interpolation="nearest",
                extent=(-0.5, units - 0.5, layers - 0.5, -0.5),
            )
            axis.set(xlabel=unit[0].upper() + unit[1:], ylabel="Layer", title=title)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(
            image, ax=list(axes), pad=0.015, extend="min", extendfrac=0.03, aspect=30
        )
        bar.set_label("Mask value (grey: pruned)")
        if units <= 16:
            _write_values(axes[0], mask)
    return figure


def _pooled(mask: np.ndarray) -> np.ndarray:
    layers, units = mask.shape
    if units <= WIDEST:
        return mask
    edges = np.linspace(0, units, WIDEST + 1).astype(int)[:-1]
    return np.add.reduceat(mask, edges, axis=1) / np.diff([*edges, units])


def _write_values(axis: Axes, mask: np.ndarray) -> None:
    for (layer, unit), value in np.ndenumerate(mask):
        if value > 0:
            dark = value < 0.55
            text = f"{value:.2f}"
            axis.text(
                unit, layer, text, ha="center", va="center", fontsize=6.5, color="wk"[not dark]
            )


def histogram(mask: np.ndarray, unit: str) -> Figure:
    """How often each mask value occurs (Figures 9 and 10): over all layers, and layer by layer."""
    layers = len(mask)
    few = mask.shape[1] <= 64
    edges = np.linspace(0.0, 1.0, 21 if few else 41)
    per_layer = np.stack([np.histogram(row, edges)[0] for row in mask]) / mask.shape[1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        left.bar(
            edges[:-1], per_layer.mean(0) * 100, np.diff(edges), align="edge", color=BLUE, lw=0
        )
        left.set(xlim=(0, 1), xlabel="Mask value", ylabel=f"Share of {unit} (%)")
        if not few:
            _log(left)
        left.set_title("All layers")
        right.grid(False)
        shown = np.where(per_layer > 0, per_layer * 100, np.nan)
        linear = matplotlib.colors.Normalize(0, 100)
        norm = linear if few else matplotlib.colors.LogNorm(np.nanmin(shown), 100)
        image = right.pcolormesh(
            edges, np.arange(layers + 1) - 0.5, shown, cmap="cividis_r", norm=norm
        )
        right.set(xlabel="Mask value", ylabel="Layer", ylim=(layers - 0.5, -0.5))
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_title("Layer by layer")
        bar = figure.colorbar(image, ax=right, pad=0.02, format="{x:g}")
        bar.set_label(f"Share of the layer's {unit} (%)")
    return figure


def kept_units(kinds: Mapping[str, tuple[np.ndarray, int]]) -> Figure:
    """Units that every layer keeps (Figure 3), against what it had.

    Args:
        kinds: name of the unit, in the plural -> ((L,) units kept, units before).
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "y"}):
        figure = Figure(figsize=(9, 3.4))
        axes = np.atleast_1d(figure.subplots(1, len(kinds)))
        for axis, (unit, (kept, before)), colour in zip(
            axes, kinds.items(), (BLUE, GREEN), strict=False
        ):
            layers = np.arange(len(kept))
            axis.bar(layers, np.full(len(kept), before), color=PRUNED, label="pruned", width=0.8)
            axis.bar(layers, kept, color=colour, label="kept", width=0.8)
            axis.set(xlabel="Layer", ylabel=f"{unit[0].upper()}{unit[1:]} per layer")
            axis.set_ylim(0, before * 1.0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            least, most = int(kept.min()), int(kept.max())
            said = f"{least}" if least == most else f"{least} to {most}"
            axis.set_title(f"{said} of {before} {unit}")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, reverse=True
        )
    return figure


def resource(trace: Trace) -> Figure:
    """The resource R against its budget R*, and the pruned fraction of each kind, over steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        left, right = figure.subplots(1, 2)
        _line(left, trace, "R", BLUE, "R")
        _line(left, trace, "R_star", GREY, "R*, the budget", ls="--")
        left.set(xlabel="Step", ylabel="Share of prunable weights kept")
        left.set_title("Resource")
        _line(right, trace, "r_head", BLUE, "heads")
        _line(right, trace, "r_ffn", GREEN, "FFN units")
        right.set(xlabel="Step", ylabel="Pruned fraction r", ylim=(0, None))
        right.set_title("Split between heads and FFN")
        _finish(trace, left, right)
    return figure


def duals(trace: Trace) -> Figure:
    """The dual variables: y (uniformity, one or one per kind) and z (budget), over steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4))
        left, right = figure.subplots(1, 2)
        for key, colour, label in (
            ("y", ORANGE, "y"),
            ("y_head", BLUE, "y, heads"),
            ("y_ffn", GREEN, "y, FFN units"),
        ):
            _line(left, trace, key, colour, label)
        left.set(xlabel="Step", ylabel="y")
        left.set_title("Dual of uniformity")
        _line(right, trace, "z", PURPLE, "z")
        right.set(xlabel="Step", ylabel="z")
        right.set_title("Dual of the budget")
        _finish(trace, left, right)
    return figure


def losses(trace: Trace) -> Figure:
    """The training loss and its parts over steps, with a running median."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8))
        axis = figure.subplots()
        for key, colour, label in (
            ("loss", BLUE, "loss"),
            ("kl", ORANGE, "KL to the unpruned model, per token"),
            ("layer", GREEN, "hidden-state MSE, sum over layers"),
        ):
            steps, values = series(trace, key)
            if len(steps) < 2:
                continue
            axis.plot(steps, values, color=colour, alpha=0.25, lw=1)
            axis.plot(steps, _running_median(values), color=colour, label=label)
        positive = all((series(trace, k)[1] > 0).all() for k in ("loss", "kl", "layer"))
        axis.set(xlabel="Step", ylabel="Loss (nats; MSE without unit)")
        if positive:
            _log(axis)
        axis.set_title("Training loss")
        _finish(trace, axis)
    return figure


def uniformity(trace: Trace) -> Figure:
    """Spread of the layers' FFN widths (Figure 6) and the largest pruned mask, over steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        left, right = figure.subplots(1, 2)
        _line(left, trace, "width_spread", BLUE, "over layers")
        left.set(xlabel="Step", ylabel="Std. deviation of FFN widths (units)", ylim=(0, None))
        left.set_title("Spread of the layers' FFN widths")
        for key, colour, label in (
            ("residual_head", BLUE, "heads"),
            ("residual_ffn", GREEN, "FFN units"),
        ):
            steps, values = series(trace, key)
            if len(steps) > 1:
                # Zero has no place on a log axis: below 1e-6 counts as gone.
                right.plot(steps, np.maximum(values, 1e-6), color=colour, label=label)
        right.set(xlabel="Step", ylabel="Largest mask among the pruned")
        _log(right)
        right.set_title("What is left to cut")
        _finish(trace, left, right)
    return figure


def settling(trace: Trace) -> Figure:
    """How sure 2:4 masks are of their choice, and how many change it (MaskLLM, Figure 5)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6))
        left, right = figure.subplots(1, 2)
        _line(left, trace, "max_prob", BLUE, "most likely candidate")
        left.set(xlabel="Step", ylabel="Probability, mean over groups", ylim=(0, 1.02))
        left.set_title("How sure the masks are")
        _line(right, trace, "changed", ORANGE, "since the last logged step")
        right.set(xlabel="Step", ylabel="Share of groups that changed", ylim=(0, None))
        right.set_title("How restless the masks are")
        _finish(trace, left, right)
    return figure


def _line(axis: Axes, trace: Trace, key: str, colour: str, label: str, **style: Any) -> None:
    steps, values = series(trace, key)
    if len(steps) > 1:
        axis.plot(steps, values, color=colour, label=label, **style)


def _finish(trace: Trace, *axes: Axes) -> None:
    """Mark where the shape was locked, and name the lines where there are several."""
    locked = [row["step"] for row in trace if row.get("locked") and "step" in row]
    for axis in axes:
        if locked and axis.lines:
            axis.axvline(locked[0], color=GREY, lw=1, ls=":", label="shape locked", zorder=0)
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend()
        axis.margins(x=0.01)


def _log(axis: Axes) -> None:
    """A log axis whose ticks are plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    short = high < 100 * low
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(1, len(values) // 40)
    return np.asarray(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )
