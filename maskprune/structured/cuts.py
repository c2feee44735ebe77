"""Masks to cuts: for each weight of a layer, which rows or columns stay and how they are scaled.

Both exporters, the one in memory and the streaming one, read this one table, so that they write
the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskprune.choices import HEAD_UNITS, require_choice
from maskprune.hf.families import Family
from maskprune.hf.shape import Shape


@dataclass(frozen=True)
class Cut:
    """What happens to one tensor, whose dimension `dim` counts the pruned units.

    keep: (K,) int64 ascending, the indices that stay along `dim`.
    scale: (size of dim,) float32, the mask to fold along `dim` (indexed before the cut), or None.
    source: the tensor it is cut from, where that has another name (a fused projection).
    """

    dim: int
    keep: torch.Tensor
    scale: torch.Tensor | None = None
    source: str | None = None


def mask_rows(shape: Shape, head_unit: str) -> tuple[int, int]:
    """Rows and units of the head mask: (L, G) for `kv_group`, (L * G, q) for `query_head`."""
    require_choice("head_unit", head_unit, HEAD_UNITS)
    if head_unit == "kv_group":
        return shape.layers, shape.kv_heads
    return shape.layers * shape.kv_heads, shape.heads // shape.kv_heads


def query_head_mask(head: torch.Tensor, shape: Shape, head_unit: str) -> torch.Tensor:
    """The mask of each query head, (L, H), from the head mask in its own units."""
    if head_unit == "kv_group":
        return head.repeat_interleave(shape.heads // shape.kv_heads, dim=1)
    return head.reshape(shape.layers, shape.heads)


def require_uniform(name: str, mask: torch.Tensor) -> int:
    """The number of units that every row keeps (mask != 0).

    Raises:
        ValueError: NaN or values outside [0, 1], rows that keep different counts, or none kept.
    """
    if not torch.isfinite(mask).all() or mask.numel() and (mask.min() < 0 or mask.max() > 1):
        raise ValueError(
            f"the {name} mask has NaN or values outside [0, 1]; expected a mask that training wrote"
        )
    kept = (mask != 0).sum(dim=1)
    if kept.min() != kept.max():
        raise ValueError(
            f"the {name} mask is not uniform: row {int(kept.argmin())} keeps {int(kept.min())} "
            f"units, row {int(kept.argmax())} keeps {int(kept.max())}; expected the same count in "
            "every row; finish the training run, whose last step makes them equal"
        )
    if kept.min() == 0:
        raise ValueError(f"the {name} mask keeps no unit; expected at least one in every row")
    return int(kept[0])


def pruned_shape(head: torch.Tensor, ffn: torch.Tensor, shape: Shape, head_unit: str) -> Shape:
    """The uniform shape that masks leave behind; refuses masks that are not uniform."""
    kept_ffn = require_uniform("FFN", ffn)
    heads, kv_heads = shape.heads, shape.kv_heads
    if head.numel():
        kept = require_uniform("head", head)
        if head_unit == "kv_group":
            heads, kv_heads = kept * (shape.heads // shape.kv_heads), kept
        else:
            heads = kept * shape.kv_heads
    return Shape(shape.layers, heads, kv_heads, shape.head_dim, kept_ffn)


def layer_cuts(
    family: Family,
    shape: Shape,
    head_unit: str,
    head: torch.Tensor | None,
    ffn: torch.Tensor,
    unfuse: Family | None = None,
) -> dict[str, Cut]:
    """The cuts of one layer by tensor name within it (`self_attn.q_proj.weight`, ...).

    Folds the head mask into the columns of W_O and the FFN mask into the columns of W_down:
    exact for the forward `(act(gate) * up * m) W_down`, for MHA and GQA, with or without biases.
    The paper (section 3.2) folds into W_V, W_gate and W_up, which is not exact.

    head: (H,) float32, the mask of each query head, or None where heads stay as they are.
    ffn: (F,) float32.
    unfuse: the family of the result, where it splits projections that `family` fuses.
    """
    cuts: dict[str, Cut] = {}
    # Conv1D keeps (in, out): rows and columns change places.
    row, column = (1, 0) if family.transposed else (0, 1)

    def add(module: str, dim: int, keep: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        cuts[f"{module}.weight"] = Cut(dim, keep, scale)
        if dim == row:
            cuts[f"{module}.bias"] = Cut(0, keep)

    def add_parts(
        module: str, fused: str, parts: tuple[str, ...], rows: list[torch.Tensor]
    ) -> None:
        """Rows of the parts of a fused projection: one tensor, or one for each part."""
        if unfuse is None:
            add(f"{module}{fused}", row, torch.cat(rows))
            return
        for part, kept in zip(parts, rows, strict=True):
            for leaf in ("weight", "bias"):
                cuts[f"{module}{part}.{leaf}"] = Cut(0, kept, source=f"{module}{fused}.{leaf}")

    keep_f = ffn.nonzero().flatten()
    prefix = f"{family.ffn}." if family.ffn else ""
    if family.fused:
        parts = unfuse.gate_up if unfuse else ()
        add_parts(prefix, family.gate_up[0], parts, [keep_f, keep_f + shape.ffn])
    else:
        for name in family.gate_up:
            add(f"{prefix}{name}", row, keep_f)
    add(f"{prefix}{family.down}", column, keep_f, ffn.float())

    if head is not None and family.prunes_heads:
        q = shape.heads // shape.kv_heads
        keep_h = head.nonzero().flatten()
        keep_g = (keep_h // q).unique() if head_unit == "kv_group" else torch.arange(shape.kv_heads)
        channels = torch.arange(shape.head_dim)
        q_rows = (keep_h[:, None] * shape.head_dim + channels).flatten()
        kv_rows = (keep_g[:, None] * shape.head_dim + channels).flatten()
        if family.fused_qkv:
            k_at = shape.heads * shape.head_dim
            v_at = k_at + shape.kv_heads * shape.head_dim
            rows = [q_rows, kv_rows + k_at, kv_rows + v_at]
            add_parts(f"{family.attention}.", family.qkv[0], unfuse.qkv if unfuse else (), rows)
        else:
            for name, kept in zip(family.qkv, (q_rows, kv_rows, kv_rows), strict=True):
                add(f"{family.attention}.{name}", row, kept)
        for name, kept in zip(family.head_norms, (keep_h, keep_g), strict=False):
            add(f"{family.attention}.{name}", 0, kept)
        scale = head.float().repeat_interleave(shape.head_dim)
        add(f"{family.attention}.{family.o}", column, q_rows, scale)
    return cuts
