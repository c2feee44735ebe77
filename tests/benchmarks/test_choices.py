"""The benchmark of choices: its searches do what their names say."""

from __future__ import annotations

import torch
from models import randomise, tiny_model, tokens

from benchmarks.quality import choices
from maskprune.config import PruneConfig
from maskprune.structured.budget import Budget
from maskprune.structured.masks import attach_masks
from maskprune.structured.prune import prune
from maskprune.structured.saliency import one_shot


def start(seed=0):
    model = tiny_model("llama", seed).requires_grad_(False)
    config = PruneConfig(**choices.SETTINGS, method="taylor", steps=20)
    masks = attach_masks(model, config.head_unit)
    return model, masks, Budget.of(model, config), tokens(32, 16, seed)


def mean_loss(model, masks, blocks):
    with torch.no_grad():
        return choices.loss(model, masks, blocks, len(blocks), gradient=False)


def test_swaps_lower_the_loss_of_the_text_and_keep_the_widths():
    model, masks, budget, blocks = start()
    one_shot("taylor", model, masks, budget, blocks)
    before, ranked = mean_loss(model, masks, blocks), choices.values(masks)
    reads = choices.swap(model, masks, budget, blocks)
    after = choices.values(masks)
    assert reads > 2 and mean_loss(model, masks, blocks) < before
    assert torch.equal(after["ffn"].sum(1), ranked["ffn"].sum(1))
    assert choices.moved(after, ranked)["moved_ffn"] > 0


def test_learned_masks_are_uniform_and_each_way_of_learning_ends_elsewhere(monkeypatch):
    monkeypatch.setattr(choices, "WINDOW", 16)
    found = {}
    for name in choices.LEARNED:
        model, masks, budget, blocks = start()
        choices.learn(model, masks, budget, blocks, name, 40, seed=0)
        assert ((masks.ffn == 0).sum(1) == budget.splits[0].ffn).all()
        assert ((masks.head == 0).sum(1) == budget.splits[0].head).all()
        found[name] = choices.values(masks)
    names = list(found)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(found[name]["ffn"], found[other]["ffn"]), (name, other)


def test_a_given_choice_is_what_is_pruned(tmp_path):
    blocks = tokens(40, 16, 0)
    config = PruneConfig(head_sparsity=0.5, ffn_sparsity=0.5, steps=20, batch_size=2, seq_len=16)
    _, masks, budget, _ = start()
    split = budget.splits[0]
    chosen = choices.values(randomise(masks, split.head, split.ffn, seed=3))
    model = tiny_model("llama")
    with choices.given(chosen):
        result = prune(model, None, blocks, config, run_dir=tmp_path / "run", quiet=True)
    for kind, value in chosen.items():
        assert torch.equal(getattr(result.masks, kind) != 0, value != 0), kind


def test_a_choice_is_put_back_with_its_values_or_as_0_and_1():
    _, masks, *_ = start()
    chosen = choices.values(randomise(masks, 1, 5))
    choices.put(masks, chosen, binary=False)
    assert torch.equal(masks.ffn, chosen["ffn"])
    choices.put(masks, chosen)
    assert torch.equal(masks.ffn, (chosen["ffn"] != 0).float())
