"""The public names, the import arrows, and what an install must hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import maskprune

ROOT = Path(__file__).parents[1]

# What each room may import from the package. Commands use methods; methods use training and hf;
# what is fast is in ops; the methods never import each other.
LEAVES = {"choices", "config", "files", "version"}
ROOMS = {
    "config": {"choices"},
    "hf": LEAVES,
    "ops": {"choices", "kernels"},
    "training": LEAVES | {"hf", "ops"},
    "structured": LEAVES | {"hf", "ops", "training"},
    "two_four": LEAVES | {"hf", "ops", "training"},
    "streaming": LEAVES | {"hf", "ops", "structured", "two_four"},
    "commands": LEAVES | {"hf", "ops", "training", "structured", "two_four", "streaming"},
}
TOP = {
    "__init__": {*ROOMS, "version"},
    "__main__": {"cli"},
    "cli": {*ROOMS, "version"},
    "choices": set(),
    "files": set(),
    "version": set(),
}


def imported(path: Path) -> set[str]:
    """Every module of the package that a file imports, at its top or within a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "maskprune":
            modules |= {f"maskprune.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {name for name in modules if name.startswith("maskprune.")}


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path)}


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
        "gather_rows",
        "gumbel_two_four",
        "least_s_prox_",
        "linear_distillation",
        "linear_kl",
        "masked_swiglu",
        "minimax_step_",
        "scale_heads",
    ]


def test_the_top_level_is_small_and_every_folder_has_its_rule():
    package = ROOT / "maskprune"
    assert {p.stem for p in package.glob("*.py")} == set(TOP)
    folders = {p.name for p in package.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders == {*ROOMS, "kernels"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_rule_allows(room):
    for path in (ROOT / "maskprune" / room).rglob("*.py"):
        assert rooms(path) <= ROOMS[room] | {room}, path


@pytest.mark.parametrize("name", TOP)
def test_a_top_level_module_imports_only_what_its_rule_allows(name):
    assert rooms(ROOT / "maskprune" / f"{name}.py") <= TOP[name]


def test_no_import_runs_in_a_circle():
    """Also within a room; imports within a function count."""
    package = ROOT / "maskprune"
    graph: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if "kernels" in path.parts or path.name == "__init__.py":
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = imported(path)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done or module not in graph:
            return
        for other in sorted(graph[module]):
            visit(other, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_operations_and_backends_know_nothing_of_transformers():
    for path in (ROOT / "maskprune" / "ops").glob("*.py"):
        assert not re.search(r"^\s*(import|from) transformers", path.read_text(), re.M), path
    for path in (ROOT / "kernels").glob("*.py"):
        assert rooms(path) <= {"kernels"}, path


def test_kernels_is_not_a_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_two_test_files_have_one_name():
    """The test folders are not packages, so pytest takes two files of one name for one module."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    names += [p.name for p in (ROOT / "benchmarks").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)


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
    modules = {str(p.relative_to(copy)) for p in (copy / "maskprune").rglob("*.py")}
    kernels = {f"maskprune/kernels/{p.name}" for p in (copy / "kernels").glob("*.py")}
    assert modules and kernels and modules | kernels | {"maskprune/py.typed"} <= set(names)
    assert not any(name.endswith(".so") for name in names)
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "v"), str(copy)],
        env=base | {"MASKPRUNE_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
