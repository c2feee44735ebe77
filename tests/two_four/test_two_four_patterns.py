"""2:4 masks: the weights they cover, exactly 2 of 4, packed without loss, applied without -0.0."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from maskprune.hf.families import FAMILIES, layers_of
from maskprune.two_four import (
    CANDIDATES,
    apply_masks,
    candidate_of,
    hard_mask,
    is_two_four,
    load_masks,
    mask_of,
    oriented,
    pack,
    prunable,
    save_masks,
    unpack,
)

ABOUT = {"source_model": "tiny", "method": "magnitude"}


def random_masks(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: hard_mask(torch.rand(oriented(module).shape, generator=g))
        for name, module in prunable(model).items()
    }


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(before, model):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_candidates_stand_in_the_published_order():
    rows = ["".join(str(int(kept)) for kept in row) for row in CANDIDATES]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([4, 3, 2, 1], [1, 1, 0, 0]),
        ([1, 4, 2, 3], [0, 1, 0, 1]),
        ([-1, -4, -2, -3], [1, 0, 1, 0]),
        ([5, 5, 5, 5], [1, 1, 0, 0]),
        ([1, 2, 2, 2], [0, 1, 1, 0]),
        ([2, 9, 2, 2], [1, 1, 0, 0]),
        ([0.0, -0.0, 0.0, 1.0], [1, 0, 0, 1]),
        ([float("inf"), 1, float("inf"), float("inf")], [1, 0, 1, 0]),
        ([float("-inf")] * 4, [1, 1, 0, 0]),
    ],
)
def test_the_two_largest_stay_and_ties_go_to_the_lower_index(scores, kept):
    assert hard_mask(torch.tensor([scores], dtype=torch.float32)).tolist() == [
        [bool(k) for k in kept]
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_the_mask_is_that_of_a_stable_sort(dtype):
    scores = torch.randint(-4, 4, (37, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    groups = scores.view(37, 10, 4)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    expected = torch.zeros(37, 10, 4, dtype=torch.bool).scatter_(-1, best, True).view(37, 40)
    assert torch.equal(hard_mask(scores), expected)
    assert torch.equal(hard_mask(scores.T.contiguous().T), expected)
    assert hard_mask(scores).sum() * 2 == scores.numel()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 4)])
def test_empty_and_smallest_matrices_have_masks(shape):
    mask = hard_mask(torch.rand(shape))
    assert mask.shape == shape and torch.equal(unpack(pack(mask), shape), mask)


@pytest.mark.parametrize(
    "scores, text",
    [
        (torch.zeros(2, 6), r"\(2, 6\).*4 divides"),
        (torch.zeros(8), r"\(8,\).*\(out, in\)"),
        (torch.tensor([[1.0, float("nan"), 0.0, 0.0]]), "NaN"),
    ],
)
def test_scores_that_have_no_two_four_order_are_refused(scores, text):
    with pytest.raises(ValueError, match=text):
        hard_mask(scores)


def test_two_four_means_at_most_two_nonzeros_in_a_group():
    assert is_two_four(torch.tensor([[1.0, 0, 0, 2, -0.0, 0, 0, 3]]))
    assert not is_two_four(torch.tensor([[0, 0, 0, 2, 1.0, 2, 3, 0]]))
    # Two of any four neighbours is not it: groups start at multiples of 4.
    assert not is_two_four(torch.tensor([[0.0, 1, 1, 1, 0, 0, 1, 1]]))
    assert not is_two_four(torch.zeros(2, 6))
    assert is_two_four(torch.zeros(0, 4))


def test_candidates_and_masks_are_each_other_s_inverse():
    candidates = torch.tensor([list(p) for p in permutations(range(6))], dtype=torch.uint8)
    mask = mask_of(candidates)
    assert mask.dtype == torch.bool and mask.shape == (720, 24)
    assert candidate_of(mask).dtype == torch.uint8
    assert torch.equal(candidate_of(mask), candidates)
    assert mask_of(torch.tensor([[0, 5]])).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


def test_masks_that_are_not_two_four_have_no_candidates():
    with pytest.raises(ValueError, match="1 of 2 groups"):
        candidate_of(torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0]]).bool())
    with pytest.raises(TypeError, match="torch.float32; expected torch.bool"):
        candidate_of(torch.zeros(1, 4))


@pytest.mark.parametrize("rows, groups", [(1, 1), (1, 2), (1, 3), (5, 7), (3, 4), (4, 100)])
def test_packing_loses_nothing_at_three_groups_a_byte(rows, groups):
    g = torch.Generator().manual_seed(rows)
    mask = mask_of(torch.randint(0, 6, (rows, groups), generator=g))
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-rows * groups // 3),)
    assert int(packed.max()) < 216
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_a_byte_holds_its_groups_in_base_six_from_the_lowest_digit():
    assert pack(mask_of(torch.tensor([[1, 2, 3], [5, 5, 5]]))).tolist() == [1 + 12 + 108, 215]
    # Rows follow one another without a gap.
    assert pack(mask_of(torch.tensor([[1, 2], [3, 4]]))).tolist() == [1 + 12 + 108, 4]


@pytest.mark.parametrize(
    "packed, shape",
    [
        ([216], (1, 12)),
        ([255], (1, 12)),
        ([6], (1, 4)),
        ([36], (1, 8)),
        ([0, 0], (1, 12)),
        ([], (1, 12)),
        ([0], (1, 10)),
    ],
)
def test_a_damaged_packing_is_refused(packed, shape):
    with pytest.raises(ValueError, match="damaged"):
        unpack(torch.tensor(packed, dtype=torch.uint8), shape)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_linear_inside_the_blocks_is_prunable_and_nothing_else(family):
    model = tiny_model(family)
    linears = prunable(model)
    prefix = f"{FAMILIES[family].layers}."
    expected = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }
    assert linears == expected
    ran = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
        for module in linears.values()
    ]
    model(torch.tensor([[3, 4, 5]]))
    for handle in handles:
        handle.remove()
    assert ran == list(linears.values())


def test_weights_are_seen_as_out_by_in():
    model = tiny_model("gpt2")
    (first, *_) = prunable(model).values()
    assert first.weight.shape == (32, 96) and oriented(first).shape == (96, 32)
    assert oriented(first).data_ptr() == first.weight.data_ptr()


def test_inside_a_peft_wrapper_the_base_layers_keep_their_stock_names():
    model = tiny_model("llama")
    names = list(prunable(model))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    linears = prunable(wrapped)
    assert list(linears) == names
    assert all(type(module) is nn.Linear for module in linears.values())


def test_a_width_that_four_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has 22 inputs; expected"):
        prunable(tiny_model("llama", intermediate_size=22))


def test_a_quantized_weight_is_refused_by_name():
    model = tiny_model("llama")
    module = layers_of(model)[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj has a weight of torch\.int8"):
        prunable(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_applied_masks_leave_plus_zero_and_touch_nothing_else(family, dtype):
    model = tiny_model(family, dtype=dtype)
    masks, before = random_masks(model), bits(model)
    apply_masks(model, masks)
    for name, module in prunable(model).items():
        W, m = oriented(module), masks[name]
        old = before[f"{name}.weight"]
        old = old if W.is_contiguous() else old.T
        assert torch.equal(W[m], old[m])
        assert not W[~m].any() and not W[~m].signbit().any()
        assert is_two_four(W)
        before.pop(f"{name}.weight")
    assert before
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], old) for name, old in before.items())


def test_tied_embeddings_are_left_alone():
    model = tiny_model("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.detach().clone()
    apply_masks(model, random_masks(model))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)


def spoiled(masks, kind):
    last = list(masks)[-1]
    if kind == "missing":
        return {name: mask for name, mask in masks.items() if name != last}
    if kind == "unknown":
        return masks | {"lm_head": masks[last]}
    if kind == "shape":
        return masks | {last: masks[last].T}
    return masks | {last: masks[last].float()}


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape", "dtype"])
def test_masks_of_another_model_are_refused_before_anything_changes(kind):
    model = tiny_model("llama")
    masks, before = random_masks(model), bits(model)
    with pytest.raises(ValueError, match="made for this model"):
        apply_masks(model, spoiled(masks, kind))
    assert same(before, model)


def test_saved_masks_come_back_with_their_metadata(tmp_path):
    masks = random_masks(tiny_model("phi3")) | {"empty": torch.zeros(0, 4, dtype=torch.bool)}
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks, ABOUT | {"note": "x"})
    found, about = load_masks(path)
    assert list(found) == list(masks) and about == ABOUT | {"note": "x"}
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert sum(t.numel() for t in load_file(path).values()) == sum(
        -(-mask.numel() // 12) for mask in masks.values()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


@pytest.mark.parametrize(
    "metadata",
    [{}, {"method": "x"}, ABOUT | {"seed": 1}, ABOUT | {"format_version": "2"}],
)
def test_metadata_that_the_file_cannot_hold_leaves_no_file(tmp_path, metadata):
    with pytest.raises(ValueError, match="expected strings"):
        save_masks(tmp_path / "m", random_masks(tiny_model("llama")), metadata)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "m"
    masks = random_masks(tiny_model("llama"))
    save_masks(path, masks, ABOUT)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="exactly 2 of 4"):
        save_masks(path, masks | {"x": torch.ones(1, 4, dtype=torch.bool)}, ABOUT)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_every_cut_of_a_file_is_one_clear_error(tmp_path):
    path = tmp_path / "m"
    save_masks(path, {"a": mask_of(torch.zeros(2, 5))}, ABOUT)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_masks(path)


HEADER = {"format": "maskprune-two-four-masks", "format_version": "1", "shapes": '{"a": [1, 12]}'}


@pytest.mark.parametrize(
    "changes, tensors, text",
    [
        ({"format": "maskprune-masks"}, {}, "not a file of 2:4 masks"),
        ({"format_version": "9"}, {}, "version 9; this maskprune reads 1"),
        ({"shapes": "{"}, {}, "shape of each mask"),
        ({"shapes": "[1]"}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"b": [1, 12]})}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"a": [1, 12.0]})}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"a": [1, 2, 6]})}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"a": [-1, -12]})}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"a": [0, 2**63]})}, {}, "shape of each mask"),
        ({"shapes": json.dumps({"a": [1, 24]})}, {}, "m, a: unpack.*save them again"),
        ({}, {"a": torch.tensor([216], dtype=torch.uint8)}, "m, a: unpack.*216"),
        ({}, {"a": torch.tensor([1.0])}, "m, a: unpack.*float32"),
        ({}, {"a": torch.zeros(1, 1, dtype=torch.uint8)}, "m, a: unpack"),
        ({}, {"b": torch.zeros(1, dtype=torch.uint8)}, "shape of each mask"),
    ],
)
def test_foreign_and_damaged_files_are_one_clear_error(tmp_path, changes, tensors, text):
    path = tmp_path / "m"
    save_file(tensors or {"a": torch.zeros(1, dtype=torch.uint8)}, path, metadata=HEADER | changes)
    with pytest.raises(ValueError, match=text):
        load_masks(path)


def test_a_file_of_another_kind_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_masks(tmp_path)
    (tmp_path / "text").write_text("no safetensors here, only a line of text")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_masks(tmp_path / "text")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a file of 2:4 masks"):
        load_masks(tmp_path / "weights")
