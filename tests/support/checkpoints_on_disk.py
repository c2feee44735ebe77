"""A tiny stock checkpoint with a tokenizer and a text, on disk, for tests of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import tiny_model
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
# Flags of a short run of `maskprune prune` on such a model.
PRUNE = (
    "--sparsity 0.3 --steps 24 --batch-size 2 --seq-len 16 --multiple_of 4 --warm-start-blocks 4 "
    "--lora-r 2 --autocast none --learning-rate 3e-3 --save-steps 8"
).split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer that knows w0 .. w59 and adds no BOS."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def write_checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny random model with its tokenizer."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def strange_tensors(folder: Path) -> set[str]:
    """Tensors in the safetensors files at the top of `folder` that are not the model's."""
    own = set(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    assert found
    return found - own


def write_text(path: Path, documents: int = 60) -> Path:
    """A JSONL file of word documents."""
    rows = (
        {"text": " ".join(WORDS[(i * 7 + j * j) % 60] for j in range(30))} for i in range(documents)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
