"""2:4 sparsity: in every 4 consecutive weights along the input, 2 are zero."""

from maskprune.semistructured.patterns import (
    CANDIDATES,
    apply_masks,
    candidate_of,
    hard_mask,
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
    "apply_masks",
    "candidate_of",
    "hard_mask",
    "is_two_four",
    "load_masks",
    "mask_of",
    "oriented",
    "pack",
    "prunable",
    "save_masks",
    "unpack",
]
