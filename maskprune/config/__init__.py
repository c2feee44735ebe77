"""The settings of each command: flat dataclasses that flags, YAML files and Python share.

Imports nothing heavy, so that `--help` answers at once.
"""

from maskprune.config.commands import (
    CheckConfig,
    ConvertConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PruneFiles,
    ReportConfig,
    RunFiles,
    SparsifyFiles,
)
from maskprune.config.prune import ADAPTER_RATE, PruneConfig
from maskprune.config.run import BudgetConfig, RunConfig
from maskprune.config.sparsify import SparsifyConfig

__all__ = [
    "ADAPTER_RATE",
    "BudgetConfig",
    "CheckConfig",
    "ConvertConfig",
    "EvalConfig",
    "ExportConfig",
    "PlanConfig",
    "PruneConfig",
    "PruneFiles",
    "ReportConfig",
    "RunConfig",
    "RunFiles",
    "SparsifyConfig",
    "SparsifyFiles",
]
