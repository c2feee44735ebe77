"""Whether masks learn: how far they left their first ranking, and their gradients' noise."""

from __future__ import annotations

import math

import torch

from maskprune.structured.masks import Masks
from maskprune.structured.minimax import Minimax

KINDS = ("head", "ffn")


class MaskSignal:
    """Compares the present choice with that of the first masks, and gradients with their noise.

    Args:
        masks: in training.
        start: (rows, units) per kind, the masks of step 0; of equal masks the lower index is
            pruned first.
    """

    def __init__(self, masks: Masks, start: dict[str, torch.Tensor]) -> None:
        self.masks = masks
        self.rank = {k: v.argsort(dim=1, stable=True).argsort(dim=1) for k, v in start.items()}
        self._forget()

    def _forget(self) -> None:
        self.count = 0
        self.sum = {k: torch.zeros_like(r, dtype=torch.float32) for k, r in self.rank.items()}
        self.squares = {k: v.clone() for k, v in self.sum.items()}

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add this step's gradients, without a host synchronisation."""
        gradients = {k: getattr(self.masks, k).grad for k in KINDS}
        self.count += 1
        for k, g in gradients.items():
            if g is not None and g.numel():
                self.sum[k] += g
                self.squares[k] += g.square()

    @torch.no_grad()
    def row(self, solver: Minimax) -> dict[str, float]:
        """Fields of a trace row, per kind; starts the sums of gradients again.

        `moved_*`: share of the units pruned by now that the first masks would have kept, had they
        pruned as many. `moved_rank_*`: how far those stood from the first masks' cut on average,
        as a share of the row. `signal_*`: (mean gradient)^2 over the variance of that mean,
        the median over the units whose gradient varies; pure noise gives about 0.45.
        """
        now, row = solver.read(), {}
        for k in KINDS:
            m, s = getattr(self.masks, k), math.floor(now[f"s_{k}"])
            if not m.numel():
                continue
            row[f"moved_{k}"] = row[f"moved_rank_{k}"] = 0.0
            if s:
                least = m.sort(dim=1, stable=True).indices[:, :s]
                away = (self.rank[k].gather(1, least) - (s - 1)).clamp(min=0).float()
                joined = away > 0
                row[f"moved_{k}"] = float(joined.float().mean())
                if joined.any():
                    row[f"moved_rank_{k}"] = float(away[joined].mean()) / m.shape[1]
            if self.count > 1:
                mean, n = self.sum[k] / self.count, self.count
                variance = (self.squares[k] / n - mean.square()).clamp(min=0) / (n - 1)
                some = variance > 0
                if some.any():
                    row[f"signal_{k}"] = float((mean.square()[some] / variance[some]).median())
        self._forget()
        return row
