"""What a shape costs, which shapes are legal, and the budget that training works towards.

Letters: R the resource kept, R* the budget, r the pruned fraction of each kind of unit, a the
kind's share of the attention and FFN weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from maskprune.choices import ARCH_FALLBACKS, HEAD_UNITS, require_choice
from maskprune.config import BudgetConfig
from maskprune.hf.engines import engine_name
from maskprune.hf.families import family_of, text_config
from maskprune.hf.pruned_config import takes_heads, why_heads_stay
from maskprune.hf.shape import Shape, shape_of
from maskprune.structured.cuts import mask_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def attention_weights(config: PreTrainedConfig, shape: Shape) -> int:
    """Weights of the attention projections of one layer (biases and norms not counted)."""
    d, d_h = text_config(config).hidden_size, shape.head_dim
    return 2 * d * shape.heads * d_h + 2 * d * shape.kv_heads * d_h


def ffn_weights(config: PreTrainedConfig, shape: Shape) -> int:
    """Weights of the FFN of one layer (biases not counted)."""
    return (3 if family_of(config).gated else 2) * text_config(config).hidden_size * shape.ffn


def layer_weights(config: PreTrainedConfig, shape: Shape) -> int:
    """Attention and FFN weights of one layer: what `sparsity` is a share of."""
    return attention_weights(config, shape) + ffn_weights(config, shape)


def default_multiple(ffn: int, targets: str | None = None) -> int:
    """The default step between legal FFN widths: 256 suits K-quants, group-128 INT4 and FP8 blocks.

    64 for widths below 4096 and 8 below 512, where a coarser step would miss the budget by more
    than the alignment is worth; with llama.cpp among the targets 256 from 1024 on.
    """
    names = {engine_name(target.strip()) for target in (targets or "").split(",")}
    if "llama.cpp" in names and ffn >= 1024:
        return 256
    return 256 if ffn >= 4096 else 64 if ffn >= 512 else 8


@dataclass(frozen=True)
class Split:
    """Units pruned per row, of heads and of FFN units, and the resource R that is left."""

    head: int
    ffn: int
    R: float


class Budget:
    """The share of attention and FFN weights that may stay, and every legal shape that meets it.

    Args:
        model: a transformers model or its config.
        sparsity: the share, in (0, 1), of all layers' attention and FFN weights to remove.
        head_unit: `kv_group` (a KV head with its query heads) or `query_head` (the same number of
            query heads out of every group).
        multiple_of: legal FFN widths are multiples of it; None takes `default_multiple`.
        head_sparsity, ffn_sparsity: the share of each kind to prune, in [0, 1), instead of a split
            that training finds; `sparsity`, if given too, is then a minimum.
        arch_fallback: `mistral`, `divisor` or `error`, see `pruned_class`.
        targets: engines that are to run the result, comma-separated, for `default_multiple`.

    Raises:
        TypeError: a sparsity that is not a number.
        ValueError: values out of range, or no legal shape meets them; the nearest are named.

    Source: MaskPrune (arXiv 2502.14008), section 3.1, M(s) in normalised form.
    """

    def __init__(
        self,
        model: nn.Module | PreTrainedConfig,
        sparsity: float | None = None,
        *,
        head_unit: str = "kv_group",
        multiple_of: int | None = None,
        head_sparsity: float | None = None,
        ffn_sparsity: float | None = None,
        arch_fallback: str = "mistral",
        targets: str | None = None,
    ) -> None:
        config = cast("PreTrainedConfig", getattr(model, "config", None) or model)
        self.config = config
        self.family = family_of(config)
        self.shape = shape_of(config)
        self.head_unit = head_unit
        self.arch_fallback = arch_fallback
        require_choice("head_unit", head_unit, HEAD_UNITS)
        require_choice("arch_fallback", arch_fallback, ARCH_FALLBACKS)
        step = default_multiple(self.shape.ffn, targets)
        self.multiple_of = step if multiple_of is None else multiple_of
        if not 1 <= self.multiple_of <= self.shape.ffn:
            raise ValueError(
                f"multiple_of is {multiple_of}; expected 1 up to the FFN width {self.shape.ffn}"
            )
        self.head_units = mask_rows(self.shape, head_unit)[1] if self.family.prunes_heads else 0
        self.ffn_units = self.shape.ffn
        total = layer_weights(config, self.shape)
        self.a_ffn = ffn_weights(config, self.shape) / total
        self.a_head = self._removable_attention() / total

        self.by_hand = head_sparsity is not None or ffn_sparsity is not None
        if self.by_hand:
            self.splits = [self._hand_split(sparsity, head_sparsity, ffn_sparsity)]
            self.R_star = self.splits[0].R
        else:
            if sparsity is None:
                raise ValueError("no sparsity is given; pass one like 0.2, or a split by hand")
            if not isinstance(sparsity, int | float):
                raise TypeError(f"sparsity is {sparsity!r}; expected a number, like 0.2")
            if not 0 < sparsity < 1:
                raise ValueError(
                    f"sparsity is {sparsity}; expected a number between 0 and 1, like 0.2"
                )
            self.R_star = 1.0 - sparsity
            self.splits = self._legal_splits()
        self.sparsity = 1.0 - self.R_star

    @classmethod
    def of(cls, model: nn.Module | PreTrainedConfig, settings: BudgetConfig) -> Budget:
        """The budget that a command's settings ask for."""
        return cls(
            model,
            settings.sparsity,
            head_unit=settings.head_unit,
            multiple_of=settings.multiple_of,
            head_sparsity=settings.head_sparsity,
            ffn_sparsity=settings.ffn_sparsity,
            arch_fallback=settings.arch_fallback,
            targets=settings.targets,
        )

    def _removable_attention(self) -> int:
        if not self.head_units:
            return 0
        if self.head_unit == "kv_group":
            return attention_weights(self.config, self.shape)
        return 2 * text_config(self.config).hidden_size * self.shape.heads * self.shape.head_dim

    def resource(self, head: int, ffn: int) -> float:
        """R after pruning `head` and `ffn` units from every row: R = 1 - sum of a * r."""
        r_head = head / self.head_units if self.head_units else 0.0
        return 1.0 - self.a_head * r_head - self.a_ffn * ffn / self.ffn_units

    def fractions(self, split: Split) -> tuple[float, float]:
        """(r_head, r_ffn): the shares of head units and FFN units that `split` prunes."""
        head = split.head / self.head_units if self.head_units else 0.0
        return head, split.ffn / self.ffn_units

    def shape_after(self, split: Split) -> Shape:
        """The shape that is left when every row loses the units of `split`."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        if self.head_units and self.head_unit == "kv_group":
            kv_heads -= split.head
            heads = kv_heads * (self.shape.heads // self.shape.kv_heads)
        elif self.head_units:
            heads = kv_heads * (self.head_units - split.head)
        return replace(self.shape, heads=heads, kv_heads=kv_heads, ffn=self.ffn_units - split.ffn)

    def _head_choices(self) -> list[int]:
        """Legal numbers of pruned head units, fewest first."""
        if not self.head_units:
            return [0]
        choices = []
        for n in range(self.head_units):
            heads = self.shape_after(Split(n, 0, 1.0)).heads
            if takes_heads(self.config, heads, self.arch_fallback):
                choices.append(n)
        return choices

    def _ffn_choices(self) -> list[int]:
        """Legal numbers of pruned FFN units, fewest first."""
        widths = range(self.ffn_units - self.ffn_units % self.multiple_of, 0, -self.multiple_of)
        return sorted({0, *(self.ffn_units - width for width in widths)})

    def _legal_splits(self) -> list[Split]:
        """For each legal head count the widest legal FFN that meets the budget."""
        splits = []
        for n in self._head_choices():
            for f in self._ffn_choices():
                if (R := self.resource(n, f)) <= self.R_star + 1e-9:
                    splits.append(Split(n, f, R))
                    break
        if not splits:
            highest = 1 - min(
                self.resource(n, f) for n in self._head_choices() for f in self._ffn_choices()
            )
            raise ValueError(
                f"sparsity {1 - self.R_star:.4g} is not reachable: with {self.head_unit} units, "
                f"FFN widths in multiples of {self.multiple_of} and at least one unit left, the "
                f"most is {highest:.4g}; ask for less or lower --multiple-of"
            )
        # A split is never better than another that prunes no more of either kind.
        return [
            s
            for s in splits
            if not any(
                o is not s and o.head <= s.head and o.ffn <= s.ffn and o.R > s.R for o in splits
            )
        ]

    def _hand_split(
        self, sparsity: float | None, head_sparsity: float | None, ffn_sparsity: float | None
    ) -> Split:
        head, ffn = head_sparsity or 0.0, ffn_sparsity or 0.0
        for name, value in (("head_sparsity", head), ("ffn_sparsity", ffn)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; expected a number in [0, 1)")
        if head and (why := why_heads_stay(self.config, self.arch_fallback)):
            raise ValueError(
                f"head_sparsity is {head}, but {self.family.model_type} keeps its heads: "
                f"{why}; leave it at 0"
            )
        heads = self._head_choices()
        wanted = head * self.head_units
        chosen = [n for n in heads if n >= wanted - 1e-9]
        widths = [f for f in self._ffn_choices() if f >= ffn * self.ffn_units - 1e-9]
        if not chosen or not widths:
            raise ValueError(
                f"head_sparsity {head} and ffn_sparsity {ffn} leave no legal shape; legal head "
                f"sparsities are {[round(n / self.head_units, 4) for n in heads]}, and the FFN "
                f"keeps at least {self.multiple_of} of {self.ffn_units} units"
            )
        if self.arch_fallback == "error" and chosen[0] - wanted >= 1:
            raise ValueError(
                f"head_sparsity {head} asks for a head count that {self.family.model_type} "
                f"refuses; legal head sparsities are "
                f"{[round(n / self.head_units, 4) for n in heads]}, or use --arch-fallback mistral"
            )
        split = Split(chosen[0], widths[0], self.resource(chosen[0], widths[0]))
        if split.R >= 1:
            raise ValueError("head_sparsity and ffn_sparsity are both 0; expected at least one > 0")
        if sparsity is not None and split.R > 1 - sparsity + 1e-9:
            raise ValueError(
                f"head_sparsity {head} and ffn_sparsity {ffn} remove {1 - split.R:.4g}, less than "
                f"the requested sparsity {sparsity}; raise them or leave out --sparsity"
            )
        return split

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Every candidate split as (K, 2) float32: pruned head units, pruned FFN units."""
        return torch.tensor(
            [[s.head, s.ffn] for s in self.splits], dtype=torch.float32, device=device
        )
