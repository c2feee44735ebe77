"""Perplexity by windows, lm-eval tasks without network, and reading MODEL."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskprune.commands.evaluate import evaluate, perplexity, run_tasks
from maskprune.config import EvalConfig
from maskprune.hf.load import check_checkpoint, load_model, resolve_model, torch_device, torch_dtype
from maskprune.training.speed import throughput

WORDS = 40


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(WORDS - 2)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """The same words; puts <eos>, its BOS too, before every text, as OPT's does."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<eos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def text(tokens, seed=0):
    ids = torch.randint(WORDS - 2, (tokens,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def test_perplexity_is_the_loss_of_transformers_over_windows_that_do_not_overlap(model, tokenizer):
    source = text(53)
    ids = tokenizer(source, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in ids[:, :48].split(16, dim=1)]
    found = perplexity(model, tokenizer, [source], 16)
    assert found["nll"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert found["ppl"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-6)
    assert (found["windows"], found["tokens"], found["seq_len"]) == (3, 45, 16)


def test_every_window_begins_with_the_bos_that_the_tokenizer_adds(model, bos_tokenizer):
    source = text(47)
    words = bos_tokenizer(source, add_special_tokens=False, return_tensors="pt")["input_ids"]
    windows = [torch.cat([torch.zeros(1, 1).long(), w], 1) for w in words[:, :45].split(15, dim=1)]
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in windows]
    found = perplexity(model, bos_tokenizer, [source], 16)
    assert found["nll"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert (found["windows"], found["tokens"]) == (3, 45)
    assert "BOS" in found["protocol"]


def test_perplexity_agrees_with_lm_evals_rolling_wikitext(model, tokenizer, bos_tokenizer):
    """lm-eval's `wikitext` is `loglikelihood_rolling` over documents; here each is one window."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [text(15, seed) for seed in range(3)]
    requests = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)]
    lm = HFLM(model, tokenizer=bos_tokenizer, batch_size=1, add_bos_token=False, device="cpu")
    expected = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
    found = perplexity(model, bos_tokenizer, [" ".join(texts)], 16)
    assert found["nll"] * found["tokens"] == pytest.approx(expected, rel=1e-5)

    # Without BOS lm-eval conditions on a prefix token; ours on the window's own first word.
    expected = 0.0
    for request, words in zip(requests, texts, strict=True):
        first, _, rest = words.partition(" ")
        request.arguments = (rest,)
        prefix = tokenizer.convert_tokens_to_ids(first)
        lm = HFLM(model, tokenizer=tokenizer, batch_size=1, prefix_token_id=prefix, device="cpu")
        expected -= sum(lm.loglikelihood_rolling([request], disable_tqdm=True))
    found = perplexity(model, tokenizer, [" ".join(texts)], 15)
    assert found["nll"] * found["tokens"] == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model, tokenizer):
    silent = LlamaForCausalLM(model.config)
    torch.nn.init.zeros_(silent.lm_head.weight)
    assert perplexity(silent, tokenizer, [text(64)], 32)["ppl"] == pytest.approx(WORDS, rel=1e-6)


def test_batches_and_documents_do_not_change_perplexity(model, tokenizer, tmp_path):
    whole = perplexity(model, tokenizer, [text(100)], 10)
    assert perplexity(model, tokenizer, [text(100)], 10, batch_size=3)["nll"] == pytest.approx(
        whole["nll"], rel=1e-6
    )
    first, second = text(100).split()[:37], text(100).split()[37:]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(t)}) + "\n" for t in (first, second)))
    assert perplexity(model, tokenizer, path, 10)["nll"] == whole["nll"]


def test_limit_takes_the_first_windows_and_the_mode_is_restored(model, tokenizer):
    model.train()
    limited = perplexity(model, tokenizer, [text(100)], 10, limit=2)
    assert model.training
    model.eval()
    head = " ".join(text(100).split()[:20])
    assert limited["nll"] == perplexity(model, tokenizer, [head], 10)["nll"]
    assert limited["windows"] == 2


def test_autocast_is_close_to_float32(model, tokenizer):
    exact = perplexity(model, tokenizer, [text(64)], 32)["nll"]
    rough = perplexity(model, tokenizer, [text(64)], 32, dtype=torch.bfloat16)["nll"]
    assert rough == pytest.approx(exact, rel=2e-2)


def test_perplexity_refuses_what_it_cannot_measure(model, tokenizer):
    with pytest.raises(ValueError, match="text has 5 tokens, but one window needs 16"):
        perplexity(model, tokenizer, [text(5)], 16)
    with pytest.raises(ValueError, match="seq_len is 65; expected 2 up to the model's 64"):
        perplexity(model, tokenizer, [text(100)], 65)
    broken = LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(RuntimeError, match="the loss is nan in window 0"):
        perplexity(broken, tokenizer, [text(64)], 32)


def test_throughput_measures_every_model(model):
    found = throughput({"a": model, "b": model}, prompt_len=4, new_tokens=2, repeats=1)
    assert set(found) == {"a", "b"}
    for speeds in found.values():
        assert set(speeds) == {"prefill_tokens_per_s", "decode_tokens_per_s"}
        assert min(speeds.values()) > 0
    with pytest.raises(ValueError, match="new_tokens 0"):
        throughput({"a": model}, new_tokens=0)


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """Two documents whose right answers are certain to be known: one choice is far longer."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": text(3, i), "choices": ["w1", text(12)], "gold": 0} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        "task: short_answers\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
        "output_type: multiple_choice\n"
        "validation_split: validation\n"
        'doc_to_text: "{{query}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


def test_a_local_task_runs_by_file_and_by_folder(model, tokenizer, task_folder):
    expected = {"short_answers": {"acc": 1.0, "samples": 3}}
    for where in (task_folder / "local.yaml", task_folder):
        assert run_tasks(model, tokenizer, [str(where)], limit=3, batch_size=2) == expected


def test_an_unknown_task_is_an_error(model, tokenizer, task_folder, tmp_path):
    with pytest.raises(ValueError, match="none.yaml does not exist"):
        run_tasks(model, tokenizer, ["none.yaml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no lm-eval task"):
        run_tasks(model, tokenizer, [str(tmp_path / "empty")])


def test_without_lm_eval_the_error_says_how_to_install_it(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match=r"pip install 'maskprune\[eval\]'"):
        run_tasks(model, tokenizer, ["piqa"])


def test_evaluate_writes_what_it_returns(folder, task_folder, tmp_path):
    (tmp_path / "t.txt").write_text(text(64))
    found = evaluate(
        EvalConfig(
            model=str(folder),
            ppl=str(tmp_path / "t.txt"),
            seq_len=32,
            tasks=str(task_folder / "local.yaml"),
            limit=2,
            device="cpu",
            json=str(tmp_path / "out.json"),
        )
    )
    assert found["perplexity"]["windows"] == 2
    assert found["tasks"]["short_answers"]["samples"] == 2
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_evaluate_refuses_before_it_loads_a_model(tmp_path):
    with pytest.raises(ValueError, match="nothing to evaluate; give --ppl FILE"):
        EvalConfig(model="x")
    with pytest.raises(ValueError, match="batch_size is 0"):
        EvalConfig(model="x", ppl="a.txt", batch_size=0)
    with pytest.raises(ValueError, match="none.txt does not exist"):
        evaluate(EvalConfig(model="no/model", ppl="none.txt"))
    (tmp_path / "t.txt").write_text("w1")
    with pytest.raises(ValueError, match="its folder does not exist"):
        evaluate(EvalConfig(model="x", ppl=str(tmp_path / "t.txt"), json=str(tmp_path / "no/o")))


def test_every_setting_of_eval_is_a_flag_with_help():
    from dataclasses import fields

    from transformers import HfArgumentParser

    assert all(f.metadata.get("help") for f in fields(EvalConfig))
    arguments = ["--model", "m", "--ppl", "f.txt", "--seq-len", "64", "--limit", "3"]
    (config,) = HfArgumentParser([EvalConfig]).parse_args_into_dataclasses(arguments)
    assert (config.ppl, config.seq_len, config.limit, config.tasks) == ("f.txt", 64, 3, None)


def test_a_folder_is_loaded_with_its_tokenizer(folder, model):
    loaded, tokenizer = load_model(folder, device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not loaded.training
    assert tokenizer("w3")["input_ids"] == [5]
    assert load_model(folder, dtype="bf16", device="cpu")[0].dtype == torch.bfloat16


def copy_without(folder, out, *names):
    out.mkdir()
    for file in folder.iterdir():
        if file.name not in names:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def test_folders_that_cannot_be_read_safely_are_refused(folder, tmp_path):
    bare = copy_without(folder, tmp_path / "a", "model.safetensors")
    with pytest.raises(ValueError, match="holds no weights"):
        check_checkpoint(bare)
    (bare / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.bin\).*convert"):
        load_model(bare)
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (bare / "model.safetensors.index.json").write_text(json.dumps(shards))
    (bare / "model-1.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="lacks 1 of 2 shards, first model-2.safetensors"):
        load_model(bare)
    torn = copy_without(folder, tmp_path / "b")
    (torn / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="could not be read"):
        load_model(torn)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors, first model.norm.weight"):
        load_model(torn)
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        load_model(copy_without(folder, tmp_path / "c", "tokenizer.json", "tokenizer_config.json"))
    with pytest.raises(ValueError, match="has no config.json"):
        check_checkpoint(copy_without(folder, tmp_path / "d", "config.json"))


def test_unknown_models_dtypes_and_devices_are_named_in_the_error(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        resolve_model(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a folder"):
        resolve_model("./none")
    assert resolve_model("org/name") == "org/name"
    with pytest.raises(ValueError, match="dtype is 'int4'; expected auto, float32"):
        torch_dtype("int4")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        torch_device("gpu")
