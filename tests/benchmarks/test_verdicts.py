"""What result rows say, and the page that is filled from them."""

import pytest

from benchmarks.harness import write_rows
from benchmarks.uniform import latency, plots, verdicts
from benchmarks.uniform import page as uniform_page


def row(provider, ms, speedup, noisy=False, **other):
    case = {"model": "m", "weights": "random", "dtype": "float32", "sparsity": 0.5, "batch": 1,
            "regime": "prefill", "mode": "eager", "length": 8}  # fmt: skip
    return {"op": "latency", "provider": provider, **case, "median_ms": ms, "p10_ms": ms,
            "p90_ms": ms, "tokens_s": 8e3 / ms, "speedup": speedup, "ideal": 2.0, "id": provider,
            "gain_share": 0.5, "noise": 0.5 if noisy else 0.0, "noisy": noisy, "graphs": None,
            "compile_s": None, "cpu": "c", "threads": 1, "torch": "t", "commit": "x",
            "date": "2020-01-01T00:00:00Z", **other}  # fmt: skip


def test_it_says_where_uniform_is_slower_and_where_no_difference_is_seen():
    rows = [row("dense", 10.0, 1.0), row("uniform", 10.1, 0.99), row("mild", 8.0, 1.25)]
    ((case, slower, alike),) = verdicts.where_not_faster(rows)
    assert slower == {"mild": pytest.approx(0.79, abs=0.005)} and alike == {"dense": 0.99}
    assert verdicts.sentence(case, slower, alike) == (
        "m float32, sparsity 0.5, prefill eager, batch 1, 8 tokens: "
        "uniform is slower than mild 0.79; no difference seen from dense 0.99"
    )
    assert verdicts.where_not_faster([row("dense", 10.0, 1.0), row("uniform", 5.0, 2.0)]) == []


def test_of_two_runs_of_a_case_the_newest_free_of_noise_counts():
    def run(ms, noisy=False):
        return [row("dense", 10.0, 1.0, noisy), row("uniform", ms, 10 / ms, noisy)]

    def median(rows):
        ((by_variant),) = verdicts.cases(rows).values()
        return by_variant["uniform"]["median_ms"]

    assert median(run(5.0) + run(4.0)) == 4.0
    assert median(run(5.0) + run(4.0, noisy=True)) == 5.0
    assert median(run(5.0, noisy=True) + run(4.0)) == 4.0
    assert median(run(5.0, noisy=True) + run(4.0, noisy=True)) == 4.0


def test_a_newer_run_does_not_borrow_variants_of_an_older_one():
    older = [row("dense", 20.0, 1.0), row("uniform", 10.0, 2.0), row("mild", 11.0, 1.8)]
    newer = [row("dense", 10.0, 1.0), row("uniform", 5.0, 2.0)]
    assert set(*map(tuple, verdicts.cases(older + newer).values())) == {"dense", "uniform"}


def test_variants_measured_in_pairs_with_dense_are_compared_by_their_speed_ups():
    pairs = [row("dense", 10.0, 1.0), row("uniform", 5.0, 2.0),
             row("dense", 20.0, 1.0), row("mild", 9.0, 20 / 9)]  # fmt: skip
    ((_, slower, alike),) = verdicts.where_not_faster(pairs)
    assert slower == {"mild": pytest.approx(0.9)} and alike == {}


def test_a_noisy_case_shows_no_ratio_and_gives_no_verdict():
    rows = [row("dense", 10.0, 1.0, True), row("uniform", 9.0, 1.11, True)]
    shown = verdicts.report(rows)
    assert "too noisy for ratios" in shown and "1.11" not in shown
    assert "no case was free of noise" in shown


@pytest.mark.parametrize(
    "rows",
    [
        [row("dense", 10.0, 1.0), row("mild", 9.0, 1.11)],
        [row("dense", 10.0, 1.0, True), row("uniform", 9.0, 1.11, True),
         row("dense", 10.0, 1.0), row("mild", 8.0, 1.25)],
        [row("dense", 10.0, 1.0), row("uniform", 5.0, 2.0),
         row("dense", 10.0, 1.0, True), row("mild", 4.0, 2.5, True)],
    ],
    ids=["no uniform", "a noisy uniform", "a noisy rival"],
)  # fmt: skip
def test_a_case_without_a_quiet_row_on_each_side_is_not_a_win(rows):
    assert "is the fastest" not in verdicts.report(rows)
    ((by_variant),) = verdicts.cases(rows).values()
    assert ("uniform" in by_variant) == any(r["provider"] == "uniform" for r in rows)


def test_speedup_plot_is_drawn_from_rows_alone(tmp_path):
    rows = [row("dense", 10.0, 1.0), row("uniform", 5.5, 1.8), row("mild", 6.0, 1.6)]
    paths = plots.draw(rows, tmp_path)
    assert [path.name for path in paths] == ["speedup-m-eager.png"]


def test_the_page_is_filled_from_rows_and_says_what_was_not_measured(tmp_path):
    page = tmp_path / "uniform.md"
    page.write_text(
        "# A\n<!-- begin: prefill -->\nold\n<!-- end -->\nkept\n"
        "<!-- begin: decode -->\n<!-- end -->\n<!-- begin: machines -->\n<!-- end -->\n"
    )
    rows = [row("dense", 10.0, 1.0, checked=True), row("uniform", 5.0, 2.0, checked=True)]
    written = write_rows(tmp_path / "rows.jsonl", rows)
    assert latency.main(["--doc", str(page), "--from", str(tmp_path / "rows.jsonl")]) == 0
    text = page.read_text()
    assert "old" not in text and "kept" in text and f"`{written[1]['id']}`" in text
    assert "Not measured yet." in text and "| A100 | not measured |" in text


def test_each_variant_has_one_line_of_structure_the_newest():
    def fact(provider, loaded, id):
        shards = {f"tp{n}_{what}": 1 for n in (2, 4, 8) for what in ("imbalance", "undivided")}
        return {"op": "structure", "provider": provider, "model": "m", "weights": "random",
                "dtype": "float32", "sparsity": 0.5, "distinct_layers": 1, "one_block": True,
                "from_pretrained": loaded, "id": id, **shards}  # fmt: skip

    old = [fact("dense", None, "a"), fact("uniform", None, "b"), fact("mild", None, "c")]
    text = uniform_page.structure([*old, fact("dense", True, "d"), fact("uniform", True, "e")])
    assert [line.split("`")[1] for line in text.splitlines()[2:]] == ["d", "e", "c"]


def test_losses_are_one_line_a_case():
    rows = [row("dense", 10.0, 1.0), row("uniform", 5.0, 2.0), row("unaligned", 4.8, 2.08),
            row("mild", 4.5, 2.2), row("compresso", 5.1, 1.96)]  # fmt: skip
    assert uniform_page.losses(rows).splitlines()[2:] == [
        "| m | 0.5 | prefill eager 1 x 8 | unaligned 0.96, mild 0.91 | compresso 1.02 |"
    ]
    assert uniform_page.losses(rows[:2]) == "No such case in the rows."
