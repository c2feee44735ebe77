"""CTranslate2: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter

from benchmarks.engines.following import answer, converted, go_along


def load(folder: str) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    with converted(folder, "ct2") as made:
        _generator(folder, made)
    return {}


def compare(folder: str, reference: str) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt."""
    with converted(folder, "ct2") as made:
        model = _generator(folder, made)
        vocabulary = json.loads(Path(made, "vocabulary.json").read_text(encoding="utf-8"))

        def write(tokens: list[int], new: int) -> list[tuple[int, np.ndarray]]:
            # Some token has to end a text: one that the reference never had so far.
            end = max(set(range(len(vocabulary))) - set(tokens))
            said = model.generate_batch(
                [[vocabulary[token] for token in tokens]], max_length=new, end_token=[end],
                include_prompt_in_result=False, return_logits_vocab=True,
            )[0]  # fmt: skip
            logits = [np.asarray(row, np.float32) for row in said.logits[0]]
            # The token that ended the text has logits alone.
            ids = [*said.sequences_ids[0], end][: len(logits)]
            return list(zip(ids, logits, strict=True))

        return go_along(reference, write)


def _generator(folder: str, made: str) -> Any:
    TransformersConverter(folder).convert(made, force=True)
    return ctranslate2.Generator(made, compute_type="float32")


if __name__ == "__main__":
    answer({"load": load, "compare": compare})
