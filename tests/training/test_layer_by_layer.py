"""Calibration block by block gives the bits of the whole model, and reads all on the device."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibration_jobs import (
    CPU,
    FAMILY,
    JOBS,
    TRAVELS,
    adapted,
    bits,
    require_equal,
    stock,
    subject,
    three_batches,
    work,
)
from models import tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from maskprune.config import SparsifyConfig
from maskprune.hf.families import stock_model
from maskprune.structured import saliency
from maskprune.structured.budget import Budget
from maskprune.structured.compensation import compensate
from maskprune.training import layer_by_layer
from maskprune.training.layer_by_layer import Walk, free_bytes
from maskprune.two_four import one_shot_masks
from maskprune.two_four.sparsify import find_prior


@pytest.fixture(autouse=True)
def batches(monkeypatch):
    three_batches(monkeypatch)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("job", JOBS)
def test_block_by_block_gives_the_bits_of_the_whole_model(job, family):
    if (job, family) == ("taylor per sequence", "opt"):
        pytest.skip("OPT's FFN does not see which sequence a token is of")
    model, masks = subject(job, family)
    expected = work(job, model, masks)
    after = bits(model)
    model, masks = subject(job, family)
    require_equal(work(job, model, masks, CPU), expected)
    require_equal(bits(model), after)


@pytest.mark.parametrize("family", ["granite", "cohere2", "olmo2", "gpt_bigcode", "phi"])
def test_what_follows_the_blocks_is_the_model_s_own(family):
    model, masks = adapted(family)
    expected = work("taylor", model, masks)
    require_equal(work("taylor", model, masks, CPU), expected)


def swapping(base):
    """`lent` by other parameters for the time: what torch does not let one tensor do on meta."""

    @contextlib.contextmanager
    def lent(tensors, device, keep=()):
        wanted, before = {id(t) for t in tensors}, []
        for module in base.modules():
            for table in (module._parameters, module._buffers):
                before += [(table, name, t) for name, t in table.items() if id(t) in wanted]
        for table, name, t in before:
            copy = t.detach().to(device)
            is_parameter = isinstance(t, torch.nn.Parameter)
            table[name] = torch.nn.Parameter(copy, False) if is_parameter else copy
        try:
            yield
        finally:
            for table, name, t in before:
                table[name] = t

    return lent


def fake_device(model, monkeypatch):
    """The meta device as a stand-in; fake tensors refuse, as a GPU does, what is elsewhere."""
    monkeypatch.setattr(layer_by_layer, "lent", swapping(stock_model(model)))
    # Both ask what the tokens are.
    packed = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(packed, lambda *_, **__: None, raising=False)
    asks = "transformers.PreTrainedModel.warn_if_padding_and_no_attention_mask"
    monkeypatch.setattr(asks, lambda *_, **__: None, raising=False)
    # What the meta device has not.
    generator = torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda *_: generator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("family", FAMILY)
def test_all_that_a_block_reads_is_on_the_device(family, monkeypatch):
    model, masks = adapted(family)
    model.requires_grad_(False)
    done = []
    with fake_device(model, monkeypatch), masks.off(), torch.enable_grad():
        walk = Walk(model, tokens(5, 20).split(2), torch.device("meta"))
        first = list(walk.hidden)
        with pytest.raises(RuntimeError, match="device"):
            walk.run(0, replace=False)
        inputs = walk.up()
        gradients = walk.top(lambda logits, ids: logits.float().mean() + 0 * ids.sum())
        walk.down(inputs, gradients, done.append)
    assert done == [1, 0] and not inputs
    assert {t.device.type for t in (*first, *walk.hidden, *gradients)} == {"meta"}


@pytest.mark.parametrize("rank", [saliency.wanda_sp, saliency.taylor])
def test_rankings_mix_no_devices_and_end_where_the_model_is(rank, monkeypatch):
    model, masks = adapted()
    grams, meta = {}, torch.device("meta")
    with fake_device(model, monkeypatch) as fake:
        blocks = fake.from_tensor(tokens(5, 20))
        head, ffn = rank(model, masks, blocks, grams=grams, device=meta)
    assert len(grams) == 4
    assert {t.device for t in (head, ffn, *grams.values())} == {CPU}


@pytest.mark.parametrize("job", ["sparsegpt, updating", "taylor", "compensate"])
def test_in_bfloat16_too_and_under_autocast(job):
    found = []
    for device in (None, CPU):
        model, masks = subject(job, dtype=torch.bfloat16)
        one = work(job, model, masks, device), bits(model)
        model, masks = subject(job)
        with torch.autocast("cpu", torch.bfloat16):
            found.append((*one, work(job, model, masks, device), bits(model)))
    for whole, by_block in zip(*found, strict=True):
        require_equal(by_block, whole)


@pytest.mark.parametrize("job", JOBS)
def test_progress_counts_turns(job):
    model, masks = subject(job)
    seen = []
    work(job, model, masks, CPU, lambda *now: seen.append(now))
    turns = 2 * TRAVELS[job]
    assert seen == [(n, turns) for n in range(1, turns + 1)]


def test_one_shot_and_compensation_follow_a_run_of_sums_without_more_text():
    found = []
    for device in (None, CPU):
        model, masks = adapted()
        budget, grams = Budget(model, 0.5, multiple_of=4), {}
        ways = dict(grams=grams, device=device)
        split = saliency.one_shot("taylor", model, masks, budget, tokens(5, 20), **ways)
        kept = masks.head.detach().clone(), masks.ffn.detach().clone()
        none = tokens(5, 20)[:0]
        changed = compensate(model, masks, kept, none, summed=grams, device=device)
        assert split and changed
        found.append({str(i): p.detach() for i, p in enumerate(changed)})
    require_equal(*found)


def test_warm_starts_take_a_device_too():
    for kind in ("taylor", "wanda-sp"):
        found = []
        for device in (None, CPU):
            model, masks = adapted()
            budget = Budget(model, 0.2, multiple_of=4)
            saliency.warm_start(kind, model, masks, budget, tokens(5, 20), device=device)
            found.append({"head": masks.head.detach(), "ffn": masks.ffn.detach()})
        require_equal(*found)


def test_hidden_states_stay_on_the_device_up_to_a_share_of_what_is_free(monkeypatch):
    model, ids = stock(), tokens(5, 20)
    size = ids.numel() * 32 * 4
    asked = []
    for depths, free, on_device in (
        (1, 4 * size, True),
        (1, 4 * size - 4, False),
        (2, 4 * size, False),
    ):
        monkeypatch.setattr(layer_by_layer, "free_bytes", lambda d, f=free: asked.append(d) or f)
        walk = Walk(model, ids.split(2), torch.device("cpu", 0), depths=depths)
        # The stand-in and the CPU are one; what is asked for tells them apart.
        walk.hidden = []
        chosen = walk._where_states_stay(torch.zeros(2, 20, 32))
        assert chosen == (torch.device("cpu", 0) if on_device else CPU)
    assert set(asked) == {torch.device("cpu", 0)}


def test_a_cpu_has_no_limit():
    assert free_bytes(CPU) >= 2**62


def test_a_prior_of_a_model_that_waits_elsewhere_travels(monkeypatch):
    model, config = stock(), SparsifyConfig(prior="wanda")
    expected = find_prior(model, tokens(5, 20), config)
    travelled, place = [], layer_by_layer.place
    monkeypatch.setattr(layer_by_layer, "place", lambda *a: (travelled.append(a), place(*a))[1])
    require_equal(find_prior(model, tokens(5, 20), config, device=CPU), expected)
    assert not travelled
    elsewhere = torch.device("cpu", 0)
    require_equal(find_prior(model, tokens(5, 20), config, device=elsewhere), expected)
    assert len(travelled) > len(list(model.parameters()))


def test_a_model_whose_weights_are_not_here_is_refused():
    with torch.device("meta"):
        model = stock()
    with pytest.raises(ValueError, match=r"embed_tokens.weight is on the meta device; load"):
        one_shot_masks(model, "wanda", tokens(5, 20), device=CPU)


FROM_FILES = """
import re, sys, torch
from transformers import AutoModelForCausalLM
from maskprune.two_four import one_shot_masks
from maskprune.hf.families import layers_of

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
device = torch.device("cpu") if sys.argv[2] == "block by block" else None
before, held = own(), []
for layer in layers_of(model):
    layer.mlp.register_forward_hook(lambda *_: held.append(own()))
masks = one_shot_masks(model, "wanda", torch.randint(0, 64, (4, 32)), device=device)
print(max(held) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_weights_mapped_from_files_stay_there(tmp_path):
    """In place every weight becomes memory of the process's own, since it is pruned for a while."""
    sizes = dict(hidden_size=512, intermediate_size=1536, head_dim=128, num_hidden_layers=16)
    stock(**sizes).save_pretrained(tmp_path)
    (tmp_path / "job.py").write_text(FROM_FILES)
    grown = {}
    for way in ("block by block", "in place"):
        command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        held, whole = map(int, done.stdout.split()[-2:])
        grown[way] = held / whole
    # A quarter of the bytes are the masks.
    assert grown["block by block"] < 0.5 and grown["in place"] > 1, grown


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("job", JOBS)
def test_on_cuda_a_model_in_the_host_s_memory_gives_the_bits_of_one_that_is_there(
    job, family, share, monkeypatch
):
    if (job, family) == ("taylor per sequence", "opt"):
        pytest.skip("OPT's FFN does not see which sequence a token is of")
    monkeypatch.setattr(layer_by_layer, "STATES_SHARE", share)
    model, masks = subject(job, family)
    model.cuda()
    expected = work(job, model, masks, blocks=tokens(5, 20).cuda())
    after = bits(model)
    model, masks = subject(job, family)
    require_equal(work(job, model, masks, torch.device("cuda")), expected)
    require_equal(bits(model), after)
    assert all(t.device == CPU for t in (*model.parameters(), *model.buffers()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("job", JOBS)
def test_on_cuda_less_than_a_third_of_the_model_is_there_at_once(job):
    sizes = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=48)
    model, masks = subject(job, "llama", **sizes)
    work(job, model, masks, torch.device("cuda"))  # cuBLAS takes its workspace.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(job, model, masks, torch.device("cuda"))
    whole = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < whole / 3
    assert torch.cuda.memory_allocated() == before
