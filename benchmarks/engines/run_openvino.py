"""OpenVINO through optimum-intel: runs in an environment of its own, see `__main__.py`."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import torch
from optimum.intel import OVModelForCausalLM, OVModelForVisualCausalLM
from transformers import AutoConfig

from benchmarks.engines.following import answer, follow

SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
}


def exported(folder: str) -> Any:
    """The model as `optimum-cli export openvino` makes it, in float32."""
    vision = AutoConfig.from_pretrained(folder).model_type == "gemma3"
    kind = OVModelForVisualCausalLM if vision else OVModelForCausalLM
    return kind.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=SETTINGS)


def load(folder: str) -> dict[str, Any]:
    """Nothing beyond that it loads."""
    exported(folder)
    return {}


def compare(folder: str, reference: str) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities, decoded token by token after each prompt."""
    model = exported(folder)
    past: Any = None

    def feed(tokens: list[int], start: int) -> np.ndarray:
        nonlocal past
        end = start + len(tokens)
        out = model(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, end, dtype=torch.int64),
            position_ids=torch.arange(start, end)[None],
            past_key_values=past if start else None,
        )
        past = out.past_key_values
        return np.asarray(out.logits)[0, -1]

    return follow(reference, feed)


if __name__ == "__main__":
    # The exporter collects garbage by hand; what is imported is none.
    gc.freeze()
    answer({"load": load, "compare": compare})
