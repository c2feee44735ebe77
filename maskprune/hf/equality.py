"""Two models' logits on the same tokens: how far apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from maskprune.hf.families import FAMILIES, stock_model
from maskprune.hf.head import head_of, last_hidden_states

# What rounding may change, as a share of the largest logit; half precision also rounds weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
# Logits are compared in float64, this many tokens' at a time.
TOKENS_AT_ONCE = 64

ToLogits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart on the same tokens.

    Attributes:
        largest: largest absolute difference.
        largest_logit: largest absolute logit of the first model.
        top1_agreement: share of tokens for which both models rank the same token first.
    """

    largest: float
    largest_logit: float
    top1_agreement: float

    @property
    def relative(self) -> float:
        """Largest absolute difference over the largest absolute logit."""
        return self.largest / self.largest_logit if self.largest_logit else self.largest


@torch.no_grad()
def hidden_states_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """A model's last hidden states (B, T, d) on `input_ids` (B, T), one by one, in eval mode."""
    training = model.training
    model.eval()
    hidden = [last_hidden_states(model, ids) for ids in input_ids.split(1)]
    model.train(training)
    return torch.cat(hidden)


@torch.no_grad()
def difference_of(
    a: torch.Tensor, b: torch.Tensor, logits_of_a: ToLogits, logits_of_b: ToLogits
) -> Difference:
    """How far two models' logits are apart, a few tokens at a time.

    Args:
        a, b: the models' last hidden states (..., d).
        logits_of_a, logits_of_b: compute logits (..., V) from them, see `Head`.
    """
    return _total(_slices(a, b, logits_of_a, logits_of_b))


@torch.no_grad()
def compare_logits(a: nn.Module, b: nn.Module, input_ids: torch.Tensor) -> Difference:
    """The largest difference of two models' logits on `input_ids` (B, T), in eval mode.

    At any time one sequence's hidden states and a few tokens' logits are in memory; for a family
    that is not in the table, one sequence's logits.
    """

    def slices() -> Iterator[torch.Tensor]:
        for ids in input_ids.split(1):
            (x, head_a), (y, head_b) = (_states(model, ids) for model in (a, b))
            yield from _slices(x, y, head_a, head_b)

    return _total(slices())


def _slices(
    a: torch.Tensor, b: torch.Tensor, logits_of_a: ToLogits, logits_of_b: ToLogits
) -> Iterator[torch.Tensor]:
    """Of a few tokens each: largest difference, largest logit, tokens of equal top 1, tokens."""
    rows = (h.flatten(0, -2).split(TOKENS_AT_ONCE) for h in (a, b))
    for h_a, h_b in zip(*rows, strict=True):
        x, y = logits_of_a(h_a).double(), logits_of_b(h_b).double().to(a.device)
        agreed = (x.argmax(-1) == y.argmax(-1)).sum()
        numbers = (x - y).abs().max(), x.abs().max(), agreed, x.new_tensor(len(x))
        yield torch.stack([n.double() for n in numbers])


def _total(slices: Iterable[torch.Tensor]) -> Difference:
    rows = torch.stack(list(slices))
    largest, largest_logit = rows[:, :2].amax(0).tolist()
    agreed, tokens = rows[:, 2:].sum(0).tolist()
    return Difference(largest, largest_logit, agreed / tokens)


def _states(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ToLogits]:
    if stock_model(model).config.model_type in FAMILIES:
        return hidden_states_of(model, ids), head_of(model)
    training = model.training
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(training)
    return logits, lambda logits: logits


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
