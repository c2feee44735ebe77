"""Operations with a plain-torch definition and faster backends; knows nothing of transformers."""

from maskprune.ops.fold import fold_columns, gather_rows
from maskprune.ops.gumbel_two_four import gumbel_two_four
from maskprune.ops.least_s_prox import LeastS, least_s_prox_
from maskprune.ops.linear_kl import linear_distillation, linear_kl
from maskprune.ops.masked_swiglu import masked_swiglu
from maskprune.ops.minimax_step import minimax_step_
from maskprune.ops.scale_heads import scale_heads

__all__ = [
    "LeastS",
    "fold_columns",
    "gather_rows",
    "gumbel_two_four",
    "least_s_prox_",
    "linear_distillation",
    "linear_kl",
    "masked_swiglu",
    "minimax_step_",
    "scale_heads",
]
