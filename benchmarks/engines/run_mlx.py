"""MLX on a CPU through mlx-lm: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.engines.following import answer, follow


def load(folder: str) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    load_model(Path(folder))
    return {}


def compare(folder: str, reference: str) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt."""
    model, _ = load_model(Path(folder))
    cache: Any = None

    def feed(tokens: list[int], start: int) -> np.ndarray:
        nonlocal cache
        cache = cache if start else make_prompt_cache(model)
        logits = model(mx.array([tokens]), cache=cache)
        return np.array(logits[0, -1].astype(mx.float32))

    return follow(reference, feed)


if __name__ == "__main__":
    answer({"load": load, "compare": compare})
