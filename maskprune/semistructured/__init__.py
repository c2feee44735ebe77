"""2:4 sparsity: in every 4 consecutive weights along the input, 2 are zero."""

from maskprune.semistructured.masks import TwoFourMasks, attach_two_four
from maskprune.semistructured.matrices import sparsegpt, wanda_scores
from maskprune.semistructured.oneshot import METHODS, one_shot_masks
from maskprune.semistructured.patterns import (
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
    "METHODS",
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
