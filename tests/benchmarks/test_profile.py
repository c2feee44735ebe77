"""Where a prefill's time goes: parts timed by hooks, their rows, and the page's table."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import read_rows
from benchmarks.uniform import breakdown, latency
from benchmarks.uniform.shapes import named_config


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def profile(path, *more):
    arguments = ["--profile", "--threads", "1", "--model", "tiny", "--sparsity", "0.5,0.2"]
    return latency.main([*arguments, "--length", "8", "--rounds", "3", "--rows", str(path), *more])


def test_parts_of_a_prefill_sum_to_its_total_and_no_hook_stays():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(named_config("tiny")).eval()
    times = breakdown.breakdown({"a": model, "b": model}, 1, 8, 3)
    for parts in times.values():
        for i in range(3):
            total = parts["total"].samples[i]
            rest = sum(t.samples[i] for part, t in parts.items() if part != "total")
            assert rest == pytest.approx(total)
    assert set(breakdown.PARTS.values()) | {breakdown.REST, "total"} == set(times["a"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_profile_writes_a_row_a_variant_and_part(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert profile(path) == 0
    rows = read_rows(path)
    parts = {*breakdown.PARTS.values(), breakdown.REST, "total"}
    assert {(r["sparsity"], r["provider"], r["part"]) for r in rows} == {
        (s, v, p) for s in (0.2, 0.5) for v in ("dense", "uniform") for p in parts
    }
    assert len(rows) == 2 * 2 * len(parts)
    for row in rows:
        assert row["op"] == "latency_profile" and row["checked"] and row["median_ms"] > 0
        assert row["samples"] == 3 and row["threads"] == 1 and row["commit"] and row["torch"]
        assert 0 < row["share"] <= 1 and row["noisy"] == (row["noise"] > 0.03)
    shown = capsys.readouterr().out
    assert "tiny float32, prefill 1 x 8, sparsity 0.5, ideal: dense 1, uniform 1.98" in shown
    assert profile(path, "--overwrite") == 0
    assert len(read_rows(path)) == len(rows)


def part_row(provider, part, ms, share, noise=0.0):
    return {"op": "latency_profile", "provider": provider, "part": part, "model": "m",
            "dtype": "float32", "sparsity": 0.5, "batch": 1, "length": 8, "median_ms": ms,
            "share": share, "noise": noise, "noisy": noise > 0.03, "ideal": 2.0,
            "cpu": "c", "threads": 1, "torch": "t", "commit": "x", "checked": True,
            "date": "2020-01-01T00:00:00Z", "id": f"{provider[0]}-{part}-{ms}"}  # fmt: skip


def run(ms, noise=0.0):
    return [
        part_row(variant, part, ms * share * factor, share, noise)
        for variant, factor in (("dense", 1), ("uniform", 0.5))
        for part, share in (("norms", 0.25), ("total", 1.0))
    ]


def test_the_page_shows_the_newest_quiet_profile_or_that_there_is_none(tmp_path):
    page, rows = tmp_path / "page.md", tmp_path / "rows.jsonl"
    page.write_text("<!-- begin: profile -->\n<!-- end -->\n")

    def shown(taken):
        rows.write_text("".join(json.dumps(row) + "\n" for row in taken))
        assert latency.main(["--doc", str(page), "--from", str(rows)]) == 0
        return page.read_text().splitlines()[1:-1]

    assert shown([]) == shown(run(8.0, noise=0.5)) == ["Not measured yet."]
    assert shown(run(4.0) + run(8.0) + run(16.0, noise=0.5))[2:] == [
        "| m | 0.5 | 1 x 8 | norms | 2 | 1 | 2.00 | 25% | `d-norms-2.0` `u-norms-1.0` |",
        "| m | 0.5 | 1 x 8 | total | 8 | 4 | 2.00 | 100% | `d-total-8.0` `u-total-4.0` |",
    ]
