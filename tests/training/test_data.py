"""Text to packed blocks: what a source is, how blocks are cut, in which order they are read."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from maskprune.training.data import block_order, document_end, text_prefix, token_blocks


def word_tokenizer(*extra, adds="", **special):
    """Knows w0 .. w99 as 2 .. 101, `extra` from 102 on; puts the tokens `adds` before a text."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(100)}
    words |= {token: 102 + i for i, token in enumerate(extra)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        pieces = [(token, words[token]) for token in adds.split()]
        core.post_processor = processors.TemplateProcessing(
            single=f"{adds} $A", special_tokens=pieces
        )
    special = {"eos_token": "<eos>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def sentence(start, length):
    return " ".join(f"w{i % 100}" for i in range(start, start + length))


def test_documents_are_joined_by_eos_and_cut_into_blocks(tokenizer):
    blocks = token_blocks(["w0 w1 w2", "w3", "w4 w5 w6 w7"], tokenizer, 4)
    assert sorted(blocks.tolist()) == [[2, 3, 4, 0], [5, 0, 6, 7]]
    assert blocks.dtype == torch.int64


def test_every_document_and_every_block_begins_with_the_bos_that_the_tokenizer_adds():
    with_bos = word_tokenizer("<bos>", bos_token="<bos>", adds="<bos>")
    assert text_prefix(with_bos) == [102]
    # bos w0 w1 w2 | bos w3 w4 w5 | bos w6 eos bos | bos w7 eos (tail): no text is lost in cutting
    blocks = token_blocks(["w0 w1 w2 w3 w4 w5 w6", "w7"], with_bos, 4)
    assert sorted(blocks.tolist()) == [[102, 2, 3, 4], [102, 5, 6, 7], [102, 8, 0, 102]]
    # A document that begins where a block begins has one BOS, not two.
    blocks = token_blocks(["w0 w1", "w3 w4"], with_bos, 4)
    assert sorted(blocks.tolist()) == [[102, 2, 3, 0], [102, 5, 6, 0]]
    assert token_blocks(["w0 w1"] * 9, with_bos, 4, num_tokens=10).shape == (3, 4)
    with pytest.raises(ValueError, match="seq_len is 1; expected at least 2"):
        token_blocks(["w0"], with_bos, 1)


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added():
    assert text_prefix(word_tokenizer("<bos>", bos_token="<bos>")) == []
    assert text_prefix(word_tokenizer("[gMASK]", "<sop>", adds="[gMASK] <sop>")) == [102, 103]


@pytest.mark.parametrize(
    ("eos", "others", "expected"),
    [
        ("<eos>", ("<|endoftext|>",), "<eos>"),
        ("<|im_end|>", ("<|endoftext|>",), "<|endoftext|>"),
        ("<|eot_id|>", ("<|end_of_text|>",), "<|end_of_text|>"),
        ("<|END_OF_TURN_TOKEN|>", ("<EOS_TOKEN>",), "<EOS_TOKEN>"),
        ("</s>", ("<|endoftext|>",), "</s>"),
        ("<|im_end|>", ("<|im_start|>",), "<eos>"),
    ],
)
def test_documents_end_as_in_pretraining_not_as_a_chats_turn(eos, others, expected):
    tokens = [t for t in (eos, *others) if t != "<eos>"]
    instruct = word_tokenizer(*tokens, eos_token=eos)
    assert document_end(instruct) == instruct.convert_tokens_to_ids(expected)
    blocks = token_blocks(["w0 w1 w2"], instruct, 4)
    assert blocks.tolist() == [[2, 3, 4, instruct.convert_tokens_to_ids(expected)]]


def test_without_a_pretraining_end_in_the_vocabulary_the_end_of_turn_stays():
    core = Tokenizer(models.WordLevel({"<|im_end|>": 0, "w": 1}, unk_token="w"))
    bare = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    assert document_end(bare) == 0


def test_the_seed_moves_blocks_and_changes_no_token(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [sentence(i, 50) for i in range(20)])
    first, again, other = (token_blocks(source, tokenizer, 8, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist())


def test_num_tokens_reads_whole_blocks_and_no_further(tokenizer):
    texts = [sentence(i, 9) for i in range(1000)]
    assert token_blocks(texts, tokenizer, 8, num_tokens=33).shape == (5, 8)
    assert token_blocks(texts, tokenizer, 8, num_tokens=32).shape == (4, 8)
    few = token_blocks(texts, tokenizer, 8, num_tokens=80)
    every = token_blocks(texts, tokenizer, 8)
    assert {tuple(row) for row in few.tolist()} <= {tuple(row) for row in every.tolist()}


def test_less_text_than_a_block_is_one_line_that_says_so(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("w0 w1")
    with pytest.raises(ValueError, match="holds 3 tokens, but one block needs 8"):
        token_blocks(tmp_path / "a.txt", tokenizer, 8)


def test_each_epoch_reads_every_block_once():
    order = block_order(10, 5, 6, seed=3)
    assert order.shape == (6, 5)
    for epoch in order.view(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(order[:2], order[2:4])


def test_a_longer_run_starts_with_the_order_of_the_shorter_one():
    assert torch.equal(block_order(7, 3, 20, seed=5)[:4], block_order(7, 3, 4, seed=5))
    assert not torch.equal(block_order(7, 3, 20, seed=5), block_order(7, 3, 20, seed=6))


def test_reading_the_data_again_is_noted(caplog):
    with caplog.at_level(logging.WARNING, logger="maskprune.training.data"):
        block_order(10, 5, 2, seq_len=8)
        assert not caplog.records
        block_order(10, 5, 3, seq_len=8)
    assert "10 blocks (80 tokens)" in caplog.text
    assert "15 blocks (120 tokens)" in caplog.text
    assert "1.5 times" in caplog.text


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="seq_len is 0"):
        token_blocks(["w0"], tokenizer, 0)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        token_blocks(["w0"], tokenizer, 1, num_tokens=0)
    with pytest.raises(TypeError, match=r"data\[1\] is a int"):
        token_blocks(["w0", 1], tokenizer, 1)
    with pytest.raises(ValueError, match="3 blocks.*one batch needs 4 blocks.*8 blocks"):
        block_order(3, 4, 2)
    with pytest.raises(ValueError, match="steps is 0"):
        block_order(3, 1, 0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        token_blocks(["w0"], bare, 1)
