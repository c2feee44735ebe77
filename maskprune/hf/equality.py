"""Two models' logits on the same tokens: how far apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

# Share of the largest logit that rounding may move; half precision rounds weights and activations.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart on the same tokens."""

    largest: float
    largest_logit: float
    top1_agreement: float

    @property
    def relative(self) -> float:
        """Largest absolute difference over the largest absolute logit."""
        return self.largest / self.largest_logit if self.largest_logit else self.largest


@torch.no_grad()
def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """float64 logits of a model on `input_ids` (B, T), in eval mode."""
    training = model.training
    model.eval()
    logits: torch.Tensor = model(input_ids=input_ids).logits.double()
    model.train(training)
    return logits


def difference_of(x: torch.Tensor, y: torch.Tensor) -> Difference:
    """How far logits `y` are from `x`."""
    y = y.to(x.device)
    return Difference(
        largest=float((x - y).abs().max()),
        largest_logit=float(x.abs().max()),
        top1_agreement=float((x.argmax(-1) == y.argmax(-1)).double().mean()),
    )


def compare_logits(a: nn.Module, b: nn.Module, input_ids: torch.Tensor) -> Difference:
    """The largest difference of two models' logits on `input_ids` (B, T), in eval mode."""
    return difference_of(logits_of(a, input_ids), logits_of(b, input_ids))


def require_equal(difference: Difference, dtype: torch.dtype) -> None:
    """Refuse an export whose logits are not the masked model's.

    Raises:
        RuntimeError: they are further apart than rounding in `dtype` explains.
    """
    if not difference.relative <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the exported logits differ from the masked model's by {difference.largest:.2e} of "
            f"{difference.largest_logit:.1f}; expected at most {TOLERANCE[dtype]} of the largest; "
            "nothing was written; please report this with the settings"
        )
