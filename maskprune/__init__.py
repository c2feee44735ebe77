"""maskprune: structured pruning that gives back a stock, uniform, proven checkpoint."""

from maskprune.version import __version__

__all__ = ["__version__"]
