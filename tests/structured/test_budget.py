"""Which shapes are legal, what they cost, and what a config class takes."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from maskprune.hf.pruned_config import target_config
from maskprune.hf.shape import shape_of
from maskprune.structured.budget import Budget, layer_weights
from maskprune.structured.plan import cost, lint, plan, render, tp_sizes

LLAMA_7B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    intermediate_size=11008, vocab_size=32000,
)  # fmt: skip
SMOL = LlamaConfig(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip


def test_llama_7b_has_the_shares_that_the_paper_implies():
    budget = Budget(LLAMA_7B, 0.5)
    assert round(budget.a_head, 4) == 0.3316 and round(budget.a_ffn, 4) == 0.6684
    assert 32 * layer_weights(LLAMA_7B, shape_of(LLAMA_7B)) == 6_476_005_376
    assert cost(LLAMA_7B).parameters == 6_738_415_616


@pytest.mark.parametrize("sparsity", [0.2, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("config", [LLAMA_7B, SMOL], ids=["7b", "smol"])
def test_every_split_meets_the_budget_and_is_the_widest_of_its_head_count(config, unit, sparsity):
    if unit == "query_head" and config is LLAMA_7B:
        pytest.skip("one query head per group cannot be pruned alone")
    try:
        budget = Budget(config, sparsity, head_unit=unit)
    except ValueError:
        assert unit == "query_head" and sparsity == 0.8
        return
    for split in budget.splits:
        assert split.R <= budget.R_star + 1e-9
        assert split.R == pytest.approx(budget.resource(split.head, split.ffn))
        shape = budget.shape_after(split)
        assert shape.ffn % budget.multiple_of == 0 and shape.kv_heads >= 1
        assert shape.heads % shape.kv_heads == 0
        if split.ffn:
            wider = min(split.ffn, budget.multiple_of)
            assert budget.resource(split.head, split.ffn - wider) > budget.R_star


def test_the_resource_is_the_share_of_weights_that_a_real_model_keeps():
    budget = Budget(SMOL, 0.25)
    for split in budget.splits:
        small = target_config(SMOL, budget.shape_after(split))
        kept = layer_weights(small, shape_of(small)) / layer_weights(SMOL, shape_of(SMOL))
        assert kept == pytest.approx(split.R)


def test_a_split_by_hand_is_taken_and_rounded_to_a_legal_one():
    budget = Budget(SMOL, head_sparsity=1 / 3, ffn_sparsity=0.25)
    assert [(s.head, s.ffn) for s in budget.splits] == [(1, 384)]
    assert budget.sparsity == pytest.approx(0.25 / 3 + 0.75 * 0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sparsity=0.99), "not reachable.*the most is 0.8854"),
        (dict(sparsity=1.0), "sparsity is 1.0; expected a number between 0 and 1"),
        (dict(sparsity=0.2, head_unit="head"), "head_unit is 'head'; expected one of kv_group"),
        (dict(sparsity=0.2, multiple_of=2000), "multiple_of is 2000; expected 1 up to"),
        (dict(head_sparsity=0.0, ffn_sparsity=0.0), "both 0"),
        (dict(head_sparsity=0.9, ffn_sparsity=0.1), "leave no legal shape; legal head"),
        (dict(sparsity=0.5, ffn_sparsity=0.1), "less than the requested sparsity"),
        (dict(sparsity=0.2, arch_fallback="x"), "arch_fallback is 'x'"),
    ],
)
def test_budgets_that_cannot_be_are_refused_with_what_can(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(SMOL, **options)


def test_heads_of_ffn_only_families_are_left_alone():
    config = GPT2Config()
    budget = Budget(config, 0.3)
    assert budget.a_head == 0 and all(s.head == 0 for s in budget.splits)
    with pytest.raises(ValueError, match="gpt2 keeps its heads"):
        Budget(config, head_sparsity=0.5, ffn_sparsity=0.5)


def test_head_counts_follow_the_config_class():
    mistral = {s.head for s in Budget(LLAMA_7B, 0.2).splits}
    divisor = {s.head for s in Budget(LLAMA_7B, 0.2, arch_fallback="divisor").splits}
    assert 8 in mistral and all(4096 % (32 - n) == 0 for n in divisor)
    small = target_config(
        LLAMA_7B,
        Budget(LLAMA_7B, head_sparsity=0.25, ffn_sparsity=0.25).shape_after(
            Budget(LLAMA_7B, head_sparsity=0.25, ffn_sparsity=0.25).splits[0]
        ),
    )
    assert (small.model_type, small.num_attention_heads, small.head_dim) == ("mistral", 24, 128)
    assert small.sliding_window is None


def test_the_plan_shows_every_choice_with_its_class_and_lint():
    made = plan(LLAMA_7B, Budget(LLAMA_7B, 0.25), "gguf,tp=8")
    text = render(made)
    assert len(made.choices) == len(made.budget.splits)
    assert "TP sizes" in text and "mistral" in text and "misaligned for tp=8" in text
    for split, price, _, _ in made.choices[:2]:
        assert price.shape == made.budget.shape_after(split)


def test_cost_equals_a_real_models_count():
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    model = AutoModelForCausalLM.from_config(config)
    price = cost(config)
    assert price.parameters == sum(p.numel() for p in model.parameters())
    matmul = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert price.flops_per_token == 2 * (matmul - 100 * 64)
    assert price.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_tensor_parallel_sizes_and_lints():
    shape = shape_of(SMOL)
    assert tp_sizes(shape) == [1, 3]
    assert lint(shape, "gguf", shape) == [
        "gguf K-quants: heads x head size 576 is not a multiple of 256 (nor was the dense model's "
        "576)"
    ]
    with pytest.raises(ValueError, match="target 'tensorrt' is unknown; expected one of"):
        lint(shape, "tensorrt")
    with pytest.raises(ValueError, match="expected tp=N"):
        lint(shape, "tp=zero")
