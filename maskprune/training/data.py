"""Documents to packed token blocks, and the order in which training reads them."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from maskprune.training.documents import Source, documents, name_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# What an instruct model's tokenizer may call EOS: the end of a turn, which pretraining never saw.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]",
)
PRETRAINING_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<EOS_TOKEN>", "<eos>", "</s>")
DOCUMENTS_PER_CALL = 256


def token_blocks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    num_tokens: int | None = None,
    seed: int = 0,
    split: str = "train",
) -> torch.Tensor:
    """Blocks of seq_len tokens: documents as in pretraining, packed, cut and shuffled.

    A document is what `text_prefix` names (BOS, where the tokenizer adds one), its tokens and
    `document_end`; a chat whose template writes its own BOS or EOS gets no second one. A block
    that begins within a document begins with the prefix too, since a model trained with BOS
    breaks down where it has none to attend to.

    Args:
        source: what `documents` takes.
        tokenizer: a transformers tokenizer with an EOS token.
        seq_len: tokens per block.
        num_tokens: read no further than this many tokens, rounded up to whole blocks; None: all.
        seed: of the order of the blocks. The tokens in them do not depend on it.
        split: of a hub dataset that names none.

    Returns:
        (n, seq_len) int64 on the CPU; the tail that fills no block is dropped.

    Raises:
        ValueError: no such source, a broken or empty one, or fewer than seq_len tokens in it.
    """
    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; expected at least 1, or None for all")
    prefix, end = text_prefix(tokenizer), document_end(tokenizer)
    if seq_len <= len(prefix):
        raise ValueError(f"seq_len is {seq_len}; expected at least {len(prefix) + 1}")
    wanted = None if num_tokens is None else -(-num_tokens // seq_len)
    pieces: list[np.ndarray] = []
    count = 0
    texts = documents(source, split, tokenizer=tokenizer)
    while batch := list(islice(texts, DOCUMENTS_PER_CALL)):
        rows = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for text, row in zip(batch, rows, strict=True):
            begin = [] if prefix and row[: len(prefix)] == prefix else prefix
            ended = tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token)
            pieces.append(np.asarray([*begin, *row, *([] if ended else [end])], dtype=np.int32))
            count += len(pieces[-1])
        if wanted is not None and count >= wanted * seq_len:
            break
    if count < seq_len:
        raise ValueError(
            f"data {name_of(source)} holds {count} tokens, but one block needs {seq_len}; "
            "give more text or a smaller seq_len"
        )
    blocks = torch.from_numpy(_pack(np.concatenate(pieces), prefix, seq_len)[:wanted])
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]


def _pack(tokens: np.ndarray, prefix: list[int], seq_len: int) -> np.ndarray:
    """`tokens` cut into rows of seq_len that all begin with `prefix`; int64."""
    rows: list[np.ndarray] = []
    at = 0
    while True:
        begins = tokens[at : at + len(prefix)].tolist() == prefix
        row = tokens[at : at + seq_len - (0 if begins else len(prefix))]
        at += len(row)
        row = row if begins else np.concatenate([np.asarray(prefix, dtype=row.dtype), row])
        if len(row) < seq_len:
            return np.stack(rows).astype(np.int64)
        rows.append(row)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing where it adds none."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:i] for i in starts if whole[i : i + len(plain)] == plain), [])


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ended a document in pretraining.

    The tokenizer's EOS; or, where that is the end of a chat's turn and the vocabulary knows one of
    `PRETRAINING_ENDS`, that one.

    Raises:
        ValueError: there is none.
    """
    if tokenizer.eos_token in TURN_ENDS:
        vocabulary = tokenizer.get_vocab()
        for token in PRETRAINING_ENDS:
            if token in vocabulary:
                return int(vocabulary[token])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token to put between documents; set tokenizer.eos_token"
        )
    return int(tokenizer.eos_token_id)


def block_order(
    n_blocks: int, batch: int, steps: int, seed: int = 0, *, seq_len: int | None = None
) -> torch.Tensor:
    """Which blocks step t reads: row t of (steps, batch); one random permutation per epoch.

    Row t depends on (n_blocks, batch, seed) alone, so a resumed run, or a longer one, reads the
    same blocks at the same step. Fewer than steps * batch blocks are read again, with a note.

    Args:
        seq_len: tokens per block, only to count in tokens in the note and the error.

    Returns:
        (steps, batch) int64.

    Raises:
        ValueError: no steps, or fewer blocks than one batch.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"steps is {steps} and batch {batch}; expected at least 1 each")

    def amount(blocks: int) -> str:
        return f"{blocks} blocks" + (f" ({blocks * seq_len} tokens)" if seq_len else "")

    if n_blocks < batch:
        raise ValueError(
            f"the data gives {amount(n_blocks)}, but one batch needs {amount(batch)} and all "
            f"{steps} steps {amount(steps * batch)}; give more text, or a smaller batch or seq_len"
        )
    epochs = -(-steps * batch // n_blocks)
    if epochs > 1:
        logger.warning(
            "the data gives %s, %d steps need %s: it is read %.1f times",
            amount(n_blocks),
            steps,
            amount(steps * batch),
            steps * batch / n_blocks,
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(n_blocks, generator=generator) for _ in range(epochs)])
    return order[: steps * batch].view(steps, batch)
