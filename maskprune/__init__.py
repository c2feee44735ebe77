"""maskprune: structured and 2:4 pruning that gives back a stock, proven checkpoint.

Names are loaded on first use, so that the command line answers `--help` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from maskprune.version import __version__

if TYPE_CHECKING:
    from maskprune import ops
    from maskprune.budget import Budget
    from maskprune.callbacks import PruneCallback
    from maskprune.config import PruneConfig, SparsifyConfig
    from maskprune.exporter import export
    from maskprune.masks import Masks, attach_masks, load_masks
    from maskprune.minimax import Minimax
    from maskprune.semistructured.learn import SparsifyResult, sparsify
    from maskprune.streaming import export_checkpoint
    from maskprune.training import PruneResult, prune

_HOMES = {
    "Budget": "budget",
    "Masks": "masks",
    "Minimax": "minimax",
    "PruneCallback": "callbacks",
    "PruneConfig": "config",
    "PruneResult": "training",
    "SparsifyConfig": "config",
    "SparsifyResult": "semistructured.learn",
    "attach_masks": "masks",
    "export": "exporter",
    "export_checkpoint": "streaming",
    "load_masks": "masks",
    "prune": "training",
    "sparsify": "semistructured.learn",
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
