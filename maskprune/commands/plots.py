"""The plots of a run, drawn from its masks and its trace; figure numbers are those of MaskPrune.

Every function returns a matplotlib Figure. Colours are Okabe and Ito's and cividis, which people
with any kind of colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A8A8A"
PRUNED = "#E6E6E6"
# Units drawn side by side; more would be narrower than a few pixels, and blur on a page.
WIDEST = 384
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
Trace = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Curve:
    """A key of the trace as a line; a `reference` line is drawn only beside others."""

    key: str
    label: str
    colour: str
    reference: bool = False
    median: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over the steps on one pair of axes.

    log_from: use a log axis and draw smaller values as this one. until_lock: stop where the shape
    becomes final, since the curves are flat from there. noise: the level of pure noise.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    log_from: float | None = None
    from_zero: bool = False
    percent: bool = False
    until_lock: bool = False
    noise: float | None = None


HEADS, FFN = ("heads", BLUE), ("FFN units", GREEN)
RESOURCE = (
    Panel(
        "Resource",
        "Share of prunable weights kept",
        (Curve("R", "R", BLUE), Curve("R_star", "R*, the budget", GREY, reference=True)),
        until_lock=True,
    ),
    Panel(
        "Split between heads and FFN",
        "Pruned fraction r",
        (Curve("r_head", *HEADS), Curve("r_ffn", *FFN)),
        from_zero=True,
        until_lock=True,
    ),
)
DUALS = (
    Panel(
        "Dual of uniformity",
        "y",
        (
            Curve("y", "y", ORANGE),
            Curve("y_head", "y, heads", BLUE),
            Curve("y_ffn", "y, FFN units", GREEN),
        ),
        until_lock=True,
    ),
    Panel("Dual of the budget", "z", (Curve("z", "z", PURPLE),), until_lock=True),
)
UNIFORMITY = (
    Panel(
        "Spread of the layers' FFN widths",
        "Std. deviation of FFN widths (units)",
        (Curve("width_spread", "over layers", BLUE),),
        from_zero=True,
        until_lock=True,
    ),
    Panel(
        "What is left to cut",
        "Largest mask among the pruned",
        (Curve("residual_head", *HEADS), Curve("residual_ffn", *FFN)),
        log_from=1e-6,
        until_lock=True,
    ),
)
LEARNING = (
    Panel(
        "Units moved",
        "Share of the pruned units",
        (Curve("moved_head", *HEADS), Curve("moved_ffn", *FFN)),
        from_zero=True,
        percent=True,
        until_lock=True,
    ),
    Panel(
        "How far they moved",
        "Mean distance, of a layer's units",
        (Curve("moved_rank_head", *HEADS), Curve("moved_rank_ffn", *FFN)),
        from_zero=True,
        percent=True,
        until_lock=True,
    ),
    Panel(
        "Signal of gradients",
        "Signal to noise",
        (Curve("signal_head", *HEADS), Curve("signal_ffn", *FFN)),
        from_zero=True,
        noise=0.45,
    ),
)
SETTLING = (
    Panel(
        "How certain the masks are",
        "Probability, mean over groups",
        (Curve("max_prob", "most likely candidate", BLUE),),
        from_zero=True,
    ),
    Panel(
        "How much the masks change",
        "Share of groups that changed",
        (Curve("changed", "since the last logged step", ORANGE),),
        from_zero=True,
    ),
)
LOSSES = (
    Panel(
        "Training loss",
        "Loss (nats per token)",
        (
            Curve("loss", "loss", BLUE, median=True),
            Curve("kl", "KL to the unpruned model", ORANGE, median=True),
            Curve("lm", "next-token loss", PURPLE, median=True),
            Curve("layer", "hidden-state MSE, sum over layers (no unit)", GREEN, median=True),
        ),
        log_from=1e-3,
    ),
)


def series(trace: Trace, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows of a trace that have a finite number under `key`."""
    rows = [
        (row["step"], float(value))
        for row in trace
        if isinstance(value := row.get(key), int | float) and math.isfinite(value) and "step" in row
    ]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.asarray(steps), np.asarray(values)


def lines(trace: Trace, panel: Panel) -> list[tuple[Curve, np.ndarray, np.ndarray]]:
    """The curves of a panel with their (steps, values), without flat and repeated ones."""
    if panel.until_lock and (lock := _lock(trace)) is not None:
        trace = trace[: lock + 1]
    shown: list[tuple[Curve, np.ndarray, np.ndarray]] = []
    for curve in panel.curves:
        steps, values = series(trace, curve.key)
        flat = len(steps) < 3 or np.ptp(values) == 0
        again = any(np.array_equal(values, other) for _, _, other in shown)
        if (curve.reference and shown and len(steps)) or not (flat or again):
            shown.append((curve, steps, values))
    return shown


def _lock(trace: Trace) -> int | None:
    """The first row with a final shape."""
    return next((at for at, row in enumerate(trace) if row.get("locked")), None)


def curves(trace: Trace, panels: Sequence[Panel]) -> Figure | None:
    """Panels side by side, those without a curve left out; None where there is none at all."""
    drawn = [(panel, shown) for panel in panels if (shown := lines(trace, panel))]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10 if len(drawn) > 2 else 9, 3.6))
        axes = np.atleast_1d(figure.subplots(1, len(drawn)))
        for axis, (panel, shown) in zip(axes, drawn, strict=True):
            _draw(axis, panel, shown)
            # A panel that ends where the shape is final needs no line there.
            if (lock := _lock(trace)) and not panel.until_lock:
                steps, _ = series(trace, "step")
                axis.axvline(steps[lock], color=GREY, lw=1, ls=":", label="shape final", zorder=0)
            entries = len(axis.get_legend_handles_labels()[0])
            if entries > 2 and len(drawn) == 1:
                # Between so many curves there is no room for it; above a wide panel there is.
                columns = entries if entries == 3 else 2
                axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns)
            elif entries > 1:
                axis.legend()
            axis.margins(x=0.01)
    return figure


def _draw(axis: Axes, panel: Panel, shown: Sequence[tuple[Curve, np.ndarray, np.ndarray]]) -> None:
    for curve, steps, values in shown:
        if panel.log_from is not None:
            values = np.maximum(values, panel.log_from)
        style = "--" if curve.reference else "-"
        if curve.median:
            axis.plot(steps, values, color=curve.colour, alpha=0.25, lw=1)
            values = _running_median(values)
        axis.plot(steps, values, style, color=curve.colour, label=curve.label)
    axis.set(xlabel="Step", ylabel=panel.unit, title=panel.title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if panel.noise is not None:
        axis.axhline(panel.noise, color=GREY, lw=1.2, ls="--", label="noise alone")
    if panel.from_zero:
        axis.set_ylim(0, None)
    if panel.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    if panel.log_from is not None:
        _log(axis)


def is_binary(mask: np.ndarray) -> bool:
    """Whether every mask is 0 or 1."""
    return bool(np.isin(mask, (0, 1)).all())


def heatmap(mask: np.ndarray, unit: str) -> Figure:
    """Mask values by layer and unit (Figures 7 and 8); pruned units in light grey.

    Few units are drawn in place, with their values. Of many, every n-th is drawn in place; where
    masks are not all 0 or 1, all are drawn a second time, sorted.

    Args:
        mask: (L, N) in [0, 1].
        unit: name of the units, in the plural.
    """
    layers, units = mask.shape
    every, binary = -(-units // WIDEST), is_binary(mask)
    panels = [(mask[:, ::every], _every(every, unit))]
    if units > 64 and not binary:
        panels.append((-np.sort(-mask, axis=1), "All of them, sorted within each layer"))
    height = max(2.4, 1.4 + 0.17 * min(layers, 40))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, len(panels) * height))
        axes = np.atleast_1d(figure.subplots(len(panels), 1))
        colours = matplotlib.colormaps["cividis"].with_extremes(under=PRUNED)
        for axis, (values, title) in zip(axes, panels, strict=True):
            image = axis.imshow(
                values,
                aspect="auto",
                cmap=ListedColormap([PRUNED, BLUE]) if binary else colours,
                vmin=0 if binary else 1e-6,
                vmax=1.0,
                interpolation="nearest",
                extent=(-0.5, units - 0.5, layers - 0.5, -0.5),
            )
            axis.set(xlabel=unit[0].upper() + unit[1:], ylabel="Layer", title=title)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        if binary:
            patches = [Patch(color=BLUE, label="kept: 1"), Patch(color=PRUNED, label="pruned: 0")]
            figure.legend(handles=patches, loc="outside lower right", ncols=2)
        else:
            bar = figure.colorbar(
                image, ax=list(axes), pad=0.015, extend="min", extendfrac=0.03, aspect=30
            )
            bar.set_label("Mask value (grey: pruned)")
            if units <= 16:
                _write_values(axes[0], mask)
    return figure


def _every(n: int, unit: str) -> str:
    if n == 1:
        return f"Masks of {unit}"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n // 10 % 10 != 1 else 0, "th")
    return f"Masks of {unit}, every {n}{ending} drawn"


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
        norm = Normalize(0, 100) if few else LogNorm(np.nanmin(shown), 100)
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
