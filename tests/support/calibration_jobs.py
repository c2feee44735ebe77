"""What calibration does block by block: jobs that give all that they computed, and their models.

A CPU stands in for the device: the blocks then compute on copies, as they do on a GPU.
"""

from __future__ import annotations

import torch
from models import KINDS, randomise, tiny_model, tokens
from peft import LoraConfig, get_peft_model

from maskprune.hf.families import FAMILIES, output_names
from maskprune.structured import saliency
from maskprune.structured.compensation import compensate
from maskprune.structured.masks import attach_masks
from maskprune.two_four import one_shot, one_shot_masks

CPU = torch.device("cpu")
# With windows shorter than the text, and softcaps in attention and after the head.
FAMILY = (*KINDS, "gemma2")
OPTIONS = {
    "gemma2": dict(sliding_window=4, final_logit_softcapping=2.0, attn_logit_softcapping=2.0)
}
METHODS = {
    "wanda": dict(method="wanda"),
    "sparsegpt": dict(method="sparsegpt"),
    "sparsegpt, updating": dict(method="sparsegpt", update=True),
}
STRUCTURED = ("wanda_sp", "taylor", "taylor per sequence", "compensate", "compensate on both")
JOBS = (*METHODS, *STRUCTURED)
# Times that each block's weights travel.
TRAVELS = {job: 2 if job.startswith("taylor") else 1 for job in JOBS}


def three_batches(monkeypatch):
    """5 x 20 tokens in batches of 2, 2 and 1: two shapes."""
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(saliency, "TOKENS_AT_ONCE", 40)


def stock(family="llama", **more):
    return tiny_model(family, **(OPTIONS.get(family, {}) | more))


def adapted(family="llama", **more):
    """A PEFT model with random adapters under random masks."""
    ranks = dict.fromkeys(output_names(FAMILIES[family]), 8)
    config = LoraConfig(
        r=2, lora_alpha=2, rank_pattern=ranks, alpha_pattern=ranks, init_lora_weights=False,
        target_modules="all-linear", fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = get_peft_model(stock(family, **more), config)
    return model.eval(), randomise(attach_masks(model, fused=False), 1, 8)


def subject(job, family="llama", **more):
    return (stock(family, **more), None) if job in METHODS else adapted(family, **more)


def work(job, model, masks, device=None, progress=None, blocks=None):
    """Every tensor that a job returns, by name, on the CPU."""
    blocks = tokens(5, 20) if blocks is None else blocks
    ways = dict(device=device, progress=progress)
    if job in METHODS:
        found = one_shot_masks(model, blocks=blocks, **METHODS[job], **ways)
        assert all(mask.device == next(model.parameters()).device for mask in found.values())
    elif job.startswith("compensate"):
        kept = masks.head.detach().clone(), masks.ffn.detach().clone()
        both = job == "compensate on both"
        summed = {} if both else None
        if both:
            saliency.wanda_sp(model, masks, blocks[:2], grams=summed, device=device)
            assert summed and all(H.device == blocks.device for H in summed.values())
        changed = compensate(model, masks, kept, blocks, summed=summed, **ways)
        found = {str(i): p.detach() for i, p in enumerate(changed)}
        assert not summed
    else:
        grams = {}
        rank = saliency.wanda_sp if job == "wanda_sp" else saliency.taylor
        more = dict(per_sequence=True, seed=3) if job == "taylor per sequence" else {}
        head, ffn = rank(model, masks, blocks, grams=grams, **more, **ways)
        found = {"head": head, "ffn": ffn} | {str(place): H for place, H in grams.items()}
        assert all(value.device == blocks.device for value in found.values())
    assert found
    return {name: value.detach().cpu().clone() for name, value in found.items()}


def bits(model):
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}


def require_equal(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
