"""Text that the model writes: whose distribution it has, how much of it, and what a run does."""

from __future__ import annotations

import shutil

import pytest
import torch
from checkpoints_on_disk import tiny_tokenizer
from models import KINDS, VOCAB, tiny_model
from short_runs import SHORT, data

from maskprune.config import PruneConfig
from maskprune.structured import prune as pruning
from maskprune.training import self_text
from maskprune.training.self_text import amounts, mixed, write_blocks

EOS = 2


def test_amounts_by_hand():
    def of(n, share, **given):
        return amounts(n, 100, PruneConfig(self_text=share, batch_size=2, **given))

    assert of(1000, 0.25, steps=100) == (225, 75, 100)
    # All of a scarce text, and its share beside it; then what was fitted to is trained on too.
    assert of(100, 0.25, steps=100) == (100, 33, 0)
    assert of(100, 0.5, epochs=2.0) == (100, 100, 0)
    with pytest.raises(ValueError, match="self_text is 0.001, less than one of the 300 blocks"):
        of(1000, 0.001, steps=100)


def test_mixing_keeps_every_block_once_and_moves_with_the_seed():
    text, written = data(6), data(9)[6:] + 0
    blocks = mixed(text, written, seed=1)
    assert sorted(map(tuple, blocks.tolist())) == sorted(
        map(tuple, torch.cat([text, written]).tolist())
    )
    assert torch.equal(blocks, mixed(text, written, seed=1))
    assert not torch.equal(blocks, mixed(text, written, seed=2))


def test_a_draw_is_the_inverse_of_the_distribution_function():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    for at, token in [(0.0, 0), (0.24, 0), (0.26, 2), (0.74, 2), (0.76, 3), (1.0, 3)]:
        assert self_text._draw(logits, torch.tensor([[at]])).item() == token


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", KINDS)
def test_tokens_are_drawn_as_without_a_cache_and_in_any_batches(family, monkeypatch):
    model = tiny_model(family)
    blocks = write_blocks(model, tiny_tokenizer(), 5, 24, seed=3)
    assert blocks.shape == (5, 24) and blocks.dtype == torch.int64
    assert (blocks[:, 0] == EOS).all() and len(set(map(tuple, blocks.tolist()))) == 5
    draws = torch.rand(5, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits
    for position in range(1, 24):
        again = self_text._draw(logits[:, position - 1], draws[:, position, None])
        assert torch.equal(again[:, 0], blocks[:, position])
    monkeypatch.setattr(self_text, "AT_ONCE", 2)
    steps = []
    parts = write_blocks(
        model, tiny_tokenizer(), 5, 24, seed=3, progress=lambda *at: steps.append(at)
    )
    assert torch.equal(parts, blocks) and steps[-1] == (72, 72) and not model.training
    assert not torch.equal(write_blocks(model, tiny_tokenizer(), 5, 24, seed=4), blocks)


def test_what_is_drawn_has_the_models_distribution():
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.4)
        wanted = model(input_ids=torch.tensor([[EOS]])).logits[0, -1].softmax(-1)
    n = 4000
    counts = write_blocks(model, tiny_tokenizer(), n, 2, seed=0)[:, 1].bincount(minlength=VOCAB)
    # Pearson's statistic has a mean of VOCAB - 1 and a deviation of sqrt(2 (VOCAB - 1)).
    chi_square = float(((counts - n * wanted) ** 2 / (n * wanted)).sum())
    assert chi_square < VOCAB - 1 + 4 * (2 * (VOCAB - 1)) ** 0.5


def test_a_block_begins_with_the_bos_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    blocks = write_blocks(tiny_model("gemma"), tokenizer, 3, 8)
    assert (blocks[:, 0] == 1).all()


def run(tmp_path=None, resume=False, tokenizer=True, n=80, **changes):
    config = PruneConfig(**(SHORT | dict(method="taylor", compensation_tokens=160) | changes))
    return pruning.prune(
        tiny_model("llama"),
        tiny_tokenizer() if tokenizer else None,
        data(n),
        config,
        run_dir=tmp_path,
        resume=resume,
        quiet=True,
    )


def test_a_run_reads_that_share_and_writes_it_once(tmp_path, monkeypatch):
    seen = []

    class Seen(pruning.Blocks):
        def __init__(self, blocks, order):
            seen.append((blocks, order))
            super().__init__(blocks, order)

    monkeypatch.setattr(pruning, "Blocks", Seen)
    whole = run(tmp_path / "whole", save_steps=12, self_text=0.25)
    # 24 steps of 2 and 10 blocks of the compensation: 44 of the text and 15 beside them.
    blocks, order = seen[0]
    assert len(blocks) == 59
    # Each is read once: the first 10 by the compensation, the others by training.
    assert len(order.unique()) == order.numel() == 48 and order.min() >= 10
    written = write_blocks(tiny_model("llama"), tiny_tokenizer(), 15, 16, seed=0)
    assert {tuple(b) for b in written.tolist()} < {tuple(b) for b in blocks.tolist()}

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-24")
    monkeypatch.setattr(pruning, "write_blocks", None)
    again = run(tmp_path / "again", resume=True, save_steps=12, self_text=0.25)
    assert torch.equal(blocks, seen[1][0]) and torch.equal(order, seen[1][1])
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_few_sequences_at_once_where_their_cache_is_large(monkeypatch):
    model = tiny_model("llama")
    assert self_text._at_once(model, 10) == self_text.AT_ONCE
    # A token's keys and values: 2 layers of 2 heads of 8, in float32.
    monkeypatch.setattr(self_text, "CACHE_BYTES", 3 * 10 * 2 * 2 * 2 * 8 * 4)
    assert self_text._at_once(model, 10) == 3
    assert self_text._at_once(model, 1000) == 1


def test_blocks_of_another_length_than_the_setting_are_written_alike():
    assert run(n=80, seq_len=32, self_text=0.25).steps == 24


def test_a_run_of_epochs_counts_what_is_written():
    # 2 epochs of 40 blocks and the 40 beside them, in batches of 2.
    assert run(n=40, steps=None, epochs=2.0, self_text=0.5).steps == 80


def test_a_run_that_cannot_be_made_writes_nothing(monkeypatch):
    monkeypatch.setattr(pruning, "write_blocks", None)
    with pytest.raises(ValueError, match="nowhere"):
        run(self_text=0.25, lora_targets="nowhere")


@pytest.mark.parametrize("setting", ["self_text", "refine_passes"])
def test_a_model_that_must_be_spread_is_refused_what_needs_it_whole(setting, monkeypatch):
    from types import SimpleNamespace

    from maskprune.training import sharding

    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding, "on_first", lambda function: function())
    monkeypatch.setattr(sharding, "does_not_fit", lambda *_: True)
    monkeypatch.setattr(sharding.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    of_device = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_device)
    config = tiny_model("llama").config
    assert sharding.shards(PruneConfig(steps=20), config)
    value = {"self_text": 0.2, "refine_passes": 1}[setting]
    with pytest.raises(ValueError, match=f"{setting} is {value}.*80 GB.*--shard none to try"):
        sharding.shards(PruneConfig(steps=20, **{setting: value}), config)


def test_what_another_run_wrote_is_refused(tmp_path):
    self_text.save(tmp_path, data(3))
    assert torch.equal(self_text.load(tmp_path, (3, 16)), data(3))
    with pytest.raises(ValueError, match=r"holds \[3, 16\].*this run writes \[4, 16\]"):
        self_text.load(tmp_path, (4, 16))


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="self_text is 0.2, and there is no tokenizer"):
        run(tokenizer=False, self_text=0.2)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="self_text is .*expected a share"):
            PruneConfig(self_text=share)
    with pytest.raises(ValueError, match="self_text is 0.2.*shard is full.*--self-text 0"):
        PruneConfig(self_text=0.2, shard="full")
