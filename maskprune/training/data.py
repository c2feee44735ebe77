"""Calibration text to packed token blocks, and the order in which training reads them."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz")
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
SPLITS = ("train", "validation", "valid", "dev", "test")
DOCUMENTS_PER_CALL = 256

Source = str | Path | Sequence[str]


def token_blocks(
    source: Source,
    tokenizer: Any,
    seq_len: int,
    *,
    num_tokens: int | None = None,
    seed: int = 0,
    split: str = "train",
) -> torch.Tensor:
    """Blocks of seq_len tokens: documents as in pretraining, packed, cut and shuffled.

    A document is what `text_prefix` names (BOS, where the tokenizer adds one), its tokens and
    `document_end`. A block that begins within a document begins with the prefix too, since a
    model trained with BOS breaks down where it has none to attend to.

    Args:
        source: a .txt file (one document), a .jsonl file (key `text`), either of them as .gz, a
            folder of those, a hub dataset as name[:config][:split] (streamed), or a list of texts.
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
    texts = documents(source, split)
    while batch := list(islice(texts, DOCUMENTS_PER_CALL)):
        rows = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for row in rows:
            pieces.append(np.asarray([*prefix, *row, end], dtype=np.int32))
            count += len(pieces[-1])
        if wanted is not None and count >= wanted * seq_len:
            break
    if count < seq_len:
        raise ValueError(
            f"data {_name(source)} holds {count} tokens, but one block needs {seq_len}; "
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


def text_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: its BOS, or nothing where it adds none."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return next(whole[:i] for i in starts if whole[i : i + len(plain)] == plain)


def document_end(tokenizer: Any) -> int:
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
        seq_len: tokens per block, only to say the note and the error in tokens.

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


def read_text(source: Source, split: str = "test") -> str:
    """All documents of a source as one text, joined by blank lines, for perplexity.

    A single .txt file comes back as it is. Blank documents are kept, as the published WikiText-2
    protocol has them, so a hub dataset gives "\\n\\n".join(rows).

    Raises:
        ValueError: as `token_blocks`.
    """
    text = "\n\n".join(documents(source, split, keep_blank=True))
    if not text.strip():
        raise ValueError(f"data {_name(source)} holds no text; give a source with text")
    return text


def documents(source: Source, split: str = "train", *, keep_blank: bool = False) -> Iterator[str]:
    """The texts of a source in its own order; see `token_blocks` for what a source is.

    Raises:
        ValueError: no such source, a broken line (with its number), or nothing but blanks.
    """
    found = False
    for text in _raw_documents(source, split):
        if text.strip():
            found = True
        elif not keep_blank:
            continue
        yield text
    if not found:
        raise ValueError(f"data {_name(source)} is empty; expected documents with text in them")


def _raw_documents(source: Source, split: str) -> Iterator[str]:
    if not isinstance(source, str | Path):
        for i, text in enumerate(source):
            if not isinstance(text, str):
                raise TypeError(f"data[{i}] is a {type(text).__name__}; expected a list of str")
            yield text
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"data folder {path} holds no file ending in {', '.join(SUFFIXES)}")
        for file in files:
            yield from _file_documents(file)
    elif path.exists():
        yield from _file_documents(path)
    elif (
        isinstance(source, Path) or source.endswith(SUFFIXES) or source.startswith((".", "/", "~"))
    ):
        raise ValueError(f"data file {path} does not exist; give a path or a hub dataset's name")
    else:
        yield from _hub_documents(source, split)


def _file_documents(path: Path) -> Iterator[str]:
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl", ".json")):
        raise ValueError(f"data file {path} is of unknown kind; expected {', '.join(SUFFIXES)}")
    try:
        with _open(path) as file:
            if name.endswith(".txt"):
                yield file.read()
            else:
                yield from _json_lines(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 ({error.reason}); convert it") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"data file {path} is broken gzip ({error}); fetch it again") from None


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _json_lines(path: Path, file: IO[str]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: broken JSON ({error.msg}); expected one object a line"
            ) from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            got = f"keys {', '.join(sorted(row))}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f'{path}, line {number}: no string under `text` ({got}); expected {{"text": "..."}}'
            )
        yield text


def _hub_documents(source: str, split: str) -> Iterator[str]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ValueError(f"data {source!r} has {len(rest)} colons; expected name[:config][:split]")
    config: str | None = None
    if len(rest) == 1 and rest[0] in SPLITS:
        split = rest[0]
    elif rest:
        config = rest[0] or None
        split = rest[1] if len(rest) == 2 else split
    try:
        import datasets

        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub client raises some twenty unrelated classes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"data {source!r} is no local path, and the hub gave no such dataset ({reason}); check "
            "the name, or offline give a .txt or .jsonl file"
        ) from None
    if first is None:
        return
    if not isinstance(first.get("text"), str):
        raise ValueError(
            f"dataset {source!r} has columns {', '.join(sorted(first))}; expected one named `text`"
        )
    yield first["text"]
    for row in rows:
        yield row["text"]


def _name(source: Source) -> str:
    return f"{str(source)!r}" if isinstance(source, str | Path) else "(a list of texts)"
