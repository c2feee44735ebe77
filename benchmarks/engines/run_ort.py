"""ONNX Runtime GenAI: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime_genai as og
from onnxruntime_genai.models.builder import create_model, parse_extra_options

from benchmarks.engines.following import answer, converted, follow

LONGEST = 256


def load(folder: str) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    with converted(folder, "ort") as made:
        _built(folder, made)
    return {}


def compare(folder: str, reference: str) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt."""
    with converted(folder, "ort") as made:
        model = _built(folder, made)
        generator: Any = None

        def feed(tokens: list[int], start: int) -> np.ndarray:
            nonlocal generator
            if start == 0:
                settings = og.GeneratorParams(model)
                settings.set_search_options(max_length=LONGEST)
                generator = og.Generator(model, settings)
            generator.append_tokens(np.array(tokens, np.int32))
            return np.asarray(generator.get_logits()).reshape(-1)

        return follow(reference, feed)


def _built(folder: str, made: str) -> Any:
    """The model as its own builder makes it (`-m onnxruntime_genai.models.builder`), in float32."""
    asked = ("", folder, made, "fp32", "cpu", f"{made}/cache")
    create_model(*asked, **parse_extra_options(*asked, []))
    return og.Model(made)


if __name__ == "__main__":
    answer({"load": load, "compare": compare})
