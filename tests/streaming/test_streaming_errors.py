"""export_checkpoint on bad input, full disks and kills: one clear line, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import edit_config, prepared, rewrite, stream, tmpfs, weights
from safetensors.torch import save_file

from maskprune.streaming import export as streaming

TOOLS = Path(__file__).parents[2] / "tools"


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
    with refused("is I32; expected F64, F32, F16 or BF16"):
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


def test_masks_that_are_not_uniform_are_refused(tmp_path, refused):
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
    with refused("holds mine, which maskprune did not write"):
        stream(source, masks_file, out, overwrite=True)
    assert (out / "mine").read_text() == "precious"
    (out / "mine").unlink()
    stream(source, masks_file, out)
    before = (out / "config.json").stat().st_ino
    stream(source, masks_file, out, overwrite=True)
    assert (out / "config.json").stat().st_ino != before


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    source, masks_file, *_ = prepared(tmp_path)
    for name in (".out.incomplete", ".out.replaced"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    before = set(os.listdir(tmp_path)) - {".out.incomplete", ".out.replaced"}
    stream(source, masks_file, tmp_path / "out")
    assert set(os.listdir(tmp_path)) == before | {"out"}


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
    with pytest.raises(ValueError, match="choose a folder whose parents are folders"):
        stream(source, masks_file, tmp_path / "file" / "out")
    with tmpfs(tmp_path / "read_only", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(ValueError, match="choose a folder that can be written"):
            stream(source, masks_file, folder / "out")


def test_an_unknown_family_is_refused(tmp_path, refused):
    source, masks_file, *_ = prepared(tmp_path)
    edit_config(source, model_type="bloom")
    with refused("bloom"):
        stream(source, masks_file, tmp_path / "out")
    (source / "config.json").write_text("{")
    with refused("is not a readable JSON object"):
        stream(source, masks_file, tmp_path / "out")


def test_a_kill_never_leaves_a_folder_that_looks_finished():
    script = [sys.executable, str(TOOLS / "kill_streaming.py"), "--kills", "4"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 kills" in done.stdout
