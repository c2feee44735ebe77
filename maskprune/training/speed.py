"""Tokens per second of whole models, as a user sees them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from maskprune.hf.cached import forward_cached


@torch.no_grad()
def throughput(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_len: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, dict[str, float]]:
    """Tokens per second of each model at batch 1: reading a prompt, then writing token by token.

    The models take turns, so that what slows the machine slows all of them.

    Args:
        models: name -> causal LM.
        prompt_len: random tokens read in one pass (prefill).
        new_tokens: greedy steps with the KV cache after it (decode).

    Returns:
        {name: {prefill_tokens_per_s, decode_tokens_per_s}}, medians over `repeats` after one
        round that is not counted.
    """
    if min(prompt_len, new_tokens, repeats) < 1:
        raise ValueError(
            f"prompt_len {prompt_len}, new_tokens {new_tokens} and repeats {repeats}: "
            "expected at least 1 each"
        )
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            read, write = _one_round(model, prompt_len, new_tokens)
            if turn:
                prefill[name].append(read)
                decode[name].append(write)
    return {
        name: {
            "prefill_tokens_per_s": prompt_len / statistics.median(prefill[name]),
            "decode_tokens_per_s": new_tokens / statistics.median(decode[name]),
        }
        for name in models
    }


def _one_round(model: PreTrainedModel, prompt_len: int, new_tokens: int) -> tuple[float, float]:
    """(seconds of the prefill, seconds of all decode steps)."""
    device = next(model.parameters()).device
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    vocab = model.get_input_embeddings().get_parameter("weight").shape[0]
    prompt = torch.randint(vocab, (1, prompt_len), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(device)
    wait()
    start = time.perf_counter()
    logits, cache = forward_cached(model, prompt, logits_to_keep=1)
    token = logits[:, -1:].argmax(-1)
    wait()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        logits, cache = forward_cached(model, token, cache)
        token = logits[:, -1:].argmax(-1)
    wait()
    return middle - start, time.perf_counter() - middle


def bfloat16_is_faster(width: int, rows: int) -> bool:
    """Whether a bfloat16 matrix product beats float32 by a fifth on this CPU, by measuring it.

    Args:
        width: hidden size d of the model; (rows, d) by (d, d) is timed.
        rows: tokens of one sequence.
    """
    medians = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
        x @ w
        times = []
        for _ in range(9):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        medians[dtype] = statistics.median(times)
    return medians[torch.bfloat16] * 1.2 < medians[torch.float32]
