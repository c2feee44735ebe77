"""The latency benchmark: the rule of equal cost, its formulas, its models, and what it says."""

import dataclasses
import functools
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.harness import read_rows
from benchmarks.uniform import estimate, latency
from benchmarks.uniform.regimes import cache_difference, prepare
from benchmarks.uniform.shapes import Widths, cost_of, named_config
from benchmarks.uniform.structure import (
    one_block,
    pipeline,
    stock_load,
    structure_row,
    tensor_parallel,
)
from benchmarks.uniform.sweep import Plan, groups, sweep
from benchmarks.uniform.variants import (
    SPREADS,
    VARIANTS,
    cut,
    difference,
    draw_masks,
    spread,
    widths_of,
)

HETEROGENEOUS = tuple(SPREADS)
SMALL = ["--threads", "1", "--model", "tiny", "--sparsity", "0.5", "--rounds", "2",
         "--seconds", "0.1", "--length", "8", "--context", "8"]  # fmt: skip


@pytest.fixture(autouse=True)
def same_threads():
    """The benchmark fixes torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(named_config("tiny")).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def models(dense):
    widths = widths_of(dense.config, 0.5)
    masks = {name: draw_masks(dense.config, w) for name, w in widths.items()}
    return {name: (cut(dense, w, masks[name]), w, masks[name]) for name, w in widths.items()}


@pytest.mark.parametrize("name", ["tiny", "wide-1024", "llama-7b", "llama-3-8b", "llama-3.2-1b"])
@pytest.mark.parametrize("sparsity", [0.2, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_heterogeneous_models_cost_what_the_uniform_one_costs_to_the_unit(name, sparsity, seed):
    config = named_config(name)
    widths = widths_of(config, sparsity, seed=seed)
    uniform = cost_of(config, widths["uniform"])
    dense = cost_of(config, widths["dense"])
    assert uniform.layer_parameters <= (1 - sparsity) * dense.layer_parameters
    for variant in HETEROGENEOUS:
        cost = cost_of(config, widths[variant])
        assert cost.parameters == uniform.parameters
        assert cost.prefill_flops(2, 33) == uniform.prefill_flops(2, 33)
        assert cost.train_flops(2, 33) == uniform.train_flops(2, 33)
        assert cost.decode_bytes(2, 33, 2) == uniform.decode_bytes(2, 33, 2)
        assert widths[variant].distinct_layers > 1
    assert widths["unaligned"].ffn[0] % 2 == 1


def test_at_half_the_llama_7b_spread_is_2_to_27_of_32_heads():
    widths = widths_of(named_config("llama-7b"), 0.5)["compresso"]
    assert (min(widths.heads), max(widths.heads)) == (2, 27)
    assert widths.heads == widths_of(named_config("llama-7b"), 0.5)["compresso"].heads
    assert widths.heads != widths_of(named_config("llama-7b"), 0.5, seed=1)["compresso"].heads


@pytest.mark.parametrize("ends", SPREADS.values())
@pytest.mark.parametrize(
    ("mean", "most", "layers", "step"),
    [(16, 32, 32, 1), (1, 3, 30, 1), (3, 3, 5, 1), (7, 8, 4, 1), (384, 768, 2, 64), (64, 64, 1, 8)],
)
def test_a_spread_keeps_its_sum_its_step_and_its_limits(mean, most, layers, step, ends):
    for seed in range(20):
        kept = spread(mean, most, layers, step, ends, random.Random(seed))
        assert sum(kept) == layers * mean and len(kept) == layers
        assert all(step <= k <= most and k % step == 0 for k in kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_flops_are_those_of_a_direct_count(models, variant):
    model, widths, _ = models[variant]
    cost = cost_of(model.config, widths)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    batch, length = 2, 24
    tokens = torch.zeros(batch, length, dtype=torch.long)
    before = model.config._attn_implementation
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False, logits_to_keep=1)
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = before
    # The eager scores fill the square of which T (T + 1) / 2 is counted; rope's outer product,
    # one multiply-add for each position and frequency, is not counted.
    square = cost.attention_flops(batch, length) * (2 * length) // (length + 1)
    rope = counter.get_total_flops() - (
        cost.prefill_flops(batch, length) - cost.attention_flops(batch, length) + square
    )
    assert 0 <= rope <= 2 * batch * length * widths.head_dim


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_bytes_are_those_of_the_cache(models, variant):
    from transformers import StaticCache

    model, widths, _ = models[variant]
    cache = StaticCache(config=model.config, max_cache_len=5)
    with torch.no_grad():
        model(torch.zeros(3, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cost_of(model.config, widths).kv_bytes(3, 5, 4)


def test_decode_reads_every_weight_once(models):
    model, widths, _ = models["uniform"]
    # Tied: the embedding is the output matrix, so all parameters are read.
    cost = cost_of(model.config, widths)
    assert cost.decode_bytes(2, 7, 4) == 4 * cost.parameters + cost.kv_bytes(2, 8, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_model_is_the_masked_dense_one(dense, models, variant):
    model, _, masks = models[variant]
    assert difference(model, dense, masks) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_the_same_with_and_without_cache(models, variant):
    model, _, _ = models[variant]
    assert cache_difference(model) < 1e-5
    tokens = torch.arange(6)[None]
    keywords = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **keywords)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **keywords))


def test_a_training_step_leaves_the_model_as_it_was(models):
    model, _, _ = models["uniform"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = prepare(model, "train", "eager", 1, 8, tag="test")
    first = runner.call()
    assert all(runner.call() < first for _ in range(1))
    runner.after()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_blocks_of_one_shape_share_one_compiled_graph(models, monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    for name in ("uniform", "compresso"):
        model, widths, _ = models[name]
        with torch.no_grad():
            runner = prepare(model, "prefill", "regional", 1, 8, tag=name)
        runner.after()
        assert runner.graphs == widths.distinct_layers
        assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_cuda_graphs_on_a_cpu_are_refused_with_the_reason(models):
    with pytest.raises(RuntimeError, match="CUDA graphs serve prefill and decode on a GPU"):
        prepare(models["uniform"][0], "prefill", "cudagraph", 1, 8, tag="test")


def test_tensor_parallel_imbalance_counts_the_fullest_shard():
    even = Widths((8, 8), (8, 8), (64, 64), 16)
    assert tensor_parallel(even, 4) == {"imbalance": 1.0, "undivided": 0}
    # One KV group a layer over two ranks: one rank has it all, 2 * 16 * 2 = 64 of a layer's 256.
    lone = Widths((1, 1), (1, 1), (64, 64), 16)
    assert tensor_parallel(lone, 2) == {"imbalance": round((64 + 96) / 128, 4), "undivided": 2}


def test_pipeline_stages_by_equal_count_and_by_the_best_cut():
    widths = Widths((1,) * 4, (1,) * 4, (30, 10, 10, 10), 1)
    w = [94, 34, 34, 34]
    stages = pipeline(widths, 2)
    assert stages == {
        "equal_count": round((w[0] + w[1]) / 98, 4),
        "best_cut": round(max(w[0], sum(w[1:])) / 98, 4),
    }
    assert pipeline(widths, 8) is None


def test_only_uniform_layers_run_through_one_block_and_load_as_stock(models):
    for name in ("dense", "uniform", "unaligned"):
        assert one_block(models[name][0]) == {"one_block": True}
        assert stock_load(models[name][0])["from_pretrained"] is True
    for name in ("nuteprune", "compresso"):
        assert one_block(models[name][0])["one_block"] is False
        assert stock_load(models[name][0])["from_pretrained"] is False
    row = structure_row(models["uniform"][0], models["uniform"][1], load=False)
    assert row["distinct_layers"] == 1 and row["tp4_imbalance"] == 1.0


def test_a_model_too_large_for_the_device_is_skipped_with_its_row(monkeypatch):
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 1 << 30)
    rows = list(sweep(Plan(models=("llama-7b",), sparsities=(0.5,))))
    assert len(rows) == 1
    assert rows[0]["skipped"].startswith("too large: needs") and "median_ms" not in rows[0]


def test_variants_that_do_not_fit_together_are_taken_in_pairs_with_dense(monkeypatch, dense):
    variants = ("dense", "uniform", "mild", "compresso")
    plan = Plan(models=("tiny",), variants=variants, structure=False)
    widths = widths_of(dense.config, 0.5)
    costs = {name: cost_of(dense.config, w) for name, w in widths.items()}
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 1 << 40)
    assert groups(plan, costs) == [["dense", "uniform", "mild", "compresso"]]
    # 4 * (3.67 + 1.70) MB for a pair, 4 * 3 * 1.70 MB more for the rest, caches beside.
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 30_000_000)
    assert groups(plan, costs) == [["dense", v] for v in ("uniform", "mild", "compresso")]
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 1 << 20)
    assert groups(plan, costs) == []
    # The stacked layers of the dense model, 14 MB, are counted where structure is shown.
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 30_000_000)
    assert groups(dataclasses.replace(plan, structure=True), costs) == []


def test_the_estimate_counts_rounds_up_to_the_limit_and_no_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("benchmarks.uniform.sweep.free_bytes", lambda device: 1 << 32)
    speed = (1e11, 1e11)

    def about(**other):
        plan = {"models": ("tiny",), "sparsities": (0.5,), "regimes": ("prefill", "train")}
        return estimate.seconds(Plan(**{**plan, **other}), speed)

    once = about(rounds=1, train_rounds=1)
    assert once < about(rounds=2, train_rounds=1) < about(rounds=2, train_rounds=2)
    long = {"rounds": 10**6, "train_rounds": 10**6}
    capped = about(seconds=30, train_seconds=30, **long)
    assert once + 50 < capped < once + 60
    assert about(modes=("eager", "regional")) > about() + estimate.COMPILE
    assert about(models=("llama-7b",)) == 0


def test_a_run_writes_rows_and_plots_and_compares(tmp_path, capsys):
    out, committed = tmp_path / "run", tmp_path / "committed.jsonl"
    variants = ["--variants", "dense,uniform,compresso", "--decode-batch", "1,2"]
    assert latency.main([*SMALL, *variants, "--out", str(out), "--rows", str(committed)]) == 0
    rows = read_rows(out / "rows.jsonl")
    timed = [row for row in rows if row["op"] == "latency"]
    assert {(r["regime"], r["provider"]) for r in timed} == {
        (regime, variant)
        for regime in ("prefill", "decode", "train")
        for variant in ("dense", "uniform", "compresso")
    }
    assert len(timed) == 4 * 3 and len(rows) == len(timed) + 3
    for row in timed:
        assert row["checked"] and row["median_ms"] > 0 and row["ideal"] >= 1
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["noisy"] == (row["noise"] > 0.03)
    assert read_rows(committed) == rows
    assert (out / "rows.jsonl").is_file() and (out / "batch-tiny-eager.png").stat().st_size > 10_000
    assert "tiny float32, sparsity 0.5, prefill eager" in capsys.readouterr().out
    assert latency.main(["--compare", str(committed), str(out / "rows.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "uniform" in shown and "1" in shown and "one file only" not in shown
    with pytest.raises(SystemExit):
        latency.main([*SMALL, "--out", str(out)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "--sparsity 1.5: expected a number between 0 and 1"),
        (["--sparsity", "x"], "expected one or more float"),
        (["--model", "nope"], "neither a known shape nor a folder"),
        (["--variants", "foo"], "'foo' is unknown; expected some of dense"),
        (["--batch", "0"], "expected a number above 0"),
        (["--compare", "a.jsonl", "b.jsonl"], "a.jsonl: no such file"),
        (["--doc", "x.md"], "--doc and --from go together"),
        (["--multiple-of", "99999"], "multiple_of is 99999"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        latency.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_a_dry_run_prints_shapes_and_measures_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert latency.main(["--dry-run", "--model", "llama-7b", "--sparsity", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "2..27" in shown and "prefill eager batch 1" in shown and not list(tmp_path.iterdir())
