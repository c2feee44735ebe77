"""2:4 sparsity: in every 4 consecutive weights along the input, 2 are zero."""

from maskprune.two_four.masks import TwoFourMasks, attach_two_four
from maskprune.two_four.matrices import sparsegpt, wanda_scores
from maskprune.two_four.one_shot import one_shot_masks
from maskprune.two_four.patterns import (
    CANDIDATES,
    apply_masks,
    candidate_of,
    hard_mask,
    is_masks_file,
    is_two_four,
    load_masks,
    mask_of,
    oriented,
    pack,
    prunable,
    save_masks,
    unpack,
)

__all__ = [
    "CANDIDATES",
    "TwoFourMasks",
    "apply_masks",
    "attach_two_four",
    "candidate_of",
    "hard_mask",
    "is_masks_file",
    "is_two_four",
    "load_masks",
    "mask_of",
    "one_shot_masks",
    "oriented",
    "pack",
    "prunable",
    "save_masks",
    "sparsegpt",
    "unpack",
    "wanda_scores",
]
