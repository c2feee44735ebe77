"""A student that is cut from the masked model before training, which then trains its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from maskprune.files import write_json
from maskprune.hf.equality import Difference, compare_logits, require_equal
from maskprune.hf.families import decoder_of, text_config
from maskprune.structured.export import export
from maskprune.structured.masks import Masks
from maskprune.training.distributed import on_first

PROOF_FILE = "cut.json"


def cut_student(
    model: nn.Module, masks: Masks, arch_fallback: str
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """A stock model cut from the masked one, ready to train; and the dtypes to give it at the end.

    In float32, for updates are smaller than what lower precision keeps. What is trained is the
    decoder but its token embeddings: the head, often tied to them, stays the teacher's.
    """
    student = export(model, masks, arch_fallback=arch_fallback)
    dtypes = {name: p.dtype for name, p in student.named_parameters()}
    student.float().requires_grad_(False)
    decoder_of(student).requires_grad_(True)
    for module in (student.get_input_embeddings(), student.get_output_embeddings()):
        module.requires_grad_(False)
    text_config(student.config).use_cache = False
    return student, dtypes


def finished(student: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> PreTrainedModel:
    """The trained student in the dtypes of the model it was cut from, no weight asking gradients.

    Args:
        dtypes: of its parameters, by name.
    """
    for name, p in student.named_parameters():
        p.data = p.data.to(dtypes[name])
        p.grad = None
    text_config(student.config).use_cache = True
    return student.requires_grad_(True).eval()


def prove_cut(
    model: nn.Module, student: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype
) -> Difference:
    """How far the logits of the cut student are from the masked model's, before any training.

    Args:
        ids: (n, T) int64 tokens.
        dtype: of the masked model.

    Raises:
        RuntimeError: further than rounding explains.
    """
    difference = compare_logits(model, student, ids)
    require_equal(difference, dtype)
    return difference


def save_proof(difference: Difference, run: Path) -> None:
    """Keep what `prove_cut` found in the run folder, for a resumed run."""
    on_first(lambda: write_json(run / PROOF_FILE, vars(difference)))


def load_proof(run: Path) -> Difference:
    """What `save_proof` kept."""
    return Difference(**json.loads((run / PROOF_FILE).read_text()))


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that ask for gradients."""
    return (p for p in model.parameters() if p.requires_grad)
