"""Pruned checkpoints in the engines that people use: what loads, agrees, and how fast it runs."""
