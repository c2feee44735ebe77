"""The public names, the import arrows, and what an install must hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import maskprune

ROOT = Path(__file__).parents[1]

# Which modules a module may import from the package; ops and its backends know nothing of it.
LEVELS = [
    {"version", "files", "config"},
    {"ops"},
    {"families", "progress", "byte_progress"},
    {"cuts", "safetensors_io", "card"},
    {"target", "fused"},
    {"budget", "masks", "stock", "data", "demo"},
    {"plan", "minimax", "distill", "load", "warmstart", "exporter", "checkpoints", "speed", "lora"},
    {"compensation"},
    {"evaluate", "stream_plan", "tensor_stream", "plots", "callbacks", "trainer", "runs"},
    {"training", "streaming", "report", "check"},
    {"semistructured"},
    {"run", "demonstrate"},
    {"cli"},
]

# The 2:4 room: each module may import those before it, and what stands below the room.
SEMISTRUCTURED = ["patterns", "matrices", "oneshot", "masks", "learn", "run"]


def imported(path: Path, package: str = "maskprune") -> set[str]:
    """Modules of the package that a file imports at its top level, by their first name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix(f"{package}.")
            if module != node.module:
                found.add(module.split(".")[0])
            elif module == package:
                found |= {alias.name for alias in node.names}
    return found


def test_the_public_names_are_these():
    assert maskprune.__all__ == [
        "Budget",
        "Masks",
        "Minimax",
        "PruneCallback",
        "PruneConfig",
        "PruneResult",
        "SparsifyConfig",
        "SparsifyResult",
        "__version__",
        "attach_masks",
        "export",
        "export_checkpoint",
        "load_masks",
        "ops",
        "prune",
        "sparsify",
    ]
    for name in maskprune.__all__:
        assert getattr(maskprune, name) is not None
    assert sorted(maskprune.ops.__all__) == [
        "LeastS",
        "fold_columns",
        "foreach_least_s_prox_",
        "gather_rows",
        "gumbel_two_four",
        "least_s_prox_",
        "masked_swiglu",
        "minimax_step_",
        "scale_heads",
    ]


def test_imports_run_one_way():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    modules = {p.stem: p for p in (ROOT / "maskprune").glob("*.py") if p.stem != "__init__"}
    assert set(modules) | {"ops", "semistructured"} == set(level), "place new modules in LEVELS"
    for name, path in modules.items():
        for other in imported(path):
            assert level[other] <= level[name] and other != name, f"{name} imports {other}"


def test_the_two_four_room_stands_between_training_and_the_runs():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    room = ROOT / "maskprune" / "semistructured"
    modules = {p.stem: p for p in room.glob("*.py") if p.stem != "__init__"}
    assert set(modules) <= set(SEMISTRUCTURED), "place new modules in SEMISTRUCTURED"
    for name, path in modules.items():
        for other in imported(path) - {"semistructured"}:
            assert level[other] <= level["training"], f"semistructured.{name} imports {other}"
        before = SEMISTRUCTURED[: SEMISTRUCTURED.index(name)]
        assert imported(path, "maskprune.semistructured") <= set(before), name


def test_operations_and_backends_know_nothing_of_the_package_above_them():
    for path in (ROOT / "maskprune" / "ops").glob("*.py"):
        text = path.read_text()
        assert imported(path) <= {"ops", "kernels"}, path
        assert "import transformers" not in text and "from transformers" not in text, path
    for path in (ROOT / "kernels").glob("*.py"):
        assert imported(path) <= {"kernels"}, path


def test_kernels_is_no_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_a_wheel_builds_without_a_compiler_unless_the_extension_is_required(tmp_path):
    pytest.importorskip("pybind11")
    base = {"PATH": str(Path(sys.executable).parent), "CC": "/bin/false", "CXX": "/bin/false"}
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "w"), str(copy)], env=base, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "w").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "maskprune/semistructured/patterns.py" in names
    assert "maskprune/kernels/least_s_prox.py" in names and "maskprune/py.typed" in names
    assert not any(name.endswith(".so") for name in names)
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "v"), str(copy)],
        env=base | {"MASKPRUNE_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
