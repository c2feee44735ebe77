"""Calibration block by block: the same bits as with the whole model, one block away at a time.

A CPU stands in for the device: the blocks then compute on copies, as they do on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from models import KINDS, randomise, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from maskprune.config import SparsifyConfig
from maskprune.hf.families import FAMILIES, ffn_output, layers_of, output_names, stock_model
from maskprune.hf.head import head_of
from maskprune.structured import saliency
from maskprune.structured.budget import Budget
from maskprune.structured.compensation import compensate
from maskprune.structured.masks import attach_masks
from maskprune.training import layer_by_layer
from maskprune.training.layer_by_layer import Walk, free_bytes, lent
from maskprune.two_four import one_shot, one_shot_masks
from maskprune.two_four.sparsify import find_prior

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


@pytest.fixture(autouse=True)
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


class Watch:
    """Where each tensor of a model is: at home, or in a copy that `place` made."""

    def __init__(self, model, monkeypatch):
        base = stock_model(model)
        self.layers = layers_of(model)
        self.owner = {}
        for index, layer in enumerate(self.layers):
            self.owner |= {id(t): index for t in (*layer.parameters(), *layer.buffers())}
        self.tensors = [*base.parameters(), *base.buffers()]
        self.homes = {id(t): t.data_ptr() for t in self.tensors}
        self.where = {t.data_ptr(): self.owner.get(id(t), "around") for t in self.tensors}
        self.travelled, self.copies, self.most = [], [], 0
        self.seen = []
        monkeypatch.setattr(layer_by_layer, "place", self.place)
        for index, layer in enumerate(self.layers):
            module = ffn_output(layer, FAMILIES[base.config.model_type])
            module.register_forward_pre_hook(lambda *_, index=index: self.see(index))
        head_of(model).module.register_forward_pre_hook(lambda *_: self.see("head"))

    def place(self, tensor, device):
        self.travelled.append(self.where[tensor.data_ptr()])
        copy = tensor.to(device, copy=True)
        self.copies.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        self.copies = [(ref, size) for ref, size in self.copies if not ref.expired()]
        self.most = max(self.most, sum(size for _, size in self.copies))
        return copy

    def away(self):
        return {
            self.owner.get(id(t), "around")
            for t in self.tensors
            if t.numel() and t.data_ptr() != self.homes[id(t)]
        }

    def see(self, what):
        away = self.away()
        # Only to learn what a block returns is one there together with what is around the blocks.
        assert away in ({what}, {"around"} if what == "head" else {"around", 0})
        for t in self.tensors:
            if t.numel() and self.owner.get(id(t), "around") in away:
                assert t.data_ptr() != self.homes[id(t)], "part of it stayed at home"
        self.seen.append((what, away))

    def bytes_of(self, *parts):
        return sum(t.nbytes for t in self.tensors if self.owner.get(id(t), "around") in parts)

    def require_home(self):
        assert not self.away()
        assert all(ref.expired() for ref, _ in self.copies), "a copy outlives its turn"


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
@pytest.mark.parametrize("job", JOBS)
def test_one_block_is_away_at_a_time_and_travels_once_a_pass(job, family, monkeypatch):
    model, masks = subject(job, family, **({} if family == "gpt_neo" else {"num_hidden_layers": 4}))
    watch = Watch(model, monkeypatch)
    work(job, model, masks, CPU)
    watch.require_home()
    owners = [watch.owner.get(id(t)) for t in watch.tensors]
    sizes = {index: owners.count(index) for index in range(len(watch.layers))}
    # Walks: one, and another where the ranking's sums come first.
    walks = 1 + (job == "compensate on both")
    for index, size in sizes.items():
        extra = index == 0
        assert watch.travelled.count(index) == size * (TRAVELS[job] + extra) * walks
    # What is around the blocks: before the first one, and for the logits where there is a loss.
    walked = walks + job.startswith("taylor")
    assert watch.travelled.count("around") == owners.count(None) * walked
    assert watch.most <= watch.bytes_of("around", 0)
    alone = [what for what, away in watch.seen if away == {what}]
    assert all(alone.count(index) >= 3 for index in sizes), "batches did not run in their turn"


def test_a_pass_that_brought_weights_for_every_batch_would_be_seen(monkeypatch):
    model = stock()
    watch = Watch(model, monkeypatch)
    walk = Walk(model, tokens(5, 20).split(2), CPU)
    with torch.no_grad(), walk.turn(0), walk.turn(1), pytest.raises(AssertionError):
        walk.run(0, replace=True)
    watch.require_home()


@pytest.mark.parametrize("job", JOBS)
def test_parameters_are_the_same_objects_in_the_same_memory(job):
    model, masks = subject(job)
    before = [(t, t.data_ptr(), t.requires_grad) for t in model.parameters()]
    values = bits(model)
    work(job, model, masks, CPU)
    after = list(model.parameters())
    assert all(p is q for (p, _, _), q in zip(before, after, strict=True))
    assert [(p.data_ptr(), p.requires_grad) for p in after] == [b[1:] for b in before]
    assert all(p.grad is None for p in after)
    if job in ("wanda", "sparsegpt", "wanda_sp", "taylor", "taylor per sequence"):
        require_equal(bits(model), values)


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


def break_in(where, model, monkeypatch):
    second = layers_of(model)[1]
    if where == "in the second block":
        second.register_forward_hook(fail)
    elif where == "at the head":
        head_of(model).module.register_forward_hook(fail)
    else:
        place, fourth = layer_by_layer.place, list(second.parameters())[3].data_ptr()

        def broken(tensor, device):
            return fail() if tensor.data_ptr() == fourth else place(tensor, device)

        monkeypatch.setattr(layer_by_layer, "place", broken)


@pytest.mark.parametrize("where", ["in the second block", "while it travels", "at the head"])
@pytest.mark.parametrize("job", JOBS)
def test_an_error_brings_all_home(job, where, monkeypatch):
    if where == "at the head" and not job.startswith("taylor"):
        pytest.skip("it does not get there")
    model, masks = subject(job)
    before, trained = bits(model), [p.requires_grad for p in model.parameters()]
    watch = Watch(model, monkeypatch)
    break_in(where, model, monkeypatch)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(Broken):
        work(job, model, masks, CPU)
    gc.collect()
    watch.require_home()
    # What updates weights has finished the first block.
    now, finished = bits(model), job in ("sparsegpt, updating", "compensate")
    same = {name: torch.equal(now[name], before[name]) for name in before}
    assert all(same.values()) is not finished
    assert all(same[name] for name in same if ".0." not in name)
    assert all("forward" not in vars(layer) for layer in watch.layers)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not model.training and (masks is None or masks.enabled)


def test_what_is_kept_comes_home_and_nothing_else_does():
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    homes = a.data_ptr(), b.data_ptr()
    with torch.no_grad(), lent([a, b], CPU, keep=[a]):
        a.fill_(1)
        b.fill_(1)
        assert (a.data_ptr(), b.data_ptr()) != homes
    assert (a.data_ptr(), b.data_ptr()) == homes
    assert a.tolist() == [1, 1, 1] and b.tolist() == [0, 0, 0]
    with contextlib.suppress(KeyError), torch.no_grad(), lent([a], CPU, keep=[a]):
        a.fill_(2)
        raise KeyError
    assert a.tolist() == [1, 1, 1]


def test_autocast_forgets_what_it_cast_of_weights_that_are_home_again():
    w, x = torch.nn.Parameter(torch.zeros(2, 2)), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with lent([w], CPU):
            with torch.no_grad():
                w.fill_(1)
            assert functional.linear(x, w).tolist() == [[2, 2]]
        assert functional.linear(x, w).tolist() == [[0, 0]]


def test_a_block_s_own_forward_is_put_back():
    model = stock()
    first = layers_of(model)[0]
    own = first.forward
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    first.forward = counted
    expected = one_shot_masks(stock(), "wanda", tokens(5, 20))
    require_equal(one_shot_masks(model, "wanda", tokens(5, 20), device=CPU), expected)
    assert vars(first)["forward"] is counted and calls


def test_taylor_keeps_no_activation_of_a_block_alive():
    model, masks = adapted()
    alive, most = [], 0

    def note(module, args):
        nonlocal most
        alive.append(weakref.ref(args[0]))
        gc.collect()
        most = max(most, sum(x() is not None for x in alive))

    for layer in layers_of(model):
        ffn_output(layer, FAMILIES["llama"]).register_forward_pre_hook(note)
    work("taylor", model, masks, CPU)
    gc.collect()
    # Twelve runs of W_down, each batch's graph gone before the next one's.
    assert len(alive) == 13 and most == 1
    assert not any(x() is not None for x in alive)


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
