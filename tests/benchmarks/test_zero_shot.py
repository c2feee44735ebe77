"""Zero-shot accuracy of quality rows: the prompts, and which answer counts."""

import json

import pytest
import torch
from models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.zero_shot import accuracies

pytest.importorskip("lm_eval")
WORDS = ["<eos>", "Question", ":", "Answer", "?", "yes", "no", "long", "word"]


def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def says(word):
    """A model whose next token is `word`, whatever stands before."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        # The norm's output is 0, so logits are equal but for a bias on the word.
        model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
        model.lm_head.bias.zero_()
        model.lm_head.bias[WORDS.index(word)] = 5.0
    return model


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_right_answer_is_the_one_the_label_names(tmp_path):
    asked = {"passage": "word", "question": "word"}
    write(tmp_path, "boolq", [asked | {"label": 1}, asked | {"label": 1}, asked | {"label": 0}])
    row = accuracies(says("yes"), tokenizer(), tmp_path)
    assert row == {"acc_boolq": 0.6667, "acc_boolq_questions": 3}
    assert accuracies(says("no"), tokenizer(), tmp_path)["acc_boolq"] == 0.3333
    assert accuracies(says("yes"), tokenizer(), tmp_path, limit=2)["acc_boolq"] == 1.0


def test_openbookqa_is_scored_by_length_and_piqa_is_not(tmp_path):
    # Likelier as a whole is the short choice, per letter the long one.
    rows = [{"question": "word", "choices": ["no", "long " * 3 + "word"], "label": 1}]
    write(tmp_path, "piqa", rows)
    write(tmp_path, "openbookqa", rows)
    row = accuracies(says("long"), tokenizer(), tmp_path)
    assert (row["acc_piqa"], row["acc_openbookqa"]) == (0.0, 1.0)


def test_a_folder_without_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of piqa\.jsonl, openbookqa\.jsonl"):
        accuracies(None, None, tmp_path)
