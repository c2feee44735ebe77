"""maskprune: structured and 2:4 pruning that returns a stock, proven checkpoint.

Names are loaded on first use, so that the command line answers `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from maskprune.version import __version__

if TYPE_CHECKING:
    from maskprune import ops
    from maskprune.config import PruneConfig, SparsifyConfig
    from maskprune.streaming.export import export_checkpoint
    from maskprune.structured.budget import Budget
    from maskprune.structured.callbacks import PruneCallback
    from maskprune.structured.export import export
    from maskprune.structured.masks import Masks, attach_masks, load_masks
    from maskprune.structured.minimax import Minimax
    from maskprune.structured.prune import PruneResult, prune
    from maskprune.two_four.sparsify import SparsifyResult, sparsify

_HOMES = {
    "Budget": "structured.budget",
    "Masks": "structured.masks",
    "Minimax": "structured.minimax",
    "PruneCallback": "structured.callbacks",
    "PruneConfig": "config",
    "PruneResult": "structured.prune",
    "SparsifyConfig": "config",
    "SparsifyResult": "two_four.sparsify",
    "attach_masks": "structured.masks",
    "export": "structured.export",
    "export_checkpoint": "streaming.export",
    "load_masks": "structured.masks",
    "prune": "structured.prune",
    "sparsify": "two_four.sparsify",
}

__all__ = [
    "Budget",
    "Masks",
    "Minimax",
    "PruneCallback",
    "PruneConfig",
    "PruneResult",
    "SparsifyConfig",
    "SparsifyResult",
    "__version__",
    "attach_masks",
    "export",
    "export_checkpoint",
    "load_masks",
    "ops",
    "prune",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("maskprune.ops")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"maskprune.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'maskprune' has no attribute {name!r}")
