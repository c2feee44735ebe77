"""Learnable 2:4 masks on a model's linears: their logits, the samples drawn, the final choice.

Legend: W (O, I) weight - pi (6, O, I / 4) logits, a plane per candidate - M0 prior mask -
kappa scale of the logits, tau temperature (MaskLLM, arXiv 2409.17481, section 3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from maskprune.choices import require_choice
from maskprune.hf.families import layers_of, require_causal_lm, stock_model
from maskprune.ops import gumbel_two_four
from maskprune.training.distributed import rank
from maskprune.training.sharding import Sharder, own_part, whole
from maskprune.two_four.patterns import CANDIDATES, Linear, mask_of, oriented, prunable

SEEN_AS = ("sample", "hard", "off")


class _Masked(nn.Module):
    """The parametrization of one weight: W to W * m."""

    norm_sq: torch.Tensor

    def __init__(self, logits: torch.Tensor, seed: torch.Tensor, owner: TwoFourMasks, turned: bool):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seed, self.turned = seed, turned
        self.owner = owner

    def __getstate__(self) -> dict[str, object]:
        # The norm of the last forward belongs to its graph, which cannot be copied.
        return {name: value for name, value in vars(self).items() if name != "norm_sq"}

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        owner = self.owner
        if owner.mode == "off":
            return weight
        W = weight.T if self.turned else weight
        if owner.mode == "hard":
            masked = W.masked_fill(~mask_of(self.logits.argmax(0)), 0.0)
        else:
            masked, self.norm_sq = gumbel_two_four(
                W, self.logits, self.seed, owner.kappa, owner.tau
            )
        return masked.T if self.turned else masked


class TwoFourMasks:
    """The masks of a model that `attach_two_four` put on it.

    `mode` says what a forward sees: `sample`, a soft mask drawn by `draw`; `hard`, the most likely
    candidate of each group; `off`, the dense weights. Weights stay frozen throughout.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device | None = None) -> None:
        self.mode = "sample"
        self.modules: dict[str, Linear] = prunable(model)
        device = device or next(model.parameters()).device
        self.kappa = torch.tensor(1.0, device=device)
        self.tau = torch.tensor(1.0, device=device)
        numbers = torch.arange(len(self.modules), dtype=torch.int64)
        # The high half of a Philox key names the run and the weight, the low half the draw.
        self._streams = ((seed % 32_768 * 65_536 + numbers) << 32).to(device)
        self._seeds = self._streams.clone()
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._last: dict[str, torch.Tensor] = {}

    def _parts(self) -> Iterator[tuple[str, _Masked]]:
        for name, module in self.modules.items():
            part = module.get_submodule("parametrizations.weight.0")
            assert isinstance(part, _Masked)
            yield name, part

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The logits (6, O, I / 4) float32, by the name of their linear in the stock model."""
        return {name: part.logits for name, part in self._parts()}

    def parameters(self) -> list[nn.Parameter]:
        """All logits."""
        return list(self.named_parameters().values())

    def schedule(self, kappa: float, tau: float) -> None:
        """Set the scale of the logits and the temperature of the samples to come."""
        self.kappa.fill_(kappa)
        self.tau.fill_(tau)

    def draw(self, number: int) -> None:
        """Choose the noise of the samples to come; each forward of a run needs a new number."""
        torch.add(self._streams, number % 2**32, out=self._seeds)

    @contextlib.contextmanager
    def seen_as(self, mode: str) -> Iterator[None]:
        """Let forwards see `sample`, `hard` or `off` within the context.

        Raises:
            ValueError: another mode.
        """
        require_choice("mode", mode, SEEN_AS)
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def kept_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over weights of ||W m||, sum of ||W m||^2) of the last forward; 0-dim float32."""
        squares = torch.stack([part.norm_sq for _, part in self._parts()])
        # The gradient of sqrt is infinite at 0, where a weight is all zeros.
        norms = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
        return norms.sum(), squares.sum()

    @torch.no_grad()
    def dense_norm(self) -> torch.Tensor:
        """Sum over weights of ||W||; 0-dim float32."""
        norms = [
            whole(module.get_parameter("parametrizations.weight.original").float().norm())
            for module in self.modules.values()
        ]
        return torch.stack(norms).sum()

    @torch.no_grad()
    def choice(self) -> dict[str, torch.Tensor]:
        """The masks: of each group the candidate of the largest logit; (O, I) bool by name.

        With sharded logits every process must call it; rank 0 gets the masks, on the CPU, the
        others an empty dict.
        """
        chosen = {}
        for name, part in self._parts():
            mask = mask_of(whole(part.logits).argmax(0))
            if not isinstance(part.logits, DTensor):
                chosen[name] = mask
            elif rank() == 0:
                chosen[name] = mask.cpu()
        return chosen

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """How settled the masks are; synchronises with the device.

        Returns:
            max_prob: mean over groups of the largest of softmax(kappa pi / tau).
            changed: share of groups whose choice differs from the last call's; 0 at the first.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.kappa.device)
        for name, part in self._parts():
            largest, best = (own_part(part.logits) * (self.kappa / self.tau)).softmax(0).max(0)
            best = best.to(torch.uint8)
            before = self._last.get(name, best)
            parts = largest.sum(dtype=torch.float64), (best != before).sum(), best.numel()
            totals += torch.stack([torch.as_tensor(n, device=totals.device) for n in parts])
            self._last[name] = best
        if any(isinstance(p, DTensor) for p in self.parameters()):
            torch.distributed.all_reduce(totals)
        total, changed, groups = totals.tolist()
        return {"max_prob": total / max(groups, 1), "changed": changed / max(groups, 1)}

    def detach(self) -> None:
        """Remove the masks and restore the model."""
        for module in self.modules.values():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for p in self._trained:
            p.requires_grad_(True)


@torch.no_grad()
def start_logits(
    shape: tuple[int, ...],
    prior: torch.Tensor | None,
    *,
    std: float,
    strength: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """pi ~ N(0, std^2), plus strength * std(pi) * (<M0, candidate> - 1) with a prior M0.

    The overlap <M0, candidate> is 0, 1 or 2, on average 1. A prior does not decide the choice:
    with strength 3 about one group in twenty starts with another candidate.

    Args:
        shape: (O, I) of the weight.
        prior: M0 (O, I) bool, 2:4; or None.

    Returns:
        (6, O, I / 4) float32.

    Source: MaskLLM, arXiv 2409.17481, section 3.3, the mask prior.
    """
    rows, groups = shape[0], shape[1] // 4
    pi = torch.empty(6, rows, groups).normal_(0.0, std, generator=generator)
    if prior is not None and pi.numel():
        M0 = prior.cpu().view(rows, groups, 4).float()
        overlap = torch.einsum("oji,ki->koj", M0, CANDIDATES.float())
        pi += (overlap - 1.0) * (strength * pi.std())
    return pi


def attach_two_four(
    model: nn.Module,
    prior: dict[str, torch.Tensor] | None = None,
    *,
    strength: float = 8.0,
    std: float = 0.01,
    seed: int = 0,
    sharder: Sharder | None = None,
) -> TwoFourMasks:
    """Put learnable 2:4 masks on every linear of the blocks, and freeze the weights.

    Train `masks.parameters()`; before each forward call `masks.schedule` and `masks.draw`. The
    masks join the model as torch parametrizations of its weights, so compile, checkpointing and
    autocast see ordinary linears.

    Args:
        model: transformers causal LM of a known family, without adapters.
        prior: (O, I) bool masks by name, as `one_shot_masks` gives them; None: no prior.
        strength, std: see `start_logits`.
        seed: of the logits, and of the samples.
        sharder: spreads each block over the processes of a run as soon as its masks are on it, so
            that none ever holds all logits.

    Returns:
        TwoFourMasks, in mode `sample`.

    Raises:
        TypeError: not a transformers causal LM.
        ValueError: an unknown family, a width that 4 does not divide, a prior of other weights.
        RuntimeError: the model has masks of any kind or adapters already.

    Source: MaskLLM, arXiv 2409.17481, section 3.2.
    """
    if stock_model(model) is not model:
        raise RuntimeError("the model has adapters; merge them first: model.merge_and_unload()")
    if hasattr(model, "maskprune"):
        raise RuntimeError("the model has masks of attach_masks; call their detach() first")
    require_causal_lm(model)
    masks = TwoFourMasks(model, seed, sharder.device if sharder else None)
    if any(parametrize.is_parametrized(m, "weight") for m in masks.modules.values()):
        raise RuntimeError("the model has 2:4 masks already; call their detach() first")
    shapes = {name: tuple(oriented(m).shape) for name, m in masks.modules.items()}
    if prior is not None:
        given = {name: tuple(mask.shape) for name, mask in prior.items()}
        if given != shapes:
            name = next(n for n in [*shapes, *given] if shapes.get(n) != given.get(n))
            raise ValueError(
                f"the prior has {given.get(name, 'nothing')} for {name}, the model "
                f"{shapes.get(name, 'no such weight')}; use masks that were made on this model"
            )
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    waiting = list(layers_of(model))
    for index, (name, module) in enumerate(masks.modules.items()):
        if sharder is not None and module not in set(waiting[0].modules()):
            sharder.block(waiting.pop(0))
        pi = start_logits(
            shapes[name],
            None if prior is None else prior[name],
            std=std,
            strength=strength,
            generator=generator,
        ).to(masks.kappa.device)
        part = _Masked(pi, masks._seeds[index], masks, turned=not isinstance(module, nn.Linear))
        parametrize.register_parametrization(module, "weight", part, unsafe=True)
    if sharder is not None:
        for block in waiting:
            sharder.block(block)
        sharder.rest(model)
    return masks
