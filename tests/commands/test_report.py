"""A run as plots and a page, and the model card."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from maskprune.commands import plots
from maskprune.commands.report import model_card, read_trace, report
from maskprune.hf.shape import Shape
from maskprune.structured.masks import Masks

LAYERS, UNITS = 5, 96


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Drawing is slow, and what most tests here read is the page."""
    if "drawn" in request.node.name:
        monkeypatch.setattr("maskprune.commands.report.DPI", 30)
    else:
        monkeypatch.setattr("maskprune.commands.report._png", lambda figure: b"png")


def masks_of(head_unit="kv_group", kept=64):
    masks = Masks(Shape(LAYERS, 6, 3, 8, UNITS), head_unit, "llama", "org/base")
    generator = torch.Generator().manual_seed(0)
    for parameter, keep in ((masks.head, masks.head.shape[1] - 1), (masks.ffn, kept)):
        values = 0.5 + 0.5 * torch.rand(parameter.shape, generator=generator)
        order = torch.rand(parameter.shape, generator=generator).argsort(1)
        parameter.data.copy_(values.masked_fill(order >= keep, 0.0))
    return masks


def trace_of(steps=40):
    return [
        {
            "step": t,
            "loss": 1.0 + 1 / (t + 1),
            "kl": 1.0 + 1 / (t + 1),
            "layer": 0.0,
            "R": max(0.8, 1 - 0.01 * t),
            "R_star": 0.8,
            "y": 0.025 + 0.01 * t,
            "z": 0.1 * t,
            "r_head": 0.005 * t,
            "r_ffn": 0.01 * t,
            "residual_head": 0.9**t,
            "residual_ffn": 0.0,
            "width_spread": 3.0 / (t + 1),
            "moved_head": 0.0,
            "moved_rank_head": 0.0,
            "signal_head": 0.5,
            "moved_ffn": 0.001 * min(t, 20),
            "moved_rank_ffn": 0.002 * min(t, 20),
            "signal_ffn": 1.0 + 0.01 * t,
            "tokens_per_s": 1000.0,
            "locked": t >= 20,
        }
        for t in range(steps)
    ]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    masks_of().save(folder / "masks.safetensors")
    (folder / "trace.jsonl").write_text("".join(json.dumps(r) + "\n" for r in trace_of()))
    info = {
        "model": "org/<base>",
        "method": "maskprune",
        "seed": 3,
        "settings": {"sparsity": 0.2, "targets": ["gguf"], "note": "<script>x</script>"},
        "versions": {"maskprune": "0.1.0"},
        "shape": {"layers": 5, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64},
        "trace": [1, 2, 3],
    }
    (folder / "maskprune.json").write_text(json.dumps(info))
    return folder


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_picture_drawn_and_needs_nothing_else(run):
    path = report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    files = sorted(p.stem for p in (run / "report").glob("*.png"))
    assert files == sorted(
        ["kept", "head_heatmap", "head_histogram", "ffn_heatmap", "ffn_histogram"]
        + ["resource", "duals", "uniformity", "losses", "learning"]
    )
    assert page.tags.count("img") == len(files)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_the_page_says_what_was_run_and_what_came_out(run):
    page = Page(report(run).read_text(encoding="utf-8"))
    assert "<base>, pruned by maskprune" in page.text
    assert "maskprune, sparsity 20%, up to step 39, median 1,000 tokens/s, seed 3" in page.text
    assert "FFN width9664" in page.text
    assert "Every layer keeps the same number" in page.text
    assert "<script>x</script>" in page.text and "script" not in page.tags
    assert "[1, 2, 3]" not in page.text


def test_masks_that_are_not_uniform_are_reported(run):
    masks = masks_of()
    masks.ffn.data[0] = 1.0
    masks.save(run / "masks.safetensors")
    text = report(run).read_text(encoding="utf-8")
    assert "The layers differ: these masks are not final" in text


def test_a_run_in_progress_has_a_page(run):
    (run / "masks.safetensors").unlink()
    (run / "maskprune.json").unlink()
    with (run / "trace.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    page = Page(report(run).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 5
    assert len(read_trace(run)) == 40


def test_masks_alone_and_settings_alone_have_a_page(run):
    (run / "trace.jsonl").unlink()
    assert Page(report(run).read_text(encoding="utf-8")).tags.count("img") == 5
    (run / "masks.safetensors").unlink()
    assert "seed 3" in report(run).read_text(encoding="utf-8")


def test_a_trace_without_some_keys_or_with_nan_has_a_page(run):
    rows = [{"step": t, "loss": math.nan if t == 3 else 1.0, "R": None} for t in range(6)]
    (run / "trace.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report(run)
    steps, values = plots.series(rows, "loss")
    assert steps.tolist() == [0, 1, 2, 4, 5] and set(values) == {1.0}
    assert plots.curves(rows, plots.LOSSES) is None and plots.curves(rows, plots.RESOURCE) is None


def test_a_folder_without_a_run_is_an_error(tmp_path, run):
    with pytest.raises(ValueError, match="is not a folder; give the output folder"):
        report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        report(tmp_path / "empty")
    (run / "trace.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"trace.jsonl, line 1: broken JSON"):
        report(run)
    (run / "maskprune.json").write_text("{")
    with pytest.raises(ValueError, match="maskprune.json is broken JSON"):
        report(run)


@pytest.mark.parametrize(
    "mask",
    [np.ones((1, 1)), np.zeros((2, 3)), np.zeros((2, 65)), np.linspace(0, 1, 6000).reshape(4, -1)],
    ids=lambda mask: str(mask.shape),
)
def test_masks_of_every_size_are_drawn(mask):
    for figure in (plots.heatmap(mask, "units"), plots.histogram(mask, "units")):
        assert isinstance(figure, Figure)
        figure.savefig("/dev/null", format="png", dpi=20)


def test_a_wide_mask_is_drawn_in_values_that_it_has():
    mask = (np.random.default_rng(0).random((2, 1536)) > 0.5).astype(float)
    (axis,) = plots.heatmap(mask, "units").axes
    shown = axis.images[0].get_array()
    assert axis.get_title(loc="left") == "Masks of units, every 4th drawn"
    assert np.array_equal(shown, mask[:, ::4])
    assert set(np.unique(axis.images[0].cmap(shown).reshape(-1, 4), axis=0)[:, 0]) == {
        int(colour[1:3], 16) / 255 for colour in (plots.PRUNED, plots.BLUE)
    }


def test_masks_of_0_and_1_and_kinds_that_lost_nothing_have_no_histogram(run):
    masks = masks_of()
    masks.head.data.fill_(1.0)
    masks.ffn.data.copy_((masks.ffn > 0).float())
    masks.save(run / "masks.safetensors")
    text = report(run).read_text(encoding="utf-8")
    assert "Every mask is 0 or 1: units are kept as they are, or removed." in text
    assert "Distribution of" not in text and "KV groups" not in text


def drawn(panels, trace):
    return {p.title: [c.label for c, _, _ in plots.lines(trace, p)] for p in panels}


def test_flat_and_repeated_curves_are_left_out():
    trace = trace_of()
    assert drawn(plots.LOSSES, trace) == {"Training loss": ["loss"]}
    assert drawn(plots.RESOURCE, trace)["Resource"] == ["R", "R*, the budget"]
    assert drawn(plots.UNIFORMITY, trace)["What is left to cut"] == ["heads"]
    assert drawn(plots.LEARNING, trace) == {
        "Units moved": ["FFN units"],
        "How far they moved": ["FFN units"],
        "Signal of gradients": ["FFN units"],
    }
    _, steps, _ = plots.lines(trace, plots.RESOURCE[0])[0]
    assert steps[-1] == 20  # What the lock ends is drawn until the lock.
    assert plots.curves(trace[20:], plots.RESOURCE) is None


def test_the_page_begins_with_what_changed(run):
    info = json.loads((run / "maskprune.json").read_text())
    info["dense"] = {"ffn": 96, "heads": 6, "parameters": 2_000_000}
    info["pruned"] = {"ffn": 64, "heads": 6, "parameters": 1_500_000}
    info["perplexity"] = {"data": "held-out text", "seq_len": 256, "dense": 20.0, "pruned": 30.0}
    info["logits_masked_against_exported"] = {"largest": 1e-4, "largest_logit": 30.0, "tokens": 9}
    (run / "maskprune.json").write_text(json.dumps(info))
    text = Page(report(run).read_text(encoding="utf-8")).text
    text = text[text.index("What changed") :]
    assert "beforeafterchangeperplexity2030+50.0%" in text
    assert "query heads66same" in text and "parameters2,000,0001,500,000-25.0%" in text
    assert "Perplexity is of held-out text, windows of 256." in text
    assert "differ from the masked model's by at most 1.0e-04, of a largest logit of 30.0" in text
    assert (
        text.index("parameters") < text.index("What the masks learned") < text.index("Units kept")
    )
    assert "FFN units2.00%4.00%1.19" in text and "head units0.00%0.00%0.50" in text


def test_a_run_without_a_ranking_has_nothing_moved(run):
    info = json.loads((run / "maskprune.json").read_text())
    info["settings"]["warm_start"] = "none"
    (run / "maskprune.json").write_text(json.dumps(info))
    text = Page(report(run).read_text(encoding="utf-8")).text
    assert "would have kept" not in text.partition("Units kept")[0] and "FFN units1.19" in text


@pytest.mark.parametrize(
    "loss, verdict",
    [
        (lambda t: 2.0 - 0.02 * t, "so it helped"),
        (lambda t: 1.0 + 0.02 * t, "so it did harm"),
        (lambda t: 1.0 + 0.3 * (t % 2), "it is unclear whether it helped"),
    ],
)
def test_the_page_says_whether_training_after_the_lock_helped(run, loss, verdict):
    rows = [row | {"loss": loss(row["step"])} for row in trace_of()]
    (run / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict in report(run).read_text(encoding="utf-8")
    (run / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:25]))
    assert "Training after" not in report(run).read_text(encoding="utf-8")


def test_query_head_masks_have_a_row_a_layer(run):
    masks_of("query_head").save(run / "masks.safetensors")
    assert "Masks of query heads, by layer" in report(run).read_text(encoding="utf-8")


CARD = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "sparsity": 0.2,
    "method": "maskprune",
    "steps": 100,
    "dense": {"heads": 9, "ffn": 1536, "parameters": 134515008},
    "pruned": {"heads": 6, "ffn": 1280, "parameters": 111000000},
    "difference": {"largest": 1.25e-4, "largest_logit": 30.0, "tokens": 64},
    "tp": [1, 2],
    "limits": ["Trained on one hundred steps."],
    "versions": {"maskprune": "0.1.0"},
}


def test_the_card_has_the_header_of_the_hub_and_the_three_lines_that_load_it():
    card = model_card(CARD)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["maskprune", "pruned", "structured-pruning"],
        "license": "apache-2.0",
    }
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")
    for fact in (
        "| FFN width | 1536 | 1280 |",
        "| parameters | 134,515,008 | 111,000,000 |",
        "Largest difference 0.000125 at a largest logit of 30, over 64 tokens.",
        "with 20% of its attention and FFN weights removed",
        "sizes that divide this shape: 1, 2.",
        "* Trained on one hundred steps.",
    ):
        assert fact in text


def test_a_card_with_few_facts_has_no_empty_parts(tmp_path):
    card = model_card({"base_model": str(tmp_path)})
    assert "base_model" not in card and str(tmp_path) not in card and tmp_path.name in card
    for heading in ("How it was made", "Proof", "Perplexity", "| before"):
        assert heading not in card
    assert "## Use" in model_card({})
