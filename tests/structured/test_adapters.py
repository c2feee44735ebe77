"""Adapters that the export in memory merges exactly, and those that it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randomise, tiny_model, tokens
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from maskprune.config import PruneConfig
from maskprune.hf.equality import TOLERANCE, compare_logits
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks
from maskprune.structured.prune import prune


def adapted(config, **changes):
    """(PEFT model with random adapters under masks, the masks)."""
    model = get_peft_model(tiny_model("llama", **changes), config).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) * 0.3
    return model, randomise(attach_masks(model, fused=False), 1, 8)


def lora(target_modules="all-linear", **options):
    return LoraConfig(r=4, target_modules=target_modules, **options)


def assert_exact(model, masks, dtype=torch.float32):
    small = export(model, masks)
    assert compare_logits(model, small, tokens()).relative <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (lora(use_rslora=True), {}),
        (lora(bias="all"), {"attention_bias": True, "mlp_bias": True}),
        (lora(["embed_tokens", "lm_head", "q_proj"]), {}),
        (lora(["q_proj", "down_proj"]), {"tie_word_embeddings": True}),
    ],
    ids=["rslora", "biases", "untied head", "tied, head left alone"],
)
def test_plain_lora_is_exact(config, changes):
    assert_exact(*adapted(config, **changes))


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (lora(use_dora=True), {}, "use_dora=True"),
        (lora(lora_bias=True), {"attention_bias": True, "mlp_bias": True}, "lora_bias=True"),
        (lora(modules_to_save=["lm_head"]), {}, r"modules_to_save=\['lm_head'\]"),
        (lora(["q_proj"], trainable_token_indices=[3]), {}, "trainable_token_indices"),
        (lora(["lm_head", "q_proj"]), TIED, "on lm_head, whose weight the model ties"),
        (lora(["embed_tokens", "q_proj"]), TIED, "on model.embed_tokens, whose weight"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), {}, "PROMPT_TUNING"),
        (IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), {}, "IA3"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_in_one_line(config, changes, message):
    model, masks = adapted(config, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        export(model, masks)
    assert "\n" not in str(caught.value)


def test_adapters_merged_disabled_or_left_out_of_a_layer_count_once():
    model, masks = adapted(lora())
    model.add_adapter("second", lora(["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_exact(model, masks)
    model.merge_adapter(["default"])
    assert_exact(model, masks)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_exact(model, masks)


def test_adapters_merged_and_disabled_are_refused():
    model, masks = adapted(lora())
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"call unmerge_adapter\(\) first"):
        export(model, masks)


def test_adapters_inside_the_stock_model_are_seen_without_their_wrapper():
    model, masks = adapted(lora(use_dora=True))
    with pytest.raises(ValueError, match="use_dora=True"):
        export(model.get_base_model(), masks)


def test_a_float64_model_is_merged_and_folded_in_float64():
    model = tiny_model("llama", dtype=torch.float64)
    model = get_peft_model(model, lora(init_lora_weights=False)).eval()
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    assert_exact(model, masks, torch.float64)


def test_masks_of_another_model_are_refused():
    _, foreign = adapted(lora(), num_key_value_heads=1)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="use the masks that were trained on this model"):
        export(model, foreign)


def test_a_compiled_model_is_exported_whole_or_layer_by_layer():
    model, masks = adapted(lora())
    small = export(torch.compile(model, backend="eager"), masks)
    assert compare_logits(model, small, tokens()).relative <= TOLERANCE[torch.float32]
    layers = model.get_base_model().model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    again = export(model, masks)
    assert compare_logits(small, again, tokens()).largest == 0


@pytest.mark.parametrize("targets", ["lm_head,q_proj", "embed_tokens,q_proj"])
def test_prune_refuses_adapters_on_tied_weights_before_it_trains(targets):
    config = PruneConfig(sparsity=0.3, steps=20, seq_len=8, batch_size=1, lora_targets=targets)
    blocks = tokens(4, 8)
    with pytest.raises(ValueError, match="whose weight the model ties") as caught:
        prune(tiny_model("llama", **TIED), None, blocks, config, quiet=True)
    assert "\n" not in str(caught.value)


def test_prune_refuses_a_model_that_has_adapters():
    config = PruneConfig(sparsity=0.3, steps=20, seq_len=8, batch_size=1)
    model = get_peft_model(tiny_model("llama"), lora())
    with pytest.raises(ValueError, match="has adapters already; merge them first"):
        prune(model, None, tokens(4, 8), config, quiet=True)


def test_a_float64_run_passes_its_proof():
    config = PruneConfig(
        sparsity=0.3,
        steps=20,
        seq_len=16,
        batch_size=2,
        warm_start_blocks=2,
        compensation_tokens=64,
        autocast="none",
    )
    model = tiny_model("llama", dtype=torch.float64)
    result = prune(model, None, tokens(8, 16), config, quiet=True)
    assert result.model.dtype == torch.float64
    difference = compare_logits(result.masked_model, result.model, tokens())
    assert difference.relative <= TOLERANCE[torch.float64]


def test_export_leaves_a_masked_model_that_can_train_on():
    model, masks = adapted(lora())
    before = copy.deepcopy(model.state_dict())
    export(model, masks)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
