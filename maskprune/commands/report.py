"""A run as one HTML page: its plots and tables."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskprune.files import JsonObject, own_file, replace_file
from maskprune.hf.model_card import SHAPE_ROWS, model_card, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskprune.structured.masks import Masks

__all__ = ["model_card", "read_info", "read_trace", "report"]
DPI = 150
MOVED = "Moved: pruned units that the first masks, those of the ranking, would have kept."
QUALITY_ROWS = (("ppl", "perplexity"),)
SPEED_ROWS = (
    ("flops_per_token", "FLOPs per token"),
    ("prefill_tokens_per_s", "prefill, tokens/s"),
    ("decode_tokens_per_s", "decode, tokens/s"),
)
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
    body += [*_changed(info, masks, trace), *_learned(info, trace)]
    for stem, heading, caption, figure in _sections(info, trace, masks):
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


def read_info(run: Path) -> JsonObject:
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


def read_trace(run: Path) -> list[JsonObject]:
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


def _lead(info: JsonObject, trace: Sequence[JsonObject]) -> str:
    parts = [str(info["method"])] if info.get("method") else []
    settings = {**(info.get("settings") or {}), **info}
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


def _changed(info: JsonObject, masks: Masks | None, trace: Sequence[JsonObject]) -> Iterator[str]:
    """How the run changed the model: sizes, quality, proof, and the effect of training."""
    dense = dict(info.get("dense") or (vars(masks.shape) if masks else {}))
    pruned = dict(info.get("pruned") or info.get("shape") or {})
    perplexity = info.get("perplexity") or {}
    if perplexity:
        dense["ppl"], pruned["ppl"] = perplexity["dense"], perplexity["pruned"]
    rows = [
        (
            label,
            number(dense.get(key, "")),
            number(pruned[key]),
            _change(dense.get(key), pruned[key]),
        )
        for key, label in (*QUALITY_ROWS, *SHAPE_ROWS, *SPEED_ROWS)
        if key in pruned
    ]
    said = []
    if info.get("weights_masked"):
        said.append(
            f"Two of every four weights are zero in {info.get('linears')} linears: "
            f"{number(info['weights_masked'])} of {number(info.get('parameters'))} parameters."
        )
    if perplexity:
        window = f", windows of {perplexity['seq_len']}" if perplexity.get("seq_len") else ""
        said.append(f"Perplexity is of {perplexity.get('data', 'held-out text')}{window}.")
    elif pruned:
        said.append("Perplexity was not measured; `maskprune eval` measures it for each model.")
    if proof := info.get("logits_masked_against_exported"):
        trained = (info.get("settings") or {}).get("train") == "weights"
        whose = (
            "When the model was cut, before its weights were trained, its"
            if trained
            else "The checkpoint's"
        )
        said.append(
            f"{whose} logits differ{'ed' if trained else ''} from the masked model's by at most "
            f"{proof['largest']:.1e}, of a largest logit of {proof['largest_logit']:.1f}, over "
            f"{number(proof['tokens'])} tokens."
        )
    said += [text for text in (_after_lock(trace),) if text]
    if rows or said:
        yield "<h2>What changed</h2>"
    if rows:
        yield _table(("", "before", "after", "change"), rows)
    yield from (f"<p>{escape(text)}</p>" for text in said)


def _change(before: object, after: object) -> str:
    if not isinstance(before, int | float) or not isinstance(after, int | float) or not before:
        return ""
    return "same" if before == after else f"{after / before - 1:+.1%}"


def _after_lock(trace: Sequence[JsonObject]) -> str | None:
    """Whether training helped once the shape was final, judged against the batches' noise."""
    # The loss of the step that made the shape final is of the masks before.
    rows = [r for r in trace if r.get("locked") and isinstance(r.get("loss"), int | float)][1:]
    if len(rows) < 8:
        return None
    values = np.array([row["loss"] for row in rows])
    part = max(3, len(rows) // 5)
    first, last = np.median(values[:part]), np.median(values[-part:])
    # A step's spread from its neighbours; a median of n has about 1.25 / sqrt(n) of it.
    spread = np.median(np.abs(np.diff(values))) / (0.6745 * math.sqrt(2))
    noise = 1.25 * spread * math.sqrt(2 / part)
    if not math.isfinite(first - last):
        return None
    if abs(first - last) <= 3 * noise:
        verdict = "no more than batches differ, so it is unclear whether it helped"
    else:
        verdict = "so it helped" if last < first else "so it did harm"
    return (
        f"Training after the shape was final (steps {rows[0]['step']} to {rows[-1]['step']}) took "
        f"the loss from {first:.3f} to {last:.3f}, {verdict}."
    )


def _learned(info: JsonObject, trace: Sequence[JsonObject]) -> Iterator[str]:
    """How far the masks left the ranking that they began with, and what drove them."""
    ranked = (info.get("settings") or {}).get("warm_start") != "none"
    rows = []
    for kind, unit in (("head", "head units"), ("ffn", "FFN units")):
        signals = [row[f"signal_{kind}"] for row in trace if row.get(f"signal_{kind}") is not None]
        last = next((row for row in reversed(trace) if row.get(f"moved_{kind}") is not None), None)
        if last is not None and (last.get(f"r_{kind}") or signals):
            moved = [f"{last[f'moved_{kind}']:.2%}", f"{last[f'moved_rank_{kind}']:.2%}"]
            signal = f"{np.median(signals):.2f}" if signals else ""
            rows.append((unit, *(moved if ranked else ()), signal))
    if rows:
        yield "<h2>What the masks learned</h2>"
        yield (
            f"<p>{escape(MOVED) + ' ' if ranked else ''}Signal: the squared mean of a mask's "
            "gradient over the variance of that mean; noise alone gives about 0.45.</p>"
        )
        moved = ["moved", "how far, of a layer's units"] if ranked else []
        yield _table(("", *moved, "signal, median over the steps"), rows)


def _sections(
    info: JsonObject, trace: Sequence[JsonObject], masks: Masks | None
) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, heading, caption, figure) of every plot that the run has data for."""
    from maskprune.commands import plots

    # One column per unit that is cut, one row per layer, for both units of head pruning.
    kinds = {}
    if masks is not None:
        unit = "KV groups" if masks.head_unit == "kv_group" else "query heads"
        heads = masks.head.detach().numpy().reshape(masks.shape.layers, -1)
        kinds = {unit: heads, "FFN units": masks.ffn.detach().numpy()}
        kinds = {unit: mask for unit, mask in kinds.items() if mask.size and (mask < 1).any()}
    if kinds:
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
        binary = plots.is_binary(mask)
        inside = float(((mask > 0) & (mask < 0.99)).mean() / max((mask > 0).mean(), 1e-9))
        stem = "ffn" if unit == "FFN units" else "head"
        yield (
            f"{stem}_heatmap",
            f"Masks of {unit}, by layer",
            "Every mask is 0 or 1: units are kept as they are, or removed."
            if binary
            else f"{inside:.0%} of the {unit} kept have a mask below 0.99: they are scaled, and "
            "the scale is folded into the weights.",
            plots.heatmap(mask, unit),
        )
        if not binary:
            yield (
                f"{stem}_histogram",
                f"Distribution of the masks of {unit}",
                "How often each value occurs; the column at 0 is what was pruned.",
                plots.histogram(mask, unit),
            )
    settings = info.get("settings") or {}
    two_four = any("max_prob" in row for row in trace)
    against = (
        "The loss that was fitted, without the reward for kept weights"
        if two_four
        else "The loss and its parts: the KL to the unpruned model on the same tokens, the cross "
        "entropy of the text's next tokens and, if asked for, the error of hidden states"
    )
    for panels, stem, heading, caption in (
        (
            plots.LOSSES,
            "losses",
            "Losses",
            f"{against}. Thin: each logged step; thick: a running median.",
        ),
        (
            plots.RESOURCE,
            "resource",
            "On the way to the budget",
            "R is the share of attention and FFN weights kept, R* the budget. The split "
            "between heads and FFN units is learned.",
        ),
        (
            plots.UNIFORMITY,
            "uniformity",
            "How uniform the layers are",
            "How far the layers' FFN widths differ, and the largest mask among the units to be "
            "pruned, which are set to 0 at the end.",
        ),
        (
            # Masks that begin equal have no ranking to leave.
            plots.LEARNING[2:] if settings.get("warm_start") == "none" else plots.LEARNING,
            "learning",
            "What the masks learn",
            "Pruned units that the first masks would have kept, how far those stood from the cut, "
            "and the signal of the masks' gradients, see the table above.",
        ),
        (
            plots.DUALS,
            "duals",
            "Dual variables",
            "y pushes the masks of pruned units to 0 in every layer alike, z pushes R to R*.",
        ),
        (
            plots.SETTLING,
            "settling",
            "How the 2:4 masks settle",
            "The probability of the most likely candidate of a group, without noise, and the share "
            "of groups whose most likely candidate differs from that of the logged step before.",
        ),
    ):
        if figure := plots.curves(trace, panels):
            yield stem, heading, caption, figure


def _details(info: JsonObject) -> list[str]:
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
