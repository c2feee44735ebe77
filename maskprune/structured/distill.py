"""The distillation loss: KL of the logits and MSE of every layer's hidden states.

L = KL + alpha * sum over layers of MSE(h_s, h_t) (MaskPrune, arXiv 2502.14008, section 3.3). Where
it is asked for, a share w of the KL is replaced by the cross entropy of the text's next tokens, as
in Hinton et al. (arXiv 1503.02531), section 2: KL becomes (1 - w) KL + w CE. The
teacher is the same model with masks and adapters off, so it costs no second copy of the weights,
or another model, where the student's weights are trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from maskprune.files import JsonObject
from maskprune.hf.adapters import adapted_layers
from maskprune.hf.families import layers_of, stock_model
from maskprune.hf.head import head_of, last_hidden_states, tail_of
from maskprune.ops.linear_kl import check_lm_weight
from maskprune.structured.masks import Masks
from maskprune.training.losses import hidden_distillation, hidden_kl


@dataclass
class DistillLoss:
    """total = (1 - lm_weight) kl + lm_weight lm + alpha layer; 0-dim tensors.

    kl and lm have no gradient; lm is 0 where lm_weight is.
    """

    total: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor
    lm: torch.Tensor


@contextlib.contextmanager
def teacher_mode(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Within the context the model is its own teacher: no masks, adapters, gradients or dropout."""
    without_adapters = getattr(model, "disable_adapter", contextlib.nullcontext)
    training = model.training
    with torch.no_grad(), masks.off(), without_adapters():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            # The student must not meet a trained weight that was cast without its graph.
            torch.clear_autocast_cache()


def distill(
    model: nn.Module,
    masks: Masks,
    input_ids: torch.Tensor,
    *,
    alpha: float = 0.04,
    kl_direction: str = "teacher_student",
    lm_weight: float = 0.0,
    teacher: nn.Module | None = None,
) -> DistillLoss:
    """Loss of the masked model against its unmasked self on `input_ids` (B, T).

    Teacher and student run side by side, so only one layer of the teacher's activations is in
    memory. Under activation checkpointing, which runs layers twice, and with a `teacher` of its
    own, the teacher runs first and all its hidden states are kept. Logits are computed for a few
    tokens at a time, unless the head is adapted or has hooks (`Head.obstacle`).

    Args:
        model: transformers causal LM with masks attached, or the PEFT model around it.
        alpha: weight of the hidden-state term; 0 leaves it out.
        kl_direction: see `token_kl`.
        lm_weight: share w of the cross entropy of the next tokens, within every sequence.
        teacher: a model with `masks` attached, of the same hidden size and head: with masks and
            adapters off it is the teacher, and `model` a student cut from it.

    Raises:
        ValueError: the model inside a PEFT model, whose adapters the teacher can't do without; an
            lm_weight outside 0 to 1.
    """
    check_lm_weight(lm_weight)
    taught = model if teacher is None else teacher
    if not hasattr(taught, "disable_adapter") and adapted_layers(taught):
        raise ValueError(
            "the model inside a PEFT model was given, whose adapters can't be switched off for the "
            "teacher; give the PEFT model itself"
        )
    base = stock_model(model)
    if alpha == 0 or teacher is not None or _checkpoints_activations(base):
        h_s, h_t, layer = _teacher_first(model, taught, masks, input_ids, alpha != 0)
    else:
        h_s, h_t, layer = _side_by_side(model, base, masks, input_ids)
    head = head_of(base)

    def as_teacher() -> AbstractContextManager[None]:
        return teacher_mode(taught, masks)

    if lm_weight:
        total, kl, lm = hidden_distillation(
            head, h_s, h_t, input_ids, lm_weight, kl_direction, as_teacher
        )
    else:
        total = kl = hidden_kl(head, h_s, h_t, kl_direction, as_teacher)
        lm = torch.zeros_like(kl)
    return DistillLoss(total + alpha * layer if alpha else total, kl.detach(), layer, lm)


def _checkpoints_activations(base: nn.Module) -> bool:
    # transformers' own property was renamed within version 5; the old name warns in newer ones.
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def _teacher_first(
    model: nn.Module,
    taught: nn.Module,
    masks: Masks,
    input_ids: torch.Tensor,
    with_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states of student and teacher, and the sum over layers of the MSE."""

    def kept(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        states: list[torch.Tensor] = []

        def keep(block: nn.Module, args: object, output: Output) -> None:
            states.append(_hidden(output))

        blocks = layers_of(model) if with_hidden else []
        handles = [block.register_forward_hook(keep) for block in blocks]
        try:
            return last_hidden_states(model, input_ids), states
        finally:
            for handle in handles:
                handle.remove()

    with teacher_mode(taught, masks):
        teacher, hidden_t = kept(taught)
    student, hidden_s = kept(model)
    # A student whose weights are trained is in float32, whatever its teacher is in.
    teacher = teacher.to(student.dtype)
    terms = [
        functional.mse_loss(h_s.float(), h_t.float())
        for h_s, h_t in zip(hidden_s, hidden_t, strict=True)
    ]
    return student, teacher, _sum(terms, student)


Output = torch.Tensor | tuple[torch.Tensor, ...]


def _hidden(output: Output) -> torch.Tensor:
    """A block's hidden states, without the further outputs of some transformers versions."""
    h: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return h


def _sum(terms: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros((), device=like.device)


def _side_by_side(
    model: nn.Module, base: PreTrainedModel, masks: Masks, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states of student and teacher, and the sum over layers of the MSE.

    A hook on each block runs the block a second time on the teacher's hidden state.
    """
    busy = False
    state: dict[str, torch.Tensor] = {}
    terms: list[torch.Tensor] = []

    def run_teacher(
        block: nn.Module, args: tuple[object, ...], kwargs: JsonObject, output: Output
    ) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            h_t = state.pop("h", None)
            inputs = args if h_t is None else (h_t, *args[1:])
            if not args:
                kwargs = {**kwargs, **({} if h_t is None else {"hidden_states": h_t})}
            with teacher_mode(model, masks):
                out_t = block(*inputs, **kwargs)
        finally:
            busy = False
        h_s, h_t = _hidden(output), _hidden(out_t)
        state["h"] = h_t
        terms.append(functional.mse_loss(h_s.float(), h_t.float()))

    handles = [
        block.register_forward_hook(run_teacher, with_kwargs=True) for block in layers_of(base)
    ]
    try:
        student = last_hidden_states(model, input_ids)
    finally:
        for handle in handles:
            handle.remove()
    with teacher_mode(model, masks):
        teacher = tail_of(base, state.pop("h"))
    return student, teacher, _sum(terms, student)
