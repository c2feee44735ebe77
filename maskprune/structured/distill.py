"""The loss against the unmasked self: KL of the logits, MSE of every layer's hidden states.

L = KL + alpha * sum over layers of MSE(h_s, h_t) (MaskPrune, arXiv 2502.14008, section 3.3). The
teacher is the same model with masks and adapters off, so it costs no second copy of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from maskprune.hf.families import layers_of, stock_model
from maskprune.structured.masks import Masks
from maskprune.training.losses import token_kl


@dataclass
class DistillLoss:
    """total = kl + alpha * layer; all 0-dim."""

    total: torch.Tensor
    kl: torch.Tensor
    layer: torch.Tensor


@contextlib.contextmanager
def teacher_mode(model: Any, masks: Masks) -> Iterator[None]:
    """The dense self: masks off, adapters off, no gradients, no dropout."""
    adapters: Any = model.disable_adapter() if hasattr(model, "disable_adapter") else None
    training = model.training
    with torch.no_grad(), masks.off(), adapters or contextlib.nullcontext():
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def distill(
    model: nn.Module,
    masks: Masks,
    input_ids: torch.Tensor,
    *,
    alpha: float = 0.04,
    kl_direction: str = "teacher_student",
) -> DistillLoss:
    """Loss of the masked model against its unmasked self on `input_ids` (B, T).

    Teacher and student run layer by layer side by side, so that of the teacher's activations only
    the current layer's are alive. Under activation checkpointing, which runs layers twice, the
    teacher's hidden states are kept instead.

    Args:
        model: transformers causal LM with masks attached, or the PEFT model around it.
        alpha: weight of the hidden-state term; 0 leaves it out.
        kl_direction: see `token_kl`.
    """
    base = stock_model(model)
    if alpha == 0 or getattr(base, "is_gradient_checkpointing", False):
        student, teacher, layer = _teacher_first(model, base, masks, input_ids, alpha != 0)
    else:
        student, teacher, layer = _side_by_side(model, base, masks, input_ids)
    kl = token_kl(student, teacher, kl_direction)
    return DistillLoss(kl + alpha * layer if alpha else kl, kl, layer)


def _teacher_first(
    model: nn.Module, base: Any, masks: Masks, input_ids: torch.Tensor, with_hidden: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits, and the MSE term from both models' kept hidden states."""

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        last: list[torch.Tensor] = []
        # `hidden_states` ends with the normed state; the last block's own is the norm's input.
        hook = _final_norm(base).register_forward_pre_hook(lambda _, args: last.append(args[0]))
        try:
            out = model(input_ids=input_ids, use_cache=False, output_hidden_states=with_hidden)
        finally:
            hook.remove()
        return out.logits, [*out.hidden_states[1:-1], *last] if with_hidden else []

    with teacher_mode(model, masks):
        teacher, hidden_t = run()
    student, hidden_s = run()
    terms = [
        functional.mse_loss(h_s.float(), h_t.float())
        for h_s, h_t in zip(hidden_s, hidden_t, strict=True)
    ]
    return student, teacher, _sum(terms, student)


def _sum(terms: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros((), device=like.device)


def _side_by_side(
    model: nn.Module, base: Any, masks: Masks, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student and teacher logits, and the sum over layers of the MSE.

    A hook on each block runs the block a second time on the teacher's hidden state.
    """
    busy = False
    state: dict[str, torch.Tensor] = {}
    terms: list[torch.Tensor] = []

    def run_teacher(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
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
        h_s, h_t = (o[0] if isinstance(o, tuple) else o for o in (output, out_t))
        state["h"] = h_t
        terms.append(functional.mse_loss(h_s.float(), h_t.float()))

    handles = [
        block.register_forward_hook(run_teacher, with_kwargs=True) for block in layers_of(base)
    ]
    tail = _tail(base)
    try:
        student = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    with teacher_mode(model, masks):
        teacher = tail(state.pop("h"))
    return student, teacher, _sum(terms, student)


def _final_norm(base: Any) -> nn.Module:
    """The norm after the last block."""
    core = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
    names = ("norm", "ln_f", "final_layer_norm")
    norm: nn.Module = next(
        getattr(core, name) for name in names if getattr(core, name, None) is not None
    )
    return norm


def _tail(base: Any) -> Any:
    """What a stock model does after its last block: final norm, LM head, soft cap."""
    cap = getattr(base.config, "final_logit_softcapping", None)

    def tail(h: torch.Tensor) -> torch.Tensor:
        logits = base.get_output_embeddings()(_final_norm(base)(h))
        return torch.tanh(logits / cap) * cap if cap else logits

    return tail
