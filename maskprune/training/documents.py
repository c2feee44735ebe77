"""Sources of text (files, folders, hub datasets, lists) and the documents in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from maskprune.files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz")
TABLES = {".parquet": "parquet", ".csv": "csv"}
SUFFIXES = (*TEXT_SUFFIXES, *TABLES)
SPLITS = ("train", "validation", "valid", "dev", "test")

Source = str | Path | Sequence[str]
# From a row of a source, and its place for error messages, to its text.
Reader = Callable[[object, str], str]


def read_text(source: Source, split: str = "test") -> str:
    """All documents of a source as one text, joined by blank lines, for perplexity.

    A single .txt file comes back as it is. Blank documents are kept, as the published WikiText-2
    protocol has them, so a hub dataset gives "\\n\\n".join(rows).

    Raises:
        ValueError: as `documents`.
    """
    text = "\n\n".join(documents(source, split, keep_blank=True))
    if not text.strip():
        raise ValueError(f"data {name_of(source)} holds no text; give a source with text")
    return text


def documents(
    source: Source,
    split: str = "train",
    *,
    keep_blank: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[str]:
    """The texts of a source in its own order; a lone surrogate in one becomes U+FFFD.

    Args:
        source: a .txt file (one document); a .jsonl file, a .json file (of lines, or one array),
            any of them as .gz; a .parquet or .csv file; a folder of those; a hub dataset as
            name[:config][:split] (streamed); or a list of texts. A row has its text under `text`,
            or a chat under `messages`, as dicts with `role` and `content`.
        split: of a hub dataset that names none.
        keep_blank: give blank documents too.
        tokenizer: its chat template turns `messages` into text.

    Raises:
        ValueError: no such source, a broken row (with its number), chats without a template, or
            nothing but blanks.
    """

    def read(row: object, where: str) -> str:
        return _text_of(row, where, tokenizer)

    any_text = False
    for text in map(_whole_characters, _raw_documents(source, split, read)):
        if text.strip():
            any_text = True
        elif not keep_blank:
            continue
        yield text
    if not any_text:
        raise ValueError(f"data {name_of(source)} is empty; expected documents with text in them")


def _whole_characters(text: str) -> str:
    """Halves of characters, which JSON's escapes can hold and no tokenizer takes, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text_of(row: object, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if not isinstance(row, Mapping):
        got = type(row).__name__
    elif isinstance(text := row.get("text"), str):
        return text
    elif isinstance(row.get("messages"), list):
        return _chat(row["messages"], where, tokenizer)
    else:
        got = f"keys {', '.join(sorted(map(str, row)))}"
    raise ValueError(
        f'{where}: no string under `text` ({got}); expected {{"text": "..."}} or a chat, '
        '{"messages": [{"role": ..., "content": ...}]}'
    )


def _chat(
    messages: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: a chat (`messages`), but there is no tokenizer with a chat template to turn "
            "it into text; give rows with `text`, or an instruct model"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs: they raise what they like
        raise ValueError(
            f"{where}: the tokenizer's chat template does not take these messages "
            f"({_first_line(error)})"
        ) from None


def _raw_documents(source: Source, split: str, read: Reader) -> Iterator[str]:
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
            yield from _file_documents(file, read)
    elif path.exists():
        yield from _file_documents(path, read)
    elif (
        isinstance(source, Path) or source.endswith(SUFFIXES) or source.startswith((".", "/", "~"))
    ):
        raise ValueError(f"data file {path} does not exist; give a path or a hub dataset's name")
    else:
        yield from _hub_documents(source, split, read)


def _file_documents(path: Path, read: Reader) -> Iterator[str]:
    if path.suffix in TABLES:
        yield from _table_documents(path, read)
        return
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl", ".json")):
        raise ValueError(f"data file {path} is of unknown kind; expected {', '.join(SUFFIXES)}")
    try:
        with _open(path) as file:
            if name.endswith(".txt"):
                yield file.read()
            elif name.endswith(".json") and _begins_with_bracket(file):
                yield from _json_array(path, file, read)
            else:
                yield from _json_lines(path, file, read)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 ({error.reason}); convert it") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"data file {path} is broken gzip ({error}); fetch it again") from None


def _open(path: Path) -> IO[str]:
    # Windows tools begin UTF-8 files with a byte order mark, which is no part of the text.
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _begins_with_bracket(file: IO[str]) -> bool:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    return first == "["


def _json_array(path: Path, file: IO[str], read: Reader) -> Iterator[str]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg}); expected one array of objects"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield read(row, f"{path}, row {number}")


def _json_lines(path: Path, file: IO[str], read: Reader) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: broken JSON ({error.msg}); expected one object a line"
            ) from None
        yield read(row, f"{path}, line {number}")


def _table_documents(path: Path, read: Reader) -> Iterator[str]:
    import datasets

    def rows() -> Iterator[JsonObject]:
        try:
            yield from datasets.load_dataset(
                TABLES[path.suffix], data_files=str(path), split="train", streaming=True
            )
        except Exception as error:  # pandas', pyarrow's and datasets' own
            raise ValueError(
                f"data file {path} could not be read ({_first_line(error)}); expected a "
                f"{path.suffix[1:]} file with a column `text` or `messages`"
            ) from None

    for number, row in enumerate(rows(), start=1):
        yield _cell(row, f"{path}, row {number}", read)


def _cell(row: JsonObject, where: str, read: Reader) -> str:
    """The text of a table's row, where an empty cell is None."""
    return "" if row.get("text", "") is None else read(row, where)


def _hub_documents(source: str, split: str, read: Reader) -> Iterator[str]:
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
        raise ValueError(
            f"data {source!r} is not a local path, and the hub gave no such dataset "
            f"({_first_line(error)}); check the name, or offline give a local file"
        ) from None
    if first is None:
        return
    for number, row in enumerate(chain([first], rows), start=1):
        yield _cell(row, f"dataset {source!r}, row {number}", read)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def name_of(source: Source) -> str:
    """What to call a source in a message."""
    return f"{str(source)!r}" if isinstance(source, str | Path) else "(a list of texts)"
