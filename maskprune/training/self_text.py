"""Text that the dense model writes itself, to be trained on beside the user's.

Text of one kind teaches that kind; what the dense model draws from its own distribution may be of
every kind that it was trained on (data-free distillation as in LLM-QAT, Liu et al.,
arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskprune.config import PruneConfig
from maskprune.files import replace_file
from maskprune.hf.cached import forward_cached
from maskprune.hf.families import require_causal_lm, text_config
from maskprune.training.data import document_end, text_prefix
from maskprune.training.distributed import own_share, sum_shares, world_size
from maskprune.training.layer_by_layer import free_bytes
from maskprune.training.progress import Report

FILE = "self_text.safetensors"
# Sequences at once; fewer where their keys and values would take more bytes than this, or more
# than this share of a GPU's free memory.
AT_ONCE = 64
CACHE_BYTES = 8 * 2**30
CACHE_SHARE = 0.25


def amounts(n_blocks: int, first: int, config: PruneConfig) -> tuple[int, int, int]:
    """How many blocks of the user's text to take, how many the model writes, how many to spare.

    Of a run of `config.steps`, that share of what it reads is written; where the user's text is
    too little for the rest, or is read in epochs, all of it is taken and the written blocks come
    beside it.

    Args:
        n_blocks: blocks of the user's text.
        first: how many of the mixed blocks ranking and compensation read.

    Returns:
        Both numbers, and `first` where there are enough other blocks for the steps, so that each
        block is read once; else 0.

    Raises:
        ValueError: the share is less than one block.
    """
    share, steps = config.self_text, config.steps
    needed = None if steps is None else steps * config.batch_size + first
    taken = n_blocks if needed is None else min(n_blocks, math.ceil(needed * (1 - share)))
    written = round(taken * share / (1 - share))
    if not written:
        raise ValueError(
            f"self_text is {share}, less than one of the {taken} blocks that the run reads; give a "
            "larger share, or 0"
        )
    enough = steps is not None and taken + written - first >= steps * config.batch_size
    return taken, written, first if enough else 0


def mixed(text: torch.Tensor, written: torch.Tensor, seed: int) -> torch.Tensor:
    """Both in a random order, (n, seq_len)."""
    blocks = torch.cat([text, written.to(text.device)])
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def write_blocks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seq_len: int,
    *,
    seed: int = 0,
    progress: Report | None = None,
) -> torch.Tensor:
    """Blocks drawn token by token from the model's own distribution, at temperature 1.

    A block begins as texts do, with the tokenizer's BOS, or where it adds none with the token that
    ends a document; what comes after an end within a block is another document. What is drawn
    depends on the model and `seed` alone, up to rounding; every rank writes its share.

    Args:
        model: a transformers causal LM, whole on one device.
        progress: called with (positions done, positions in all), of all batches of this rank, each
            after a token for every sequence of a batch.

    Returns:
        (n, seq_len) int64 on the CPU.
    """
    core = require_causal_lm(model)
    device = next(core.parameters()).device
    begin = text_prefix(tokenizer) or [document_end(tokenizer)]
    draws = torch.rand(
        n, seq_len, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    places = torch.arange(n)
    blocks = torch.zeros(n, seq_len, dtype=torch.int64)
    batches = own_share(places).split(_at_once(core, seq_len))
    was_training = core.training
    core.eval()
    try:
        for number, rows in enumerate(batches):
            ids = torch.tensor([begin] * len(rows), device=device)
            cache = None
            blocks[rows, : len(begin)] = ids.cpu()
            for position in range(len(begin), seq_len):
                logits, cache = forward_cached(core, ids, cache)
                drawn = draws[rows, position, None].to(device)
                ids = _draw(logits[:, -1], drawn)
                blocks[rows, position] = ids[:, 0].cpu()
                if progress is not None:
                    progress(number * seq_len + position + 1, len(batches) * seq_len)
    finally:
        core.train(was_training)
    total = blocks.to(device)
    sum_shares(places, total)
    if world_size() > 1:
        # Of fewer blocks than ranks each rank wrote all, and they may differ by rounding.
        dist.broadcast(total, 0)
    return total.cpu()


def _draw(logits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The token of (B, V) logits at which their distribution function passes `at` (B, 1)."""
    passed = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(passed, at * passed[:, -1:], right=True)
    return token.clamp_max(logits.shape[-1] - 1)


def _at_once(core: PreTrainedModel, seq_len: int) -> int:
    config = text_config(core.config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = 2 * config.num_hidden_layers * heads * size * next(core.parameters()).element_size()
    most = min(CACHE_BYTES, CACHE_SHARE * free_bytes(next(core.parameters()).device))
    return max(1, min(AT_ONCE, int(most / (of_token * seq_len))))


def save(run: Path, written: torch.Tensor) -> None:
    """Keep what was written in the run folder, for a resumed run."""
    from safetensors.torch import save as to_bytes

    replace_file(run / FILE, to_bytes({"blocks": written.contiguous()}))


def load(run: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """What `save` kept, or None.

    Raises:
        ValueError: it is not (blocks, tokens) of this shape, so of another run.
    """
    from safetensors.torch import load_file

    if not (run / FILE).is_file():
        return None
    blocks = load_file(run / FILE)["blocks"]
    if tuple(blocks.shape) != shape:
        raise ValueError(
            f"{run / FILE} holds {list(blocks.shape)} tokens, and this run writes {list(shape)}; "
            "resume with the settings and the text that the run began with"
        )
    return blocks
