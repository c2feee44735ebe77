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
from maskprune.training.trainer import keep_activations

PROOF_FILE = "cut.json"
WEIGHTS_FILE = "student.safetensors"


def cut_student(
    model: nn.Module, masks: Masks, arch_fallback: str
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """A stock model cut from the masked one, ready to train; and the dtypes to give it at the end.

    In float32 or float64, for updates are smaller than what half precision keeps. Trained is the
    decoder but its token embeddings: the head, often tied to them, stays the teacher's.
    """
    student = export(model, masks, arch_fallback=arch_fallback)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(student)}
    nn.Module.to(student, torch.promote_types(student.dtype, torch.float32))
    student.requires_grad_(False)
    decoder_of(student).requires_grad_(True)
    for module in (student.get_input_embeddings(), student.get_output_embeddings()):
        module.requires_grad_(False)
    text_config(student.config).use_cache = False
    return student, dtypes


def finished(student: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> PreTrainedModel:
    """The trained student in the dtypes of the model it was cut from, without gradients held.

    Args:
        dtypes: of its parameters and buffers, by name.
    """
    for name, tensor in _tensors(student):
        tensor.data = tensor.data.to(dtypes[name])
        tensor.grad = None
    keep_activations(student)
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
    """What `save_proof` kept.

    Raises:
        ValueError: it is not there.
    """
    path = run / PROOF_FILE
    if not path.is_file():
        raise ValueError(
            f"{run} holds no {PROOF_FILE}, so that run trained no weights; resume it with the "
            "settings that it began with, or start again in another output folder"
        )
    return Difference(**json.loads(path.read_text()))


def save_weights(folder: Path, student: nn.Module) -> None:
    """Write what is trained into a checkpoint folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous() for n, p in student.named_parameters() if p.requires_grad}
    save_file(tensors, folder / WEIGHTS_FILE)


def load_weights(folder: Path, student: nn.Module) -> None:
    """Set what is trained to what `save_weights` wrote.

    Raises:
        ValueError: it wrote another model's.
    """
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS_FILE)
    own = {n: p for n, p in student.named_parameters() if p.requires_grad}
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())
        raise ValueError(f"{folder} is of another model: {len(odd)} tensors differ, as {odd[0]}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that ask for gradients."""
    return (p for p in model.parameters() if p.requires_grad)
