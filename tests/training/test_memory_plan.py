"""The planned bytes are those that a model on this machine holds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model

from maskprune.cli import main
from maskprune.structured.masks import attach_masks
from maskprune.structured.student import cut_student
from maskprune.training.memory_plan import Load, largest_micro_batch, memory_parts
from maskprune.two_four import attach_two_four

SIZES = dict(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,
)


def saved_bytes(model, run):
    """Bytes that autograd keeps from `run()` for the backward, parameters not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    assert kept.requires_grad
    return sum(found.values())


def bfloat16_copies(model):
    """Bytes of bfloat16 that autograd keeps, of the shapes that trained matrices have."""
    shapes = {p.shape for p in model.parameters() if p.requires_grad and p.dim() == 2}
    found = {}

    def pack(x):
        if x.dtype == torch.bfloat16 and (x.shape in shapes or x.shape[::-1] in shapes):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(3, model.config.vocab_size, (1, 7))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        kept = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert kept.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("two_four", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_planned_bytes_are_those_that_training_holds(two_four, checkpointed):
    model = tiny_model("llama", **SIZES).train()
    base = model
    if two_four:
        masks = attach_two_four(model)
        trained = masks.parameters()
    else:
        rank = {"o_proj": 32, "down_proj": 32}
        settings = LoraConfig(
            r=8, rank_pattern=rank, alpha_pattern=rank, target_modules="all-linear"
        )
        model = get_peft_model(model, settings)
        masks = attach_masks(model)
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
    load = Load(two_four=two_four, batch_size=4, seq_len=64, output_r=32, computed=4)
    parts = memory_parts(base.config, load, 1)
    weights = base.num_parameters() - sum(
        p.numel() for n, p in base.named_parameters() if "lora_" in n or "maskprune" in n
    )
    if two_four:
        weights -= sum(p.numel() for p in trained)
    name = "logits of 2:4 masks" if two_four else "adapters"
    assert parts["weights"] == 4 * weights
    assert parts[name] == 4 * sum(p.numel() for p in trained)
    assert parts["their moments"] == 2 * parts[name]
    if not two_four:
        held = 16 * sum(p.numel() for p in masks.parameters())
        assert parts["masks, gradient, moments"] == held

    planned, slack = parts["activations"], 0
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        layer = planned // SIZES["num_hidden_layers"]
        planned = memory_parts(base.config, replace(load, gradient_checkpointing=True), 1)
        # What stays between the blocks, while none is run again; and the final norm's two inputs.
        planned, slack = planned["activations"] - layer, 2 * 4 * 64 * 4 * SIZES["hidden_size"]
    ids = torch.randint(3, base.config.vocab_size, (4, 64))
    # A frozen input would make checkpointing keep nothing.
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    decoder = base.get_decoder()
    got = saved_bytes(
        model, lambda: decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
    )
    assert 0.85 * got - slack <= planned <= 1.15 * got, planned / got


def test_trained_weights_are_planned_as_the_student_holds_them():
    model = tiny_model("llama", **SIZES)
    masks = attach_masks(model).requires_grad_(False)
    masks.ffn[:, ::2] = 0
    student, _ = cut_student(model, masks, "mistral")
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    gone = 1 - trained / sum(p.numel() for p in model.get_decoder().layers.parameters())
    parts = memory_parts(model.config, Load(train="weights", sparsity=gone), 1)
    # The last norm is trained, too, and is none of a block's.
    assert abs(parts["weights in training"] - 4 * trained) <= 4 * SIZES["hidden_size"]
    assert parts["their gradient"] == parts["weights in training"]
    assert parts["their moments"] == 2 * parts["weights in training"]
    held = 4 * sum(p.numel() for p in student.parameters())
    both = parts["weights in training"] + parts["rest of the student"]
    assert abs(both - held) <= 4 * SIZES["hidden_size"]
    # Norms, which autocast leaves as they are, are counted among what it copies.
    norms = sum(p.numel() for p in student.parameters() if p.requires_grad and p.dim() == 1)
    copies = 2 * (trained - norms)
    assert copies == bfloat16_copies(student)
    assert copies <= parts["their copies in bfloat16"] <= copies + 2 * norms
    assert "their copies in bfloat16" not in memory_parts(
        model.config, Load(train="weights", sparsity=gone, computed=4), 1
    )
    dense = memory_parts(model.config, Load(), 1)
    assert parts["weights"] == dense["weights"] and parts["activations"] < dense["activations"]


@pytest.mark.parametrize("other", [["--two-four"], ["--shard", "full"]])
def test_plan_refuses_what_trains_no_weights_or_shards_them(tmp_path, capsys, other):
    config = tiny_model("llama", **SIZES).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = [] if other == ["--two-four"] else ["--sparsity", "0.3"]
    call = ["plan", str(tmp_path), *asked, "--gpus", "2", "--train", "weights", *other]
    assert main(call) != 0
    assert "train is weights" in capsys.readouterr().err


def test_plan_of_trained_weights_shards_nothing(tmp_path, capsys):
    config = tiny_model("llama", **SIZES).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    call = ["plan", str(tmp_path), "--sparsity", "0.3", "--multiple_of", "8", "--gpus", "2"]
    assert main([*call, "--train", "weights", "--gpu-memory", "0.003"]) == 0
    said = capsys.readouterr().out
    assert "weights in training" in said and "rest of the student" in said
    assert "does not fit" in said and "--shard full" not in said


def test_more_devices_share_the_activations_alone():
    config = tiny_model("llama", **SIZES).config
    one, four = (memory_parts(config, Load(), n) for n in (1, 4))
    assert four["activations"] * 4 == one["activations"]
    assert four["weights"] == one["weights"] and four["adapters"] == one["adapters"]
    states = sum(v for k, v in one.items() if k not in ("activations", "logits of the vocabulary"))
    assert largest_micro_batch(config, Load(), 1, states) is None
    assert largest_micro_batch(config, Load(), 1, 1e12) == 16
    with pytest.raises(ValueError, match="do not divide over 3 devices"):
        memory_parts(config, Load(), 3)


@pytest.mark.parametrize("two_four", [False, True])
def test_sharded_states_fall_with_the_devices(two_four):
    config = tiny_model("llama", **SIZES).config
    one = memory_parts(config, Load(two_four=two_four), 1)
    four = memory_parts(config, Load(two_four=two_four, sharded=True), 4)
    for name in [*one][1:4]:
        assert four[name] == one[name] // 4
    outside = 4 * (2 * config.vocab_size + 1) * SIZES["hidden_size"]
    assert four["weights"] - outside == (one["weights"] - outside) // 4
    assert four["gathered blocks"] and not four["buckets that DDP sends"]
    assert not one["gathered blocks"]


def test_plan_shards_what_does_not_fit_whole(tmp_path, capsys):
    config = tiny_model("llama", **(SIZES | dict(num_hidden_layers=32))).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    call = ["plan", str(tmp_path), "--two-four", "--gpus", "8", "--gradient-checkpointing"]
    call += ["--batch-size", "16", "--seq-len", "64"]
    for memory, shard, told in (
        ("80", "auto", "every device holds the whole model"),
        ("0.03", "auto", "\nfits 0.03 GB"),
        ("0.03", "auto", "each holds its part of the blocks (--shard full)"),
        ("0.03", "auto", ", with --shard full and --gradient-accumulation"),
        ("0.03", "none", "\ndoes not fit 0.03 GB"),
    ):
        assert main([*call, "--gpu-memory", memory, "--shard", shard]) == 0
        assert told in capsys.readouterr().out


def test_plan_says_what_fits_and_what_would(tmp_path, capsys):
    config = tiny_model("llama", **SIZES).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    call = ["plan", str(tmp_path), "--sparsity", "0.3", "--multiple_of", "8", "--gpus", "2"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "memory of each of 2 devices" in said and "\nfits 80 GB" in said
    assert "least number of devices: 1" in said
    assert main([*call, "--gpu-memory", "0.03"]) == 0
    said = capsys.readouterr().out
    assert "does not fit 0.03 GB" in said and "on 2 devices it fits with" in said
    call = ["plan", str(tmp_path), "--two-four", "--gpus", "2", "--gpu-memory", "0.001"]
    assert main(call) == 0
    assert "no number of devices up to --batch-size is enough" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--two-four"]) == 2
    assert "give --gpus N too" in capsys.readouterr().err
