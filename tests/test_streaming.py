"""export_checkpoint: the in-memory exporter's bytes from disk to disk, or one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import randomise, tiny_model
from safetensors.torch import load_file, save_file

from maskprune import streaming, tensor_stream
from maskprune.exporter import export, save_stock
from maskprune.families import FAMILIES
from maskprune.masks import attach_masks
from maskprune.streaming import export_checkpoint

HERE = Path(__file__).parent
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FULL = [name for name, family in FAMILIES.items() if family.prunes_heads]


@pytest.fixture(autouse=True)
def quiet(capfd):
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(params=["auto", "reference", "many blocks"])
def backend(request, monkeypatch) -> str:
    if request.param == "many blocks":
        monkeypatch.setattr(tensor_stream, "BLOCK_BYTES", 300)
        monkeypatch.setattr(tensor_stream, "PIECE_BYTES", 1000)
        return "auto"
    return request.param


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def prepared(folder: Path, family="llama", unit="kv_group", prune=(1, 8), save="20KB", **changes):
    """(source folder, masks file, model, masks) of a tiny random checkpoint."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder / "source", max_shard_size=save)
    masks = randomise(attach_masks(model, head_unit=unit), *prune)
    masks.save(folder / "masks.safetensors")
    return folder / "source", folder / "masks.safetensors", model, masks


def in_memory(folder: Path, model, masks, source: Path) -> Path:
    out = folder / "in_memory"
    out.mkdir()
    save_stock(export(model, masks), out, source=source, max_shard_size="12KB")
    return out


def stream(source: Path, masks: Path, out: Path, **options):
    options = {"max_shard_size": "12KB", "progress": False} | options
    return export_checkpoint(source, masks, out, **options)


def assert_same_files(given: Path, expected: Path) -> None:
    a, b = contents(given), contents(expected)
    assert a.pop("README.md", b"").startswith(b"---")
    b.pop("README.md", None)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@DTYPES
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_file_has_the_bytes_of_the_in_memory_exporter(tmp_path, backend, family, dtype):
    source, masks_file, model, masks = prepared(tmp_path, family, dtype=dtype)
    expected = in_memory(tmp_path, model, masks, source)
    done = stream(source, masks_file, tmp_path / "out", backend=backend)
    assert_same_files(tmp_path / "out", expected)
    assert f"{done.shape}; 0.00 GB of weights" in str(done)
    sizes = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    assert done.bytes_written == sum(sizes) and len(sizes) > 1 and done.dropped == ()


@pytest.mark.parametrize("family", FULL)
def test_query_heads_are_pruned_the_same(tmp_path, family):
    source, masks_file, model, masks = prepared(tmp_path, family, "query_head")
    expected = in_memory(tmp_path, model, masks, source)
    assert stream(source, masks_file, tmp_path / "out").shape.heads == 2
    assert_same_files(tmp_path / "out", expected)


def test_head_counts_that_llama_refuses_go_through_mistral(tmp_path):
    source, masks_file, model, masks = prepared(tmp_path, num_key_value_heads=4)
    expected = in_memory(tmp_path, model, masks, source)
    done = stream(source, masks_file, tmp_path / "out")
    assert done.config.model_type == "mistral" and done.shape.heads == 3
    assert_same_files(tmp_path / "out", expected)
    with pytest.raises(ValueError, match="refuses 3 heads"):
        stream(source, masks_file, tmp_path / "other", arch_fallback="error")


def test_biases_are_cut_with_their_rows(tmp_path):
    source, masks_file, model, masks = prepared(tmp_path, attention_bias=True, mlp_bias=True)
    expected = in_memory(tmp_path, model, masks, source)
    stream(source, masks_file, tmp_path / "out")
    assert_same_files(tmp_path / "out", expected)


@DTYPES
def test_masks_of_one_copy_every_weight(tmp_path, backend, dtype):
    model = tiny_model("llama", dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    attach_masks(model).save(tmp_path / "masks")
    stream(tmp_path / "source", tmp_path / "masks", tmp_path / "out", max_shard_size="1GB")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_the_result_loads_and_computes_what_the_masked_model_does(tmp_path):
    from models import tokens
    from transformers import AutoModelForCausalLM

    source, masks_file, model, _ = prepared(tmp_path, "qwen3")
    stream(source, masks_file, tmp_path / "out")
    with torch.no_grad():
        expected = model(tokens()).logits
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        given = small(tokens()).logits
    assert (given - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_single_and_sharded_sources_give_the_same(tmp_path):
    source, masks_file, model, _ = prepared(tmp_path)
    assert (source / "model.safetensors.index.json").is_file()
    tiny_model("llama").save_pretrained(tmp_path / "single")
    assert (tmp_path / "single" / "model.safetensors").is_file()
    stream(source, masks_file, tmp_path / "a")
    stream(tmp_path / "single", masks_file, tmp_path / "b")
    assert_same_files(tmp_path / "a", tmp_path / "b")


def rewrite(source: Path, change) -> None:
    """Save the source's weights as one file after `change` of its state dict."""
    state = change(weights(source))
    for file in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        file.unlink()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def test_tied_weights_stay_tied_even_if_the_source_holds_both(tmp_path):
    source, masks_file, model, masks = prepared(tmp_path, tie_word_embeddings=True)
    expected = in_memory(tmp_path, model, masks, source)
    rewrite(source, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()})
    stream(source, masks_file, tmp_path / "both")
    assert_same_files(tmp_path / "both", expected)
    name = "model.embed_tokens.weight"
    rewrite(source, lambda s: {n: t for n, t in s.items() if n != name})
    stream(source, masks_file, tmp_path / "head")
    assert_same_files(tmp_path / "head", expected)


def test_names_without_the_base_model_and_old_buffers_are_understood(tmp_path):
    source, masks_file, model, masks = prepared(tmp_path, "gpt2")
    expected = in_memory(tmp_path, model, masks, source)
    rewrite(
        source,
        lambda s: (
            {n.removeprefix("transformer."): t for n, t in s.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
        ),
    )
    done = stream(source, masks_file, tmp_path / "out")
    assert done.dropped == ("h.0.attn.bias",)
    assert_same_files(tmp_path / "out", expected)


@DTYPES
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_on_the_way(tmp_path, family, dtype, rslora):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family, dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    targets = {
        "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
    }[family]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        alpha_pattern={"q_proj": 3} if family == "llama" else {},
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    masks = randomise(attach_masks(adapted), 1, 8)
    masks.save(tmp_path / "masks")
    (tmp_path / "in_memory").mkdir()
    small = export(adapted, masks)
    save_stock(small, tmp_path / "in_memory", max_shard_size="12KB")
    stream(tmp_path / "source", tmp_path / "masks", tmp_path / "out", adapter=tmp_path / "adapter")
    given, expected = weights(tmp_path / "out"), weights(tmp_path / "in_memory")
    assert given.keys() == expected.keys()
    for name in given:
        assert torch.equal(given[name], expected[name]), name


def test_blocks_do_not_change_what_an_adapter_adds(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    adapted = get_peft_model(
        model, LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    randomise(attach_masks(adapted), 1, 8).save(tmp_path / "masks")
    arguments = tmp_path / "source", tmp_path / "masks"
    stream(*arguments, tmp_path / "whole", adapter=tmp_path / "adapter")
    monkeypatch.setattr(tensor_stream, "BLOCK_BYTES", 300)
    stream(*arguments, tmp_path / "blocks", adapter=tmp_path / "adapter")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


@pytest.fixture
def refused(tmp_path):
    """Call with the expected text: the export must fail in one line and leave nothing behind."""
    kept: set[str] = set()

    @contextlib.contextmanager
    def expect(text: str, kind: type[Exception] = ValueError) -> Iterator[None]:
        kept.update(os.listdir(tmp_path))
        with pytest.raises(kind, match=text) as caught:
            yield
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
        assert set(os.listdir(tmp_path)) == kept

    return expect


def edit_config(source: Path, **changes) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_quantised_checkpoints_are_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    with refused(r"is quantised \(gptq\).*float16 or bfloat16 original"):
        stream(source, masks_file, tmp_path / "out")
    edit_config(source, quantization_config=None)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(source, lambda s: s | {name: s[name].to(torch.float8_e4m3fn)})
    with refused(r"quantised weights \(model.layers.0.mlp.up_proj.weight, F8_E4M3\)"):
        stream(source, masks_file, tmp_path / "out")
    rewrite(source, lambda s: s | {name: torch.ones(1), "a.qweight": torch.ones(1)})
    with refused(r"quantised weights \(a.qweight"):
        stream(source, masks_file, tmp_path / "out")


def test_pickled_weights_are_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    for file in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    with refused("pickled weights only.*writes safetensors"):
        stream(source, masks_file, tmp_path / "out")


def test_damaged_shards_are_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with refused("it is cut short"):
        stream(source, masks_file, tmp_path / "out")
    shard.unlink()
    with refused("lacks 1 of .* shards"):
        stream(source, masks_file, tmp_path / "out")
    shard.write_bytes(whole)
    stream(source, masks_file, tmp_path / "out")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_shard_that_shrinks_while_it_is_read_is_refused(tmp_path, refused, monkeypatch, backend):
    source, masks_file, *_ = prepared(tmp_path)
    shard = sorted(source.glob("*.safetensors"))[-1]
    plan = streaming.plan_stream

    def shrink(*arguments):
        planned = plan(*arguments)
        os.truncate(shard, shard.stat().st_size - 5)
        return planned

    monkeypatch.setattr(streaming, "plan_stream", shrink)
    with refused("changed while it was read.*the file ends at byte"):
        stream(source, masks_file, tmp_path / "out", backend=backend)


def test_checkpoints_that_are_not_what_their_config_says_are_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    original = weights(source)
    rewrite(source, lambda s: {n: t for n, t in s.items() if n != name})
    with refused(f"lacks tensor {name}"):
        stream(source, masks_file, tmp_path / "out")
    rewrite(source, lambda s: original | {name: torch.ones(25, 32)})
    with refused("promises 24 along dimension 0"):
        stream(source, masks_file, tmp_path / "out")
    rewrite(source, lambda s: original | {name: torch.ones(24, 31)})
    with refused(r"becomes \[16, 31\]; config.json promises \[16, 32\]"):
        stream(source, masks_file, tmp_path / "out")
    rewrite(source, lambda s: original | {name: torch.ones(24, 32, dtype=torch.int32)})
    with refused("is I32; expected F32, F16 or BF16"):
        stream(source, masks_file, tmp_path / "out")


def test_masks_of_another_model_are_refused(tmp_path, refused):
    source, *_ = prepared(tmp_path)
    for name, (family, changes) in {
        "wider": ("llama", {"intermediate_size": 40}),
        "deeper": ("llama", {"num_hidden_layers": 3}),
        "other": ("qwen3", {}),
    }.items():
        (tmp_path / name).mkdir()
        _, masks_file, *_ = prepared(tmp_path / name, family, **changes)
        with refused("use the masks that were trained on this model"):
            stream(source, masks_file, tmp_path / "out")


def test_masks_that_are_no_uniform_masks_are_refused(tmp_path, refused):
    source, masks_file, _, masks = prepared(tmp_path)
    with torch.no_grad():
        masks.ffn[0, masks.ffn[0].nonzero()[0]] = 0
        masks.save(tmp_path / "uneven")
        masks.ffn[1, 0] = float("nan")
        masks.save(tmp_path / "nan")
    whole = masks_file.read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-3])
    for name, text in {
        "uneven": "the FFN mask is not uniform",
        "nan": "NaN",
        "cut": "not a whole safetensors file",
        "absent": "does not exist",
        "source/model-00001-of-00002.safetensors": "is not a masks file",
    }.items():
        path = tmp_path / name
        if name.startswith("source"):
            path = sorted(source.glob("*.safetensors"))[0]
        with refused(text):
            stream(source, path, tmp_path / "out")


def test_adapters_that_do_not_fit_are_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def write(state, **config):
        plain = {"peft_type": "LORA", "lora_alpha": 8, "r": 2}
        (adapter / "adapter_config.json").write_text(json.dumps(plain | config))
        save_file(state, adapter / "adapter_model.safetensors")

    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = torch.ones(2, 32), torch.ones(32, 2)
    good = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    with refused("no readable adapter_config.json"):
        stream(source, masks_file, tmp_path / "out", adapter=adapter)
    for state, config, text in [
        (good, {"use_dora": True}, "not plain LoRA .use_dora=True"),
        (good, {"peft_type": "IA3"}, "not plain LoRA .IA3"),
        (good | {f"{module}.bias": a.clone()}, {}, "holds base_model.*bias"),
        ({f"{module}.lora_A.weight": a}, {}, "do not fit together"),
        (good | {f"{module}.lora_B.weight": torch.ones(32, 3)}, {}, "do not fit together"),
        (good | {f"{module}.lora_B.weight": torch.ones(31, 2)}, {}, r"\[31, 32\], which is \[32"),
        ({n.replace("q_proj", "x"): t for n, t in good.items()}, {}, "which is not there"),
    ]:
        write(state, **config)
        with refused(text):
            stream(source, masks_file, tmp_path / "out", adapter=adapter)
    write(good)
    (adapter / "adapter_model.safetensors").unlink()
    with refused("has no adapter_model.safetensors"):
        stream(source, masks_file, tmp_path / "out", adapter=adapter)


def test_a_folder_that_exists_is_kept_unless_told(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with refused("exists and is not empty; .* --overwrite"):
        stream(source, masks_file, out)
    assert (out / "mine").read_text() == "precious"
    stream(source, masks_file, out, overwrite=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    source, masks_file, *_ = prepared(tmp_path)
    for name in (".out.incomplete", ".out.replaced"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    before = set(os.listdir(tmp_path)) - {".out.incomplete", ".out.replaced"}
    stream(source, masks_file, tmp_path / "out")
    assert set(os.listdir(tmp_path)) == before | {"out"}


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch, foreseen, backend):
    source, masks_file, *_ = prepared(tmp_path)
    if not foreseen:
        monkeypatch.setattr(streaming, "_require_space", lambda out, needed: None)
    with tmpfs(tmp_path / "small", "24k") as small:
        with pytest.raises(OSError, match="nothing was left there.*free space there") as caught:
            stream(source, masks_file, small / "out", backend=backend)
        assert caught.value.errno == 28 and "\n" not in str(caught.value)
        assert os.listdir(small) == []


def test_a_target_that_cannot_be_written_ends_in_one_line(tmp_path):
    source, masks_file, *_ = prepared(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder whose parents are folders"):
        stream(source, masks_file, tmp_path / "file" / "out")
    with tmpfs(tmp_path / "read_only", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OSError, match="choose a folder that can be written"):
            stream(source, masks_file, folder / "out")


def test_an_unknown_family_is_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    edit_config(source, model_type="bloom")
    with refused("bloom"):
        stream(source, masks_file, tmp_path / "out")
    (source / "config.json").write_text("{")
    with refused("is no readable JSON object"):
        stream(source, masks_file, tmp_path / "out")


def test_progress_without_a_terminal_is_a_plain_line(tmp_path, capfd):
    source, masks_file, *_ = prepared(tmp_path)
    stream(source, masks_file, tmp_path / "out", progress=True)
    assert "export: 100% of" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out")
    stream(source, masks_file, tmp_path / "out", progress=False)
    assert capfd.readouterr().err == ""


def test_a_kill_never_leaves_a_folder_that_looks_finished():
    script = [sys.executable, str(HERE / "kill_streaming.py"), "--kills", "4"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 kills" in done.stdout


def test_a_stretch_of_rows_that_all_go_writes_nothing(tmp_path, monkeypatch):
    """The last piece of a tensor keeps no row: its bytes must not land behind the tensor."""
    from maskprune.byte_progress import ByteProgress
    from maskprune.cuts import Cut
    from maskprune.safetensors_io import Planned, read_header

    weight = torch.arange(64.0).reshape(16, 4)
    save_file({"w": weight}, tmp_path / "x")
    monkeypatch.setattr(tensor_stream, "PIECE_BYTES", 64)
    for keep in ([0, 3], [9], []):
        cut = Cut(0, torch.tensor(keep, dtype=torch.int64))
        target = Planned("w", "F32", (len(keep), 4), 16 * len(keep))
        move = tensor_stream.Move(read_header(tmp_path / "x")["w"], target, cut)
        with (tmp_path / "x").open("rb") as source, (tmp_path / "y").open("wb") as out:
            mover = tensor_stream.Mover(ByteProgress(0, "", False), 1)
            mover.move(move, source.fileno(), out.fileno())
        assert (tmp_path / "y").read_bytes() == weight[keep].numpy().tobytes()
