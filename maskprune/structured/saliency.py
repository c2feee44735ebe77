"""Starting masks from a one-shot ranking: short runs choose poorly when every mask starts at 1.

Not in the paper, whose masks start at 1; `--warm-start none` is the paper's run. Letters: m masks,
rho saliency per weight freed, a a kind's share of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

from maskprune.choices import WARM_STARTS, require_choice
from maskprune.hf.families import (
    FAMILIES,
    Family,
    attention_output,
    ffn_output,
    layers_of,
    stock_model,
)
from maskprune.structured.budget import Budget, Split
from maskprune.structured.masks import Masks
from maskprune.training.activations import add_gram, add_squares
from maskprune.training.distributed import own_batches, sum_shares
from maskprune.training.layer_by_layer import Walk
from maskprune.training.progress import Report
from maskprune.training.sharding import is_sharded, whole

Saliency = tuple[torch.Tensor, torch.Tensor]
# The kind, "head" or "ffn", and the layer of a W_O or W_down; the sum over tokens of its x x^T.
Place = tuple[str, int]
Grams = dict[Place, torch.Tensor]


def _outputs(layer: nn.Module, family: Family) -> dict[str, nn.Module]:
    """W_down of a block by kind, and W_O where heads can go."""
    outputs = {"ffn": ffn_output(layer, family)}
    if family.prunes_heads:
        outputs["head"] = attention_output(layer, family)
    return outputs


class Observer:
    """Hooks that call see(kind, layer, module, x, g) with each input x of W_O and W_down.

    g is the gradient of x, in the backward pass; None where gradients are off.
    """

    def __init__(self, model: nn.Module, family: Family, see: Callable[..., None]) -> None:
        self.handles = []
        for index, layer in enumerate(layers_of(model)):
            for kind, module in _outputs(layer, family).items():
                hook = self._hook(kind, index, see)
                self.handles.append(module.register_forward_pre_hook(hook))

    @staticmethod
    def _hook(kind: str, index: int, see: Callable[..., None]) -> Callable[..., object]:
        def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> object:
            x = args[0]
            if not torch.is_grad_enabled():
                see(kind, index, module, x.detach(), None)
                return None
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            # A hook that held x itself would never be freed: no collector sees that cycle.
            value = x.detach()
            x.register_hook(lambda g: see(kind, index, module, value, g))
            return (x, *args[1:])

        return watch

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def observe(
    model: nn.Module,
    family: Family,
    see: Callable[..., None],
    parts: Iterable[torch.Tensor],
    done: Callable[[int], None],
    *,
    device: torch.device | None = None,
    progress: Report | None = None,
    keep: Callable[[int], Iterable[torch.Tensor]] = lambda _: (),
) -> None:
    """Run a model on `parts` (B, T), showing `see` what an `Observer` does; without gradients.

    Args:
        done: called with each layer's number when all of its inputs have been seen; with a
            device in the block's turn, while it is there.
        device: compute there, a block at a time: see `Walk`, and there for the progress.
        keep: parameters of a layer that `done` changes.
    """
    if device is None:
        with Observer(model, family, see):
            for ids in parts:
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for layer in range(len(layers_of(model))):
            done(layer)
        return
    walk = Walk(model, parts, device, progress=progress)
    with Observer(model, family, see):
        for layer in range(len(walk.layers)):
            with walk.turn(layer, keep(layer)):
                walk.run(layer, replace=True)
                done(layer)


def _add_gram(grams: Grams | None, place: Place, module: nn.Module, x: torch.Tensor) -> None:
    """Add x x^T of a module that has an adapter, and so may be compensated."""
    if grams is not None and hasattr(module, "lora_A"):
        grams[place] = add_gram(grams.get(place), x)


def _settle(grams: Grams | None, layer: int, blocks: torch.Tensor, home: torch.device) -> None:
    """A layer's sums over all ranks, where they wait for the compensation."""
    for place in sorted(grams or ()):
        if grams is not None and place[1] == layer:
            sum_shares(blocks, grams[place])
            grams[place] = grams[place].to(home)


# A step's logits are the largest thing in memory: vocabulary x tokens x 4 bytes, several times.
TOKENS_AT_ONCE = 512


def batches(
    blocks: torch.Tensor, progress: Report | None = None, earlier: int = 0, passes: int = 1
) -> Iterator[torch.Tensor]:
    """This rank's share of `blocks` (n, T), about `TOKENS_AT_ONCE` tokens at once.

    For the progress, `earlier` of `passes` passes over the blocks are done.
    """
    parts = own_batches(blocks, max(1, TOKENS_AT_ONCE // blocks.shape[1]))
    for done, ids in enumerate(parts, start=1 + earlier * len(parts)):
        yield ids
        if progress is not None:
            progress(done, passes * len(parts))


def taylor(
    model: nn.Module,
    masks: Masks,
    blocks: torch.Tensor,
    progress: Report | None = None,
    *,
    per_sequence: bool = False,
    seed: int = 0,
    grams: Grams | None = None,
    device: torch.device | None = None,
) -> Saliency:
    """Second-order saliency of removing a unit, from the diagonal Fisher information of its mask.

    At masks of 1 the distillation loss is flat and its Hessian is the Fisher information, so
    removing unit i costs about F_i / 2 with F_i = sum over tokens of (dL/dh_i * h_i)^2, h_i the
    unit's activation and L the language-model loss summed over tokens. That leaves out what a
    mask does to several tokens at once. With `per_sequence` it is the Fisher information itself,
    estimated with one draw a sequence: F_i = sum over sequences of (sum over tokens of
    dL/dh_i * h_i)^2, where L has labels drawn from the model's own distribution, and the query
    heads of a KV group that is one unit are added up before squaring.

    Args:
        blocks: (n, T) token ids on the model's device.
        progress: called with (batches done, batches in all); with a device with turns of blocks.
        seed: of the labels drawn with `per_sequence`.
        grams: gets the sums that `compensate` takes, from the same pass.
        device: compute there, a block of the model at a time, the model staying where it is (see
            `training.layer_by_layer.Walk`): each block's weights travel twice, once to run up to
            the logits and once to run again from its input, kept, and back. All blocks' inputs
            are held at once. Same results, to the bit, as with the whole model on the device.

    Returns:
        head (L, H) per query head (with `per_sequence` and `kv_group` units each head has an
        equal part of its group's), ffn (L, F), float32; comparable with each other.
    """
    base = stock_model(model)
    family, shape = FAMILIES[masks.family], masks.shape
    home = blocks.device
    computing = home if device is None else device
    head = torch.zeros(shape.layers, shape.heads, device=computing)
    ffn = torch.zeros(shape.layers, shape.ffn, device=computing)

    def see(kind: str, layer: int, module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> None:
        _add_gram(grams, (kind, layer), module, x)
        salience = x.float() * g.float()
        if kind == "head":
            salience = salience.unflatten(-1, (shape.heads, shape.head_dim)).sum(-1)
        if per_sequence:
            # OPT's FFN sees all tokens of a batch in one axis.
            sequences = salience.unflatten(0, (-1, blocks.shape[1])) if x.dim() == 2 else salience
            salience = sequences.sum(1)
        if kind == "head" and per_sequence and masks.head_unit == "kv_group":
            group = shape.heads // shape.kv_heads
            of_group = salience.unflatten(-1, (shape.kv_heads, group)).sum(-1)
            salience = (of_group / group**0.5).repeat_interleave(group, dim=-1)
        (head if kind == "head" else ffn)[layer] += salience.pow(2).flatten(0, -2).sum(0)

    generator = torch.Generator(computing).manual_seed(seed)

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if per_sequence:
            labels = torch.multinomial(
                logits.detach().flatten(0, 1).float().softmax(-1), 1, generator=generator
            )[:, 0]
        else:
            logits, labels = logits[:, :-1], ids[:, 1:].flatten()
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")

    def done(layer: int) -> None:
        _settle(grams, layer, blocks, home)

    training = model.training
    trained = [p for p in model.parameters() if p.requires_grad]
    # FSDP2 does not support a later change of requires_grad.
    frozen = [] if is_sharded(model) else trained
    for p in frozen:
        p.requires_grad_(False)
    model.eval()
    try:
        with torch.enable_grad(), masks.off():
            if device is not None:
                depths, parts = shape.layers + 2, batches(blocks)
                walk = Walk(model, parts, device, depths=depths, progress=progress, passes=2)
                inputs = walk.up()
                gradients = walk.top(loss)
                with Observer(model, family, see):
                    walk.down(inputs, gradients, done)
            else:
                with Observer(model, family, see):
                    for ids in batches(blocks, progress):
                        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
                        logits = model(inputs_embeds=embedded, use_cache=False).logits
                        loss(logits, ids).backward()
                for layer in range(shape.layers):
                    done(layer)
    finally:
        model.train(training)
        for p in frozen:
            p.requires_grad_(True)
        for p in trained:
            p.grad = None
    sum_shares(blocks, head, ffn)
    return head.to(home), ffn.to(home)


@torch.no_grad()
def wanda_sp(
    model: nn.Module,
    masks: Masks,
    blocks: torch.Tensor,
    progress: Report | None = None,
    *,
    grams: Grams | None = None,
    device: torch.device | None = None,
) -> Saliency:
    """Wanda-sp's saliency: mean over rows of |W_ij| ||x_j||_2, summed over a head's columns.

    Scores W_O's columns for heads and W_down's for FFN units (FLAP's baseline of that name), from
    the unpruned model's activations throughout. `grams` and `device` as in `taylor`, but that each
    block's weights travel once and its inputs replace those of the block before.

    Returns:
        head (L, H) per query head (0 where heads stay), ffn (L, F), float32;
        comparable within a row only.
    """
    family, shape = FAMILIES[masks.family], masks.shape
    squares: dict[tuple[str, int], torch.Tensor] = {}

    def see(
        kind: str, layer: int, module: nn.Module, x: torch.Tensor, g: torch.Tensor | None
    ) -> None:
        _add_gram(grams, (kind, layer), module, x)
        squares[kind, layer] = add_squares(squares.get((kind, layer)), x)

    head = torch.zeros(shape.layers, shape.heads, device=blocks.device)
    ffn = torch.zeros(shape.layers, shape.ffn, device=blocks.device)

    def done(layer: int) -> None:
        for kind, module in _outputs(layers[layer], family).items():
            total = squares.pop((kind, layer))
            sum_shares(blocks, total)
            weight = getattr(module, "base_layer", module).get_parameter("weight")
            columns = whole(weight).float().abs().mean(1 if family.transposed else 0)
            score = columns * total.sqrt()
            if kind == "head":
                head[layer] = score.view(shape.heads, shape.head_dim).sum(1)
            else:
                ffn[layer] = score
        _settle(grams, layer, blocks, blocks.device)

    layers = layers_of(model)
    training = model.training
    model.eval()
    try:
        with masks.off():
            parts = batches(blocks, progress if device is None else None)
            observe(model, family, see, parts, done, device=device, progress=progress)
    finally:
        model.train(training)
    return head, ffn


def unit_saliency(head: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Saliency per head unit, in the shape of `masks.head`, from (L, H) per query head."""
    shape = masks.shape
    groups = head.view(shape.layers, shape.kv_heads, -1)
    if masks.head_unit == "kv_group":
        return groups.sum(-1)
    return groups.flatten(0, 1)


@torch.no_grad()
def start_masks(
    masks: Masks,
    budget: Budget,
    saliency: Saliency,
    *,
    low: float = 0.5,
    candidates: float = 1.5,
    across_kinds: bool = True,
) -> None:
    """Set each mask to low + (1 - low) * min(1, g / (candidates * sparsity)).

    g is the unit's place in the order of saliency per weight freed, as a share of the prunable
    weights: of both kinds if their saliencies are comparable (`across_kinds`), else of its own.
    Rows are summed by rank first, since every row loses the same number. So the least salient units
    start lowest, units far from the budget start at exactly 1 and leave the model as it is, and
    the price m^2_next that the solver compares between heads and FFN means the same in both.

    Args:
        saliency: per query head (L, H), per FFN unit (L, F).
        low: mask of the least salient unit.
        candidates: multiple of the sparsity up to which units start below 1.
    """
    kinds = []
    if masks.head.numel():
        freed = budget.a_head / budget.head_units
        kinds.append((masks.head, unit_saliency(saliency[0], masks), freed))
    kinds.append((masks.ffn, saliency[1], budget.a_ffn / budget.ffn_units))
    # The sum over rows of the j-th smallest: what pruning one more unit everywhere would cost.
    curves = [rho.sort(dim=1).values.sum(0) / freed for _, rho, freed in kinds]
    reach = candidates * budget.sparsity
    for number, (m, rho, _) in enumerate(kinds):
        others = range(len(kinds)) if across_kinds else (number,)
        g = torch.zeros_like(curves[number])
        for other in others:
            _, _, freed = kinds[other]
            cheaper = torch.searchsorted(curves[other].contiguous(), curves[number], right=True)
            g += cheaper * freed
        if not across_kinds:
            g /= kinds[number][2] * curves[number].numel()
        start = low + (1 - low) * (g / reach).clamp(max=1.0)
        m.copy_(start[rho.argsort(dim=1, stable=True).argsort(dim=1)])


def nearest_equal(budget: Budget) -> Split:
    """The legal split that is nearest to equal fractions of both kinds, as Wanda-sp prunes."""
    r = budget.sparsity / (budget.a_head + budget.a_ffn)

    def away(split: Split) -> float:
        heads = split.head / budget.head_units if budget.head_units else r
        ffn = split.ffn / budget.ffn_units
        return budget.a_head * abs(heads - r) + budget.a_ffn * abs(ffn - r)

    return min(budget.splits, key=away)


def cheapest(masks: Masks, budget: Budget, saliency: Saliency) -> Split:
    """The legal split whose least salient units add up to the least saliency over all rows.

    For saliencies that are comparable between heads and FFN.
    """
    kinds = (unit_saliency(saliency[0], masks), saliency[1])
    lost = [functional.pad(rho.sort(dim=1).values.cumsum(1).sum(0), (1, 0)) for rho in kinds]
    costs = [lost[0][s.head] * bool(budget.head_units) + lost[1][s.ffn] for s in budget.splits]
    return budget.splits[int(torch.stack(costs).argmin())]


@torch.no_grad()
def one_shot(
    kind: str,
    model: nn.Module,
    masks: Masks,
    budget: Budget,
    blocks: torch.Tensor,
    progress: Report | None = None,
    *,
    grams: Grams | None = None,
    device: torch.device | None = None,
) -> Split:
    """Set the least salient units of every row to 0 and all others to 1; returns the split.

    `taylor` takes its `cheapest` split; `wanda-sp` and `random` (torch's own generator, no text)
    take the split nearest to equal fractions of both kinds. `grams`, where given, gets what
    `compensate` takes as `summed`, from the same pass; it stays empty with `random`. `device` as
    the ranking takes it.
    """
    if kind == "random":
        shape = masks.shape
        saliency = torch.rand(shape.layers, shape.heads), torch.rand(shape.layers, shape.ffn)
        saliency = saliency[0].to(masks.ffn.device), saliency[1].to(masks.ffn.device)
    else:
        rank = taylor if kind == "taylor" else wanda_sp
        saliency = rank(model, masks, blocks, progress, grams=grams, device=device)
    split = cheapest(masks, budget, saliency) if kind == "taylor" else nearest_equal(budget)
    ranked = [(masks.ffn, saliency[1], split.ffn)]
    if masks.head.numel():
        ranked.append((masks.head, unit_saliency(saliency[0], masks), split.head))
    for m, rho, n in ranked:
        m.fill_(1.0)
        m.scatter_(1, rho.argsort(dim=1, stable=True)[:, :n], 0.0)
    return split


def warm_start(
    kind: str,
    model: nn.Module,
    masks: Masks,
    budget: Budget,
    blocks: torch.Tensor,
    progress: Report | None = None,
    *,
    device: torch.device | None = None,
) -> None:
    """Set the masks to start from: `none` leaves them at 1, else `wanda-sp` or `taylor`.

    `device` as the ranking takes it.

    Raises:
        ValueError: an unknown kind.
    """
    require_choice("warm_start", kind, WARM_STARTS)
    if kind == "taylor":
        start_masks(masks, budget, taylor(model, masks, blocks, progress, device=device))
    elif kind == "wanda-sp":
        saliency = wanda_sp(model, masks, blocks, progress, device=device)
        start_masks(masks, budget, saliency, across_kinds=False)
