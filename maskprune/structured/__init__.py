"""Pruning heads and FFN units: MaskPrune and one-shot baselines."""
