"""Least-squares adapters that let the units that stay take over from the pruned ones.

Training starts from them; the paper leaves all recovery to training. This is Optimal Brain
Surgeon's correction (Hassibi and Stork, NeurIPS 1992) for a whole set of input columns at once, cut
to the rank of the adapter, so that the base weights, and with them the teacher, stay unchanged.
Letters: W (O, I) an output matrix, X (I, n) its inputs, m (I,) the masks of its input channels,
H = X X^T, K the channels that stay, D (O, I) the change of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from maskprune.hf.families import FAMILIES, attention_output, ffn_output, layers_of
from maskprune.structured.cuts import query_head_mask
from maskprune.structured.distill import teacher_mode
from maskprune.structured.masks import Masks
from maskprune.structured.saliency import Grams, Place, batches, observe
from maskprune.training.activations import add_gram, damped_factors
from maskprune.training.distributed import least, sum_shares, world_size
from maskprune.training.layer_by_layer import free_bytes
from maskprune.training.progress import Report
from maskprune.training.sharding import set_whole, whole

# Limit of all H held at once; further layers take another pass over the calibration text.
GRAM_BYTES = 4 * 2**30
RIDGE = 0.01


def low_rank_compensation(
    W: torch.Tensor, H: torch.Tensor, m: torch.Tensor, rank: int, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors B A of the D with which the masked matrix best reproduces the outputs of W.

    D minimises || W X - (W + D) diag(m) X ||^2 + ridge ||D||^2, and B A is the best approximation
    of that rank to D diag(m) X. The problem is solved in float64.

    Args:
        W: (O, I) weight.
        H: (I, I) sum over tokens of x x^T.
        m: (I,) in [0, 1], 0 for pruned channels.
        rank: r.
        ridge: in units of the mean of H's diagonal over the channels that stay.

    Returns:
        A (k, I), zero in the columns of pruned channels, and B (O, k), float64; rows of A and
        columns of B have equal norms. k is r, or less where the rank of D is lower.

    Raises:
        ValueError: H is not finite.
    """
    W, H, m = W.double(), H.double(), m.double()
    if not torch.isfinite(H).all():
        raise ValueError(
            "the activations on the calibration text are not finite; the model overflows in this "
            "dtype: load it in float32 (--dtype float32), or start again with --no-compensate"
        )
    K = m.nonzero()[:, 0]
    H_K = m[K, None] * H[K][:, K] * m[K]
    mean = H_K.diagonal().mean() if len(K) else H.new_zeros(())
    if not mean:
        return W.new_zeros(0, W.shape[1]), W.new_zeros(W.shape[0], 0)
    factor = next(L for L in damped_factors(H_K, ridge * mean) if L is not None)
    D = torch.cholesky_solve(m[K, None] * (H[K] @ (W * (1 - m)).T), factor).T
    # The best rank-r part of D sqrt(H_K) is its projection on the leading left singular vectors.
    energy, U = torch.linalg.eigh(D @ H_K @ D.T)
    nonzero = energy > torch.finfo(H.dtype).eps * len(energy) * energy.max()
    U = U[:, nonzero].flip(1)[:, :rank]
    # The sign of an eigenvector depends on rounding, and so on how many ranks summed H.
    U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    part = U.T @ D
    norm = part.norm(dim=1).sqrt()
    A = W.new_zeros(U.shape[1], W.shape[1])
    A[:, K] = part / norm[:, None]
    return A, U * norm


@torch.no_grad()
def compensate(
    model: nn.Module,
    masks: Masks,
    kept: tuple[torch.Tensor, torch.Tensor],
    blocks: torch.Tensor,
    progress: Report | None = None,
    *,
    summed: Grams | None = None,
    device: torch.device | None = None,
) -> list[nn.Parameter]:
    """Reset the adapters of W_O and W_down to compensate for the units that `kept` prunes.

    Matrices without an adapter, and those whose channels all stay at 1, are left as they are.

    Args:
        model: the PEFT model under its masks.
        kept: the masks of heads and FFN units, 0 for pruned units, in the shapes of
            `masks.head` and `masks.ffn`.
        blocks: (n, T) token ids on the model's device; n may be 0 with `summed`.
        progress: called with (batches done, batches in all); with a device with blocks of the
            model.
        summed: H over text that `one_shot` has read, to which that of `blocks` is added; used up.
        device: compute there, a block of the model at a time, the model staying where it is (see
            `training.layer_by_layer.Walk`): its H are summed and its adapters set in its one turn,
            so that no more than one block's are held. Same results, to the bit, as with the whole
            model on the device.

    Returns:
        The parameters that were set; their optimizer state no longer applies.

    Raises:
        ValueError: activations that are not finite.
    """
    family, shape = FAMILIES[masks.family], masks.shape
    channels: dict[Place, torch.Tensor] = {}
    modules: dict[Place, nn.Module] = {}
    heads = query_head_mask(kept[0], shape, masks.head_unit) if kept[0].numel() else None
    for layer, block in enumerate(layers_of(model)):
        if heads is not None:
            channels["head", layer] = heads[layer].repeat_interleave(shape.head_dim)
            modules["head", layer] = attention_output(block, family)
        channels["ffn", layer] = kept[1][layer]
        modules["ffn", layer] = ffn_output(block, family)
    todo = [
        place
        for place, m in channels.items()
        if bool((m != 1).any()) and hasattr(modules[place], "lora_A")
    ]
    changed: list[nn.Parameter] = []
    if todo and (summed or device is not None):
        groups = [todo]
    else:
        groups = _groups(todo, channels, _gram_bytes(blocks.device))
    for number, places in enumerate(groups):
        said = progress if device is None else None
        parts = batches(blocks, said, number, len(groups)) if len(blocks) else []
        targets = {place: (modules[place], channels[place]) for place in places}
        changed += _fit(model, masks, targets, blocks, parts, summed, device, progress)
    if summed:
        summed.clear()
    return changed


def shared_grams(masks: Masks) -> Grams | None:
    """Where `one_shot` puts every H while it ranks; None where they do not fit at once."""
    family = FAMILIES[masks.family]
    widths = [masks.shape.ffn] + [masks.shape.heads * masks.shape.head_dim] * family.prunes_heads
    of_all = 4 * masks.shape.layers * sum(width**2 for width in widths)
    return {} if of_all <= _gram_bytes(masks.ffn.device) else None


def _groups(
    places: list[Place], channels: dict[Place, torch.Tensor], limit: int
) -> list[list[Place]]:
    """Groups for one pass each: places whose H fit into `limit` bytes together, or a single one."""
    groups: list[list[Place]] = []
    held = limit
    for place in places:
        size = 4 * len(channels[place]) ** 2
        if held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += size
    return groups


def _gram_bytes(device: torch.device) -> int:
    """Bytes for all H held at once; on CUDA the solver needs about eight times one H besides.

    One number for all ranks: each must sum the same H in the same passes.
    """
    return least(min(GRAM_BYTES, free_bytes(device) // 8), device)


def _fit(
    model: nn.Module,
    masks: Masks,
    targets: dict[Place, tuple[Any, torch.Tensor]],
    blocks: torch.Tensor,
    parts: Iterable[torch.Tensor],
    summed: Grams | None,
    device: torch.device | None,
    progress: Report | None,
) -> list[nn.Parameter]:
    """Sum H of each target, float32, from the dense model on `parts` (B, T), and compensate."""
    family = FAMILIES[masks.family]
    grams: Grams = {}
    changed: list[nn.Parameter] = []

    def see(kind: str, layer: int, module: nn.Module, x: torch.Tensor, g: object) -> None:
        if (kind, layer) in targets:
            grams[kind, layer] = add_gram(grams.get((kind, layer)), x)

    def of(layer: int) -> list[Place]:
        return [place for place in targets if place[1] == layer]

    def done(layer: int) -> None:
        for place in of(layer):
            module, m = targets[place]
            H = grams.pop(place, None)
            if H is not None:
                sum_shares(blocks, H)
            if summed:
                earlier = summed.pop(place).to(module.base_layer.weight.device)
                H = earlier if H is None else earlier.add_(H)
            assert H is not None
            changed.extend(_start(module, H, m.to(H.device), family.transposed))

    def adapters(layer: int) -> list[nn.Parameter]:
        return [p for place in of(layer) for pair in _adapters(targets[place][0]) for p in pair[1:]]

    with teacher_mode(model, masks):
        observe(model, family, see, parts, done, device=device, progress=progress, keep=adapters)
    return changed


def _adapters(module: Any) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """Name, A and B of each active adapter of a PEFT LoRA layer."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    return [(name, module.lora_A[name].weight, module.lora_B[name].weight) for name in names]


def _start(
    module: Any, H: torch.Tensor, m: torch.Tensor, transposed: bool
) -> Iterator[nn.Parameter]:
    """Put the compensation into the first active adapter of a PEFT LoRA layer, 0 into others."""
    weight = whole(module.base_layer.weight)
    for number, (name, *parameters) in enumerate(_adapters(module)):
        a, b = (whole(p.detach()).clone() for p in parameters)
        # Ranks that are not needed start as in a new adapter: A random, B zero.
        b.zero_()
        if number == 0:
            A, B = low_rank_compensation(weight.T if transposed else weight, H, m, a.shape[0])
            a[: A.shape[0]] = A
            b[:, : A.shape[0]] = B / module.scaling[name]
        for p, value in zip(parameters, (a, b), strict=True):
            if world_size() > 1:
                # Every rank must go on from the same bits.
                torch.distributed.broadcast(value, 0)
            set_whole(p, value)
        yield from parameters
