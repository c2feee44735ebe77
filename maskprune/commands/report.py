"""A run as a page to read: its plots and tables."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskprune.files import own_file, replace_file
from maskprune.hf.model_card import SHAPE_ROWS, model_card, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskprune.structured.masks import Masks

__all__ = ["model_card", "read_info", "read_trace", "report"]
DPI = 150
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.7rem; margin-bottom: .2rem }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .3rem }}
p.lead {{ color: #555; margin-top: 0 }}
figure {{ margin: .8rem 0 0 }}
figure img {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: .8rem 0 }}
th, td {{ text-align: left; padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid #e4e4e4;
         vertical-align: top; font-variant-numeric: tabular-nums }}
th {{ font-weight: 600 }}
summary {{ cursor: pointer; font-weight: 600; margin-top: 2rem }}
</style>
{body}
</html>
"""


def report(run_dir: str | Path) -> Path:
    """Draw a run and write `report.html`, which holds everything, and `report/*.png` beside it.

    Reads what is there of `maskprune.json` (settings, versions, final shape), `trace.jsonl` (one
    object per logged step) and `masks.safetensors`; a run in progress has no masks yet.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no such folder, nothing of a run in it, or a broken file.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise ValueError(f"run {run} is not a folder; give the output folder of `maskprune prune`")
    info, trace, masks = read_info(run), read_trace(run), _masks(run)
    if not info and not trace and masks is None:
        raise ValueError(
            f"{run} holds no run (maskprune.json, trace.jsonl or masks.safetensors); give the "
            "output folder of `maskprune prune`"
        )
    (run / "report").mkdir(exist_ok=True)
    name = str(info.get("model") or (masks.source if masks else "") or run.absolute().name)
    title = f"{Path(name).name}, pruned by maskprune"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(_lead(info, trace))}</p>']
    body += _shape_tables(info, masks)
    for stem, heading, caption, figure in _sections(trace, masks):
        image = _png(figure)
        replace_file(run / "report" / f"{stem}.png", image)
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        body.append(
            f"<h2>{escape(heading)}</h2>\n<p>{escape(caption)}</p>\n"
            f'<figure><img src="{source}" alt="{escape(heading, quote=True)}"></figure>'
        )
    body += _details(info)
    path = run / "report.html"
    replace_file(path, PAGE.format(title=escape(title), body="\n".join(body)))
    return path


def read_info(run: Path) -> dict[str, Any]:
    """maskprune.json of a run; empty where there is none."""
    path = own_file(run, "maskprune.json")
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken JSON ({error}); run prune again") from None
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}; expected an object of settings")
    return info


def read_trace(run: Path) -> list[dict[str, Any]]:
    """Rows of trace.jsonl in order; empty where there is none. A last line cut off is dropped."""
    path = own_file(run, "trace.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if at == len(lines):
                break
            raise ValueError(f"{path}, line {at}: broken JSON; expected one object") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _masks(run: Path) -> Masks | None:
    from maskprune.structured.masks import MASKS_FILE, load_masks

    return load_masks(run) if own_file(run, MASKS_FILE).is_file() else None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _lead(info: Mapping[str, Any], trace: Sequence[Mapping[str, Any]]) -> str:
    parts = [str(info["method"])] if info.get("method") else []
    settings = {**info.get("settings", {}), **info}
    if isinstance(settings.get("sparsity"), int | float):
        parts.append(f"sparsity {settings['sparsity']:.0%}")
    if trace:
        parts.append(f"up to step {trace[-1].get('step', len(trace))}")
        speeds = sorted(r["tokens_per_s"] for r in trace if r.get("tokens_per_s"))
        if speeds:
            parts.append(f"median {speeds[len(speeds) // 2]:,.0f} tokens/s")
    if settings.get("seed") is not None:
        parts.append(f"seed {settings['seed']}")
    return ", ".join(parts)


def _sections(
    trace: list[dict[str, Any]], masks: Masks | None
) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, heading, caption, figure) of everything that the run has data for."""
    from maskprune.commands import plots

    against = (
        "The loss that was fitted, without the reward for kept weights"
        if plots.has(trace, "max_prob")
        else "Against the unpruned model on the same tokens"
    )
    if masks is not None:
        # One column per unit that is cut, one row per layer, for both units of head pruning.
        layers = masks.shape.layers
        kinds = {"FFN units": masks.ffn.detach().numpy()}
        if masks.head.numel():
            unit = "KV groups" if masks.head_unit == "kv_group" else "query heads"
            kinds = {unit: masks.head.detach().numpy().reshape(layers, -1)} | kinds
        kept = {unit: ((mask > 0).sum(1), mask.shape[1]) for unit, mask in kinds.items()}
        uniform = all(len(set(counts.tolist())) == 1 for counts, _ in kept.values())
        yield (
            "kept",
            "Units kept in each layer",
            "Every layer keeps the same number, so the checkpoint is an ordinary one."
            if uniform
            else "The layers differ: these masks are not final, and cannot be exported.",
            plots.kept_units(kept),
        )
        for unit, mask in kinds.items():
            inside = float(((mask > 0) & (mask < 0.99)).mean() / max((mask > 0).mean(), 1e-9))
            stem = "ffn" if unit == "FFN units" else "head"
            yield (
                f"{stem}_heatmap",
                f"Masks of {unit}, by layer",
                f"{inside:.0%} of the {unit} kept have a mask below 0.99: they are scaled, and "
                "the scale is folded into the weights.",
                plots.heatmap(mask, unit),
            )
            yield (
                f"{stem}_histogram",
                f"Distribution of the masks of {unit}",
                "How often each value occurs; the column at 0 is what was pruned.",
                plots.histogram(mask, unit),
            )
    for keys, make, stem, heading, caption in (
        (
            ("R", "r_head", "r_ffn"),
            plots.resource,
            "resource",
            "On the way to the budget",
            "R is the share of attention and FFN weights kept, R* what was asked for. The split "
            "between heads and FFN units is learned.",
        ),
        (
            ("y", "y_head", "y_ffn", "z"),
            plots.duals,
            "duals",
            "Dual variables",
            "y presses the masks of pruned units to 0 in every layer alike, z presses R to R*.",
        ),
        (
            ("width_spread", "residual_head", "residual_ffn"),
            plots.uniformity,
            "uniformity",
            "How uniform the layers are",
            "Left: how far the layers' FFN widths differ. Right: the largest mask among the units "
            "to be pruned; what is left of it at the end is cut.",
        ),
        (
            ("max_prob", "changed"),
            plots.settling,
            "settling",
            "How the 2:4 masks settle",
            "Left: the probability of the most likely candidate of a group, without noise. Right: "
            "the share of groups whose most likely candidate is another than a logged step before.",
        ),
        (
            ("loss", "kl", "layer"),
            plots.losses,
            "losses",
            "Losses",
            f"{against}. Thin: each logged step; thick: a running median.",
        ),
    ):
        if plots.has(trace, *keys):
            yield stem, heading, caption, make(trace)


def _shape_tables(info: Mapping[str, Any], masks: Masks | None) -> list[str]:
    dense = info.get("dense") or (vars(masks.shape) if masks else {})
    pruned = info.get("pruned") or info.get("shape") or {}
    rows = [
        (label, number(dense.get(key, "")), number(pruned.get(key, "")))
        for key, label in SHAPE_ROWS
        if key in pruned or key in dense
    ]
    return [_table(("", "before", "after"), rows)] if pruned and rows else []


def _details(info: Mapping[str, Any]) -> list[str]:
    """Everything else of maskprune.json, folded away; the trace has its plots."""
    out = []
    plain: list[tuple[str, str]] = []
    for key, value in info.items():
        if key == "trace":
            continue
        if isinstance(value, Mapping):
            rows = [(str(k), number(v)) for k, v in value.items()]
            heading = escape(key.replace("_", " ").capitalize())
            out.append(f"<details><summary>{heading}</summary>{_table((), rows)}</details>")
        else:
            plain.append((key, number(value)))
    if plain:
        out.append(f"<details><summary>Run</summary>{_table((), plain)}</details>")
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    top = [line(head, "th")] if head else []
    return f"<table>{''.join([*top, *(line(row, 'td') for row in rows)])}</table>"
