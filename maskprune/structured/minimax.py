"""The minimax solver: masks, pruned fractions r, dual variables y and z, on the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

from maskprune.choices import LEAST_STEPS, MODES, require_choice, require_reach
from maskprune.files import JsonObject
from maskprune.hf.shape import Shape
from maskprune.ops.minimax_step import FIELDS, INDEX, Rates, initial_state, minimax_step_
from maskprune.structured.budget import Budget, Split
from maskprune.structured.masks import Masks

logger = logging.getLogger(__name__)


class Minimax:
    """Algorithm 1 without its gradient step: call `step()` after `optimizer.step()`.

    ```python
    solver = Minimax(masks, Budget(model, sparsity=0.5), total_steps=1000)
    for batch in data:
        loss(batch).backward(); optimizer.step(); optimizer.zero_grad()
        solver.step()
    solver.finish()
    ```

    A step makes no host synchronisation and can be captured in a CUDA graph.

    Args:
        masks: from `attach_masks`; clamped and shrunk in place.
        budget: the budget; its head unit must be that of the masks.
        total_steps: T, the number of `step()` calls to come; the rates scale with it.
        mode: `minimax` learns the split between heads and FFN; `scheduled` lowers the budget
            linearly with equal fractions of both.
        reach: share of T by which the budget is about reached; the rest is recovery.
        eta1: decay rate of the first step, independent of the masks' learning rate; a prox call
            divides the pruned masks by 1 + 2 eta1 y, and eta1 rises geometrically to 10. None
            decays a mask by about e^-20 within the ramp, 0.01 to 0.5.
        interval: k, steps between two prox calls on FFN masks, falling linearly to 1; None takes
            10, the paper's, and less below 2000 steps.
        lock_gap: the shape becomes final once at most this share of the sparsity is missing.
        backend: of `ops.minimax_step_`.

    Raises:
        ValueError: values out of range, or a budget of another model or unit.
        RuntimeError: masks that an adapter has wrapped.

    Source: MaskPrune (arXiv 2502.14008), Algorithm 1, in the normalised form of docs/method.md.
    """

    def __init__(
        self,
        masks: Masks,
        budget: Budget,
        total_steps: int,
        *,
        mode: str = "minimax",
        reach: float = 0.3,
        eta1: float | None = None,
        interval: int | None = None,
        lock_gap: float = 0.05,
        backend: str = "auto",
    ) -> None:
        require_choice("mode", mode, MODES)
        if total_steps < LEAST_STEPS:
            raise ValueError(
                f"total_steps is {total_steps}; the schedule needs at least {LEAST_STEPS}"
            )
        require_reach(reach)
        if budget.shape != masks.shape:
            raise ValueError(
                f"the budget is of {budget.shape}, the masks are of {masks.shape}; make both from "
                "the same model"
            )
        if masks.head.numel() and budget.head_unit != masks.head_unit:
            raise ValueError(
                f"the budget counts {budget.head_unit} units, the masks {masks.head_unit}; give "
                "both the same head_unit"
            )
        masks.require_outermost()
        self.masks = masks
        self.budget = budget
        self.mode = mode
        self.backend = backend
        device = masks.ffn.device
        if budget.by_hand:
            (split,) = budget.splits
            to_head, to_ffn = budget.fractions(split)
        else:
            to_head = to_ffn = budget.sparsity / (budget.a_head + budget.a_ffn)
        self.rates = Rates(
            a_head=budget.a_head,
            a_ffn=budget.a_ffn,
            R_star=budget.R_star,
            total_steps=total_steps,
            eta1=eta1 or min(0.5, max(0.01, 10.0 / (reach * total_steps))),
            eta1_end=10.0,
            # r follows the price z / y within a tenth of the ramp.
            eta2=10.0 / (reach * total_steps),
            eta3=100.0 / total_steps,
            eta4=1.0 / (reach * total_steps),
            reach=reach,
            interval=interval or max(1, min(10, total_steps // 200)),
            lock_gap=lock_gap,
            # A split by hand is the target from the first step on, in either mode.
            scheduled=mode == "scheduled" or budget.by_hand,
            to_head=to_head,
            to_ffn=to_ffn,
        )
        self.state = initial_state(y0=1.0, z0=0.0, device=device)
        self._settled: dict[str, float] | None = None
        self.table = budget.table(device)
        # The FFN masks' tensor version after the last step, raised by any write; None once warned.
        self._left_at: int | None = -1

    def step(self) -> None:
        """Clamp and shrink the masks, move r, y and z; after `optimizer.step()`.

        Raises:
            RuntimeError: the masks are not trained, so units would be pruned in index order.
        """
        if not self.masks.ffn.requires_grad:
            self.require_trained(())
        elif self._left_at == self.masks.ffn._version:
            logger.warning(
                "no optimizer moved the masks since the last solver step; give it "
                "masks.parameters(), and call solver.step() once after each optimizer.step()"
            )
            self._left_at = None
        minimax_step_(
            self.masks.head,
            self.masks.ffn,
            self.state,
            self.table,
            self.rates,
            backend=self.backend,
        )
        if self._left_at is not None:
            self._left_at = self.masks.ffn._version

    def require_trained(self, parameters: Iterable[torch.Tensor]) -> None:
        """Refuse masks that are not among an optimizer's `parameters`, unless the shape is final.

        Synchronises with the device if they are not.

        Raises:
            RuntimeError: units would be pruned in index order.
        """
        trained = {id(p) for p in parameters if p.requires_grad}
        masks = [m for m in (self.masks.head, self.masks.ffn) if m.numel()]
        if all(id(m) in trained for m in masks) or self.locked:
            return
        raise RuntimeError(
            "the masks are not trained, so units would be pruned in index order; give the "
            "optimizer masks.parameters(), with requires_grad, or set the masks and call "
            "solver.lock(split)"
        )

    def lock(self, split: Split) -> None:
        """Make `split` final now; from here on only the masks that it prunes shrink."""
        r_head, r_ffn = self.budget.fractions(split)
        values = {
            "locked": 1.0,
            "locked_at": 0.0,
            "R": split.R,
            "s_head": float(split.head),
            "s_ffn": float(split.ffn),
            "r_head": r_head,
            "r_ffn": r_ffn,
        }
        for name, value in values.items():
            self.state[INDEX[name]] = value

    def read(self) -> dict[str, float]:
        """Every scalar of the state by name; this synchronises with the device."""
        return dict(zip(FIELDS, self.state.tolist(), strict=True))

    @property
    def locked(self) -> bool:
        """Whether the budget is reached and the shape final; synchronises with the device."""
        return bool(self.state[INDEX["locked"]].item())

    def require_healthy(self) -> None:
        """Raise if a step met NaN masks; synchronises with the device.

        Raises:
            RuntimeError: it did; names the step.
        """
        now = self.read()
        if now["failed"]:
            raise RuntimeError(
                f"the masks became NaN at step {int(now['step'])}; the loss diverged; resume from "
                "the last checkpoint with a lower learning rate"
            )

    def split(self) -> Split:
        """The final split.

        Raises:
            RuntimeError: the budget is not reached yet.
        """
        now = self.read()
        if not now["locked"]:
            raise RuntimeError(
                f"the budget is not reached: R = {now['R']:.4f}, R* = {self.budget.R_star:.4f} "
                f"after {int(now['step'])} of {self.rates.total_steps} steps; train to the end"
            )
        return Split(int(now["s_head"]), int(now["s_ffn"]), now["R"])

    def shape(self) -> Shape:
        """The uniform shape that is left; see `split`."""
        return self.budget.shape_after(self.split())

    @torch.no_grad()
    def residuals(self) -> dict[str, float]:
        """Largest mask among those to be pruned, per kind; synchronises with the device."""
        now, out = self.read(), {}
        for name in ("head", "ffn"):
            m, s = getattr(self.masks, name), math.floor(now[f"s_{name}"])
            out[name] = float(m.sort(dim=1).values[:, s - 1].max()) if m.numel() and s else 0.0
        return out

    @torch.no_grad()
    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the head and FFN masks, with the units that the final split prunes at 0.

        Raises:
            RuntimeError: the budget is not reached.
        """
        split = self.split()
        out = []
        for m, s in ((self.masks.head, split.head), (self.masks.ffn, split.ffn)):
            # A kept mask that training drove to 0 would change the count; the smallest float
            # keeps the unit without changing the function.
            final = m.clamp(min=torch.finfo(torch.float32).tiny)
            if m.numel():
                final.scatter_(1, m.sort(dim=1, stable=True).indices[:, :s], 0.0)
            out.append(final)
        return out[0], out[1]

    @torch.no_grad()
    def settle(self) -> dict[str, float]:
        """Once the shape is final: pruned masks to exactly 0, kept masks to exactly 1.

        From then on only the weights learn. In a short run a kept mask below 1 comes from its
        start and from noise, and the weights can learn such a scale themselves.

        Returns:
            `residuals()` from before.

        Raises:
            RuntimeError: the budget is not reached, or the masks are NaN.
        """
        self.require_healthy()
        self._settled = self.residuals()
        for m, final in zip((self.masks.head, self.masks.ffn), self.kept(), strict=True):
            m.copy_(final != 0)
        return self._settled

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Set the pruned masks to exactly 0; returns `residuals()` from before, or from before
        they settled, be it in an earlier part of a resumed run.

        Raises:
            RuntimeError: the budget is not reached, or the masks are NaN.
        """
        self.require_healthy()
        left = self._settled or self.residuals()
        for m, final in zip((self.masks.head, self.masks.ffn), self.kept(), strict=True):
            m.copy_(final)
        return left

    def state_dict(self) -> JsonObject:
        """What a resumed run needs besides the masks themselves."""
        return {
            "state": self.state.clone(),
            "fields": list(FIELDS),
            "rates": vars(self.rates),
            "settled": self._settled,
        }

    def load_state_dict(self, saved: JsonObject) -> None:
        """Continue from `state_dict()` of a solver with the same settings.

        Raises:
            ValueError: it comes from other settings.
        """
        if list(saved["fields"]) != list(FIELDS) or dict(saved["rates"]) != vars(self.rates):
            changed = {
                name: (value, vars(self.rates).get(name))
                for name, value in dict(saved["rates"]).items()
                if vars(self.rates).get(name) != value
            }
            raise ValueError(
                f"the saved solver has other settings (saved, now): {changed}; resume with those "
                "of the first run"
            )
        self.state.copy_(saved["state"].to(self.state.device))
        self._settled = saved.get("settled")
