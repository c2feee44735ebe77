"""What short runs of `prune` on tiny models share: settings and text."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCAB

SHORT: dict[str, Any] = dict(
    sparsity=0.3,
    steps=24,
    batch_size=2,
    seq_len=16,
    warm_start_blocks=4,
    learning_rate=3e-3,
    logging_steps=4,
    autocast="none",
    multiple_of=4,
)


def data(n: int = 20) -> torch.Tensor:
    """(n, 16) token blocks."""
    return torch.randint(3, VOCAB, (n, 16), generator=torch.Generator().manual_seed(1))
