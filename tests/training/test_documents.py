"""Sources of text and the documents in them."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import maskprune.training.documents
from maskprune.training.data import token_blocks
from maskprune.training.documents import documents, read_text


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    texts = ["one, with a comma", "two", 'drei\nund "vier" é']
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    (tmp_path / "lines.jsonl").write_bytes(lines)
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "array.json").write_bytes(b" \n" + array)
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf" + array)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(array))
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "table.parquet")
    table.to_csv(tmp_path / "table.csv", index=False)
    for path in sorted(tmp_path.iterdir()):
        assert list(documents(path)) == list(documents(str(path))) == texts, path.name
    assert list(documents(texts)) == texts
    assert sorted(documents(tmp_path)) == sorted(texts * 9)


def test_half_a_character_is_replaced_and_a_whole_one_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "bad \\ud83d emoji"}\n{"text": "good \\ud83d\\ude00 é"}\n')
    assert list(documents(path)) == ["bad \ufffd emoji", "good \U0001f600 é"]


CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture
def chat_tokenizer():
    words = {"<s>": 0, "</s>": 1, "<user>": 2, "<assistant>": 3, "w1": 4, "w2": 5}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ '<s> ' }}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ raise_exception('no tools') }}{% endif %}"
        "{{ '<' + m.role + '> ' + m.content + ' </s>\n' }}{% endfor %}"
    )
    return tokenizer


def test_chats_become_text_by_the_tokenizers_template(chat_tokenizer, tmp_path):
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"text": "w1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows[:2]))
    Dataset.from_list(rows[:2]).to_parquet(tmp_path / "c.parquet")
    texts = ["<s> <user> w1 </s>\n<assistant> w2 </s>\n", "<s> <user> w1 </s>\n"]
    assert list(documents(tmp_path / "a.jsonl", tokenizer=chat_tokenizer)) == [*texts, "w1"]
    for name in ("b.json", "c.parquet"):
        assert list(documents(tmp_path / name, tokenizer=chat_tokenizer)) == texts
    # The template's own BOS and EOS are not doubled; the raw document gets both.
    blocks = token_blocks(tmp_path / "a.jsonl", chat_tokenizer, 14)
    assert blocks.tolist() == [[0, 2, 4, 1, 3, 5, 1, 0, 2, 4, 1, 0, 4, 1]]


def test_chats_that_no_template_takes_are_one_line(chat_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: the tokenizer's chat template.*\(no tools\)"):
        list(documents(path, tokenizer=chat_tokenizer))
    chat_tokenizer.chat_template = None
    for tokenizer in (chat_tokenizer, None):
        with pytest.raises(ValueError, match="line 1: a chat .*no tokenizer with a chat template"):
            list(documents(path, tokenizer=tokenizer))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "ignored.md").write_text("no")
    assert list(documents(tmp_path)) == ["one", "two", "three"]


def test_perplexity_text_is_the_documents_between_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert read_text(path) == "one\n\n\n\ntwo"
    (tmp_path / "b.txt").write_text(" = Title = \n\n text\n")
    assert read_text(tmp_path / "b.txt") == " = Title = \n\n text\n"


def test_a_hub_dataset_is_streamed_by_name_config_and_split(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("org/c4", "org/c4:en", "org/c4:en:test", "org/c4:validation", "org/c4::all"):
        assert list(documents(source)) == ["one", "two"]
    assert read_text("org/c4:en") == "one\n\n\n\ntwo"
    assert calls == [
        ("org/c4", None, "train", True),
        ("org/c4", "en", "train", True),
        ("org/c4", "en", "test", True),
        ("org/c4", None, "validation", True),
        ("org/c4", None, "all", True),
        ("org/c4", "en", "test", True),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 1}\n',
            r"line 2: no string under `text` \(keys body, id\)",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', "line 3: no string under `text`"),
        ("a.jsonl", b'["x"]\n', r"line 1: no string under `text` \(list\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: broken JSON"),
        ("a.jsonl", b"", "is empty; expected documents"),
        ("a.txt", b"  \n ", "is empty; expected documents"),
        ("a.txt", b"\xff\xfe\xff", "is not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "is broken gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], "is broken gzip"),
        ("a.json", b'[{"text": "x"},\n{"text": \n]', "line 3: broken JSON .*one array"),
        ("a.json", b'[{"text": "x"}, "y"]', r"row 2: no string under `text` \(str\)"),
        ("a.json", b"[]", "is empty; expected documents"),
        ("a.parquet", b"x", "could not be read .*expected a parquet file with a column `text`"),
        ("a.csv", b"body,id\nx,1\n", r"row 1: no string under `text` \(keys body, id\)"),
        ("a.csv", b"", "could not be read"),
        ("a.csv", b"text\n\xff\xfe\n", "could not be read"),
        ("a.md", b"x", "is of unknown kind; expected .txt"),
    ],
)
def test_a_bad_file_is_one_line_that_says_what_to_do(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(documents(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(
        maskprune.training.documents, "_hub_documents", lambda *_: pytest.fail("asked the hub")
    )
    for source in ("no/such.jsonl", "./none", tmp_path / "none"):
        with pytest.raises(ValueError, match="does not exist; give a path"):
            list(documents(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file ending in .txt"):
        list(documents(tmp_path / "empty"))


def test_empty_cells_of_a_table_are_blank_documents(tmp_path):
    Dataset.from_list([{"text": "one"}, {"text": None}]).to_parquet(tmp_path / "a.parquet")
    assert list(documents(tmp_path / "a.parquet")) == ["one"]
    assert list(documents(tmp_path / "a.parquet", keep_blank=True)) == ["one", ""]


def test_a_dataset_that_the_hub_does_not_give_says_what_to_do_offline(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"\(no route\); check the name, or offline") as caught:
        list(documents("org/none"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="3 colons"):
        list(documents("a:b:c:d"))


def test_a_dataset_without_text_names_its_columns(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"label": 1, "body": "x"}])
    with pytest.raises(ValueError, match=r"row 1: no string under `text` \(keys body, label\)"):
        list(documents("org/labels"))
