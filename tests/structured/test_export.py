"""Masked logits equal exported-and-reloaded logits, for every family and head unit."""

from __future__ import annotations

import json

import pytest
import torch
from models import randomise, tiny_model, tokens
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from maskprune.hf.checkpoint_files import save_stock
from maskprune.hf.equality import TOLERANCE, Difference, compare_logits, require_equal
from maskprune.hf.families import FAMILIES, text_config
from maskprune.structured.export import export, final_shape
from maskprune.structured.masks import attach_masks, load_masks

DTYPES = (torch.float64, torch.float32)

WITH_HEADS = [name for name, family in FAMILIES.items() if family.prunes_heads]


def masked(family, head_unit="kv_group", dtype=torch.float32, head=1, ffn=8, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    masks = randomise(attach_masks(model, head_unit, fused=False), head, ffn)
    return model, masks


def reloaded(small, folder):
    save_stock(small, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=small.dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_logits_equal_those_of_the_exported_and_reloaded_model(
    family, head_unit, dtype, tmp_path
):
    model, masks = masked(family, head_unit, dtype)
    again = reloaded(export(model, masks), tmp_path / "out")
    difference = compare_logits(model, again, tokens())
    # A model that was not read from files computes GPT-J's table of positions in its own dtype.
    limit = TOLERANCE[torch.float32 if family == "gptj" else dtype]
    assert difference.relative <= limit
    assert difference.largest_logit > 0.1
    assert text_config(again.config).num_hidden_layers == 2
    masks.detach()
    dense = compare_logits(model, again, tokens())
    assert dense.relative > 1e-2, "the masks changed nothing, so the test proves nothing"


@pytest.mark.parametrize("family", WITH_HEADS)
def test_multi_head_attention_without_groups_is_exact(family, tmp_path):
    model, masks = masked(family, num_key_value_heads=4, head=2)
    again = reloaded(export(model, masks), tmp_path / "out")
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float32]
    assert text_config(again.config).num_key_value_heads == 2


@pytest.mark.parametrize("changes", [{"attention_bias": True, "mlp_bias": True}], ids=["biases"])
def test_biases_and_tied_embeddings_survive(changes, tmp_path):
    model, masks = masked("llama", tie_word_embeddings=True, **changes)
    again = reloaded(export(model, masks), tmp_path / "out")
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float32]
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_opt_350m_has_no_final_norm_and_projections_at_both_ends(tmp_path):
    model, masks = masked("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    decoder = model.model.decoder
    assert decoder.final_layer_norm is None and decoder.project_out is not None
    again = reloaded(export(model, masks), tmp_path / "out")
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_at_one_leave_the_logits_bitwise_the_same(family):
    model = tiny_model(family)
    with torch.no_grad():
        before = model(tokens()).logits
        attach_masks(model, fused=False)
        assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_table_of_positions_is_that_of_a_model_read_from_files(dtype, tmp_path):
    tiny_model("gptj").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    masks = randomise(attach_masks(model, fused=False), 0, 8)
    small = export(model, masks)
    assert compare_logits(model, small, tokens()).relative <= TOLERANCE[dtype]
    assert compare_logits(small, reloaded(small, tmp_path / "out"), tokens()).largest == 0


def test_a_head_count_that_llama_refuses_goes_through_the_mistral_class(tmp_path):
    model, masks = masked(
        "llama", num_attention_heads=9, num_key_value_heads=9, hidden_size=72, head=2
    )
    small = export(model, masks)
    again = reloaded(small, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert type(again).__name__ == "MistralForCausalLM"
    assert (config["model_type"], config["num_attention_heads"]) == ("mistral", 7)
    assert config["sliding_window"] is None
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="refuses 7 heads.*--arch-fallback mistral"):
        export(model, masks, arch_fallback="divisor")


EVERY_HEAD = {"num_key_value_heads": 4}  # 3 of 4 heads stay, which do not divide 32
CLASSES = [
    ("llama", {}, "mistral"),
    ("llama", EVERY_HEAD, "mistral"),
    ("llama", {"attention_bias": True}, "llama"),
    ("llama", {"attention_bias": True, "mlp_bias": True}, "llama"),
    ("mistral", EVERY_HEAD, "mistral"),
    ("qwen2", {}, "llama"),
    ("qwen2", EVERY_HEAD, "seed_oss"),
    ("qwen3", EVERY_HEAD, "qwen3"),
    ("seed_oss", EVERY_HEAD, "seed_oss"),
    ("phi3", {}, "mistral"),
    ("phi3", {"sliding_window": 4} | EVERY_HEAD, "mistral"),
    ("gemma2", {}, "gemma2"),
    ("gemma3_text", {}, "gemma3_text"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "changes", "expected"), CLASSES)
def test_pruned_heads_go_to_the_class_that_engines_run(family, changes, expected, dtype, tmp_path):
    model, masks = masked(family, dtype=dtype, **changes)
    again = reloaded(export(model, masks), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["model_type"], content["head_dim"]) == (expected, 8)
    assert content.get("sliding_window") == getattr(model.config, "sliding_window", None)
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[dtype]
    names = [name for name in again.state_dict() if "qkv" in name or "gate_up" in name]
    assert not names


@pytest.mark.parametrize("family", [row[0] for row in CLASSES])
def test_a_model_that_keeps_its_heads_keeps_its_class(family):
    model, masks = masked(family, head=0)
    assert export(model, masks).config.model_type == family


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of each head"),
    ],
)
def test_heads_stay_where_no_class_that_engines_run_takes_fewer(family, changes, why):
    from maskprune.structured.budget import Budget
    from maskprune.structured.plan import plan, render

    if family == "qwen2":
        changes = changes | {"use_sliding_window": True, "sliding_window": 4}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        changes = {"rope_parameters": rope | changes["rope_parameters"]}
    model, masks = masked(family, **changes)
    budget = Budget(model, 0.2)
    assert all(split.head == 0 for split in budget.splits)
    assert "Heads stay" in (text := render(plan(model.config, budget))) and why in text
    with pytest.raises(ValueError, match=f"keeps its heads: .*{why}"):
        Budget(model, head_sparsity=0.5, ffn_sparsity=0.1)
    with pytest.raises(ValueError, match="refuses 2 heads"):
        export(model, masks)
    native = export(model, masks, arch_fallback="divisor")
    assert native.config.model_type == family
    assert compare_logits(model, native, tokens()).relative <= TOLERANCE[torch.float32]


def test_adapters_are_merged_before_the_fold(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.3)
    model.eval()
    masks = randomise(attach_masks(model, fused=False), 1, 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    again = reloaded(export(model, masks), tmp_path / "out")
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float32]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_config_reads_the_same_in_transformers_4_and_5(tmp_path):
    model, masks = masked("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    save_stock(export(model, masks), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["head_dim"] == 8


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("stablelm", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5e5}),
    ],
)
def test_a_part_of_each_head_is_written_as_transformers_4_and_engines_read_it(
    family, fields, tmp_path
):
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    model, masks = masked(family, rope_parameters=rope)
    small = export(model, masks)
    save_stock(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert fields.items() <= config.items()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == small.config.rope_parameters


def test_the_exported_model_generates_the_same_with_and_without_cache(tmp_path):
    model, masks = masked("qwen2")
    again = reloaded(export(model, masks), tmp_path / "out")
    prompt = tokens(1, 5)
    with_cache = again.generate(prompt, max_new_tokens=8, do_sample=False)
    without = again.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_the_exported_model_takes_a_fresh_adapter():
    from peft import LoraConfig, get_peft_model

    small = export(*masked("llama"))
    adapted = get_peft_model(small, LoraConfig(r=2, target_modules="all-linear"))
    adapted(tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)


def test_masks_that_are_not_uniform_are_refused():
    model, masks = masked("llama")
    masks.ffn.data[1, :12] = 0
    with pytest.raises(ValueError, match="FFN mask is not uniform: row 1 keeps"):
        export(model, masks)
    masks.ffn.data[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        final_shape(masks)


def test_masks_survive_their_file_and_refuse_another_model(tmp_path):
    model, masks = masked("llama", "query_head")
    masks.save(tmp_path / "masks.safetensors")
    again = load_masks(tmp_path / "masks.safetensors")
    assert torch.equal(again.head, masks.head) and torch.equal(again.ffn, masks.ffn)
    assert again.metadata() == masks.metadata()
    with pytest.raises(ValueError, match="use the masks that were trained on this model"):
        attach_masks(tiny_model("qwen2"), masks=again)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", None),
        ("shape", "{"),
        ("shape", "[2, 4]"),
        ("shape", '{"layers": 2}'),
        ("shape", '{"layers": "2", "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 32}'),
        ("shape", '{"layers": 2, "heads": 4, "kv_heads": 0, "head_dim": 8, "ffn": 32}'),
        ("shape", '{"layers": -2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 32}'),
        ("head_unit", "pair"),
        ("family", "rwkv"),
        ("family", None),
    ],
)
def test_a_masks_file_with_a_broken_header_is_one_clear_error(field, value, tmp_path):
    _, masks = masked("llama", "query_head")
    header = masks.metadata() | ({field: value} if value is not None else {})
    if value is None:
        del header[field]
    tensors = {"head": masks.head.detach(), "ffn": masks.ffn.detach()}
    save_file(tensors, tmp_path / "masks.safetensors", metadata=header)
    with pytest.raises(ValueError, match="header"):
        load_masks(tmp_path / "masks.safetensors")


def test_detach_restores_the_model():
    model = tiny_model("llama")
    names = list(model.state_dict())
    masks = randomise(attach_masks(model), 1, 8)
    with torch.no_grad():
        changed = model(tokens()).logits
        with masks.off():
            dense = model(tokens()).logits
        masks.detach()
        assert torch.equal(model(tokens()).logits, dense)
    assert not torch.equal(changed, dense)
    assert list(model.state_dict()) == names


def test_masks_under_an_adapter_that_came_later_are_refused():
    from peft import LoraConfig, get_peft_model

    from maskprune.structured.budget import Budget
    from maskprune.structured.minimax import Minimax

    model = tiny_model("llama")
    masks = attach_masks(model)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(RuntimeError, match="get_peft_model first"):
        Minimax(masks, Budget(model, 0.5), 100)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "bert"},
            "'bert' is not supported; expected one of llama, mis",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 8},
            "'qwen3_moe' is not supported: its FFN is a mixture of experts.*nearest is qwen3, its",
        ),
        ({"model_type": "minicpm3", "kv_lora_rank": 8}, "latent that all heads share"),
        ({"model_type": "mamba2", "state_size": 8}, "state-space"),
        ({"model_type": "phi", "qk_layernorm": True}, "'phi' is not supported with qk_layernorm"),
        ({"rope_parameters": {"rope_type": "longrope"}, "model_type": "phi3"}, "longrope"),
    ],
)
def test_unknown_families_are_refused_by_name(changes, message):
    from types import SimpleNamespace

    from maskprune.hf.families import family_of

    with pytest.raises(ValueError, match=message):
        family_of(SimpleNamespace(**changes))


def test_an_export_that_is_not_equal_is_refused():
    require_equal(Difference(1e-3, 30.0, 1.0), torch.float32)
    for wrong in (0.4, float("nan")):
        with pytest.raises(RuntimeError, match="nothing was written"):
            require_equal(Difference(wrong, 30.0, 1.0), torch.float32)


def test_the_promised_tolerances_are_these():
    assert TOLERANCE[torch.float64] == 1e-10 and TOLERANCE[torch.float32] == 1e-4


@pytest.mark.parametrize("head_unit", ["kv_group", "query_head"])
def test_norms_with_a_weight_for_each_head_lose_the_rows_of_the_heads(head_unit, tmp_path):
    model, masks = masked("cohere", head_unit, torch.float64, use_qk_norm=True)
    again = reloaded(export(model, masks), tmp_path / "out")
    kept = (1, 2) if head_unit == "kv_group" else (2, 2)
    norm = again.model.layers[0].self_attn
    assert (len(norm.k_norm.weight), len(norm.q_norm.weight)) == (kept[0], 2)
    assert compare_logits(model, again, tokens()).relative <= TOLERANCE[torch.float64]


def test_a_multimodal_model_keeps_its_vision_tower(tmp_path):
    model, masks = masked("gemma3")
    small = reloaded(export(model, masks), tmp_path / "out")
    assert type(small) is type(model)
    before, after = model.model.vision_tower.state_dict(), small.model.vision_tower.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (config["num_key_value_heads"], config["head_dim"]) == (1, 8)
    assert config["rope_theta"] == config["rope_parameters"]["full_attention"]["rope_theta"]


def test_a_multimodal_model_of_another_family_is_told_what_is_nearest():
    from transformers import CONFIG_MAPPING

    from maskprune.hf.families import family_of

    config = CONFIG_MAPPING["llava"](text_config={"model_type": "llama"})
    with pytest.raises(ValueError, match="'llava' .*multimodal; nearest is its language model"):
        family_of(config)


def test_the_readme_shows_the_family_matrix_of_the_table():
    from pathlib import Path

    from maskprune.hf.families import family_matrix

    assert family_matrix() in (Path(__file__).parents[2] / "README.md").read_text()
