"""Wanda and SparseGPT obey their papers' laws, block after block, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from models import KINDS, tiny_model, tokens
from peft import LoraConfig, get_peft_model

from maskprune.hf.families import layers_of
from maskprune.two_four import (
    apply_masks,
    hard_mask,
    is_two_four,
    matrices,
    one_shot,
    one_shot_masks,
    oriented,
    prunable,
    sparsegpt,
    wanda_scores,
)

# Against the definition in the same precision.
RTOL = {torch.float64: 1e-10, torch.float32: 2e-3}


def problem(rows=24, width=160, n=400, seed=0, dtype=torch.float64):
    """W and H of inputs that are correlated and of very different size."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=g, dtype=torch.float64)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64) / width**0.5
    X = (torch.eye(width, dtype=torch.float64) + mix) @ torch.randn(
        width, n, generator=g, dtype=torch.float64
    )
    X *= torch.rand(width, 1, generator=g, dtype=torch.float64) * 3 + 0.1
    return W.to(dtype), (2 / n * X @ X.T).to(dtype)


def damped(H, damping=0.01):
    H = H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    H.diagonal().add_(damping * H.diagonal().mean())
    return H


def as_published(W, H, update):
    """Algorithm 1 for 2:4 with a column at a time, in the order in which the paper writes it."""
    W = W.clone()
    W[:, H.diagonal() == 0] = 0
    U = torch.linalg.cholesky(torch.linalg.inv(damped(H)), upper=True)
    keep = torch.ones_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if j % 4 == 0:
            score = W[:, j : j + 4] ** 2 / U.diagonal()[j : j + 4] ** 2
            keep[:, j : j + 4].scatter_(1, score.topk(2, dim=1, largest=False).indices, False)
        q = W[:, j] * keep[:, j]
        e = (W[:, j] - q) / U[j, j]
        if update:
            W[:, j:] -= e[:, None] * U[j, j:]
        W[:, j] = q
    return W, keep


def test_wanda_scores_are_weight_times_input_norm():
    W = torch.tensor([[1.0, -2.0, 3.0, -4.0], [2.0, 2.0, 2.0, 2.0]])
    s = wanda_scores(W, torch.tensor([8.0, 3.0, 1.0, 0.0]))
    assert s.tolist() == [[8, 6, 3, 0], [16, 6, 2, 0]]
    assert wanda_scores(W.bfloat16(), torch.ones(4)).dtype == torch.float32


def test_a_worked_example_moves_the_pruned_weight_to_its_correlated_neighbour():
    # Inputs 0 and 1 are equal, 2 and 3 alone; without damping w_0 goes into w_1 whole.
    H = torch.eye(4, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1 - 1e-9
    W = torch.tensor([[1.0, 1.1, 3.0, 0.5]], dtype=torch.float64)
    W_hat, mask, loss = sparsegpt(W, H, damping=0.0)
    assert mask.tolist() == [[False, True, True, False]]
    torch.testing.assert_close(W_hat, torch.tensor([[0, 2.1, 3.0, 0]], dtype=torch.float64))
    torch.testing.assert_close(loss, torch.tensor(0.5 * 0.5**2, dtype=torch.float64))


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("width", [4, 128, 132, 260])
def test_sparsegpt_is_the_published_algorithm(width, update):
    W, H = problem(width=width)
    W_hat, mask, _ = sparsegpt(W, H, update)
    expected, keep = as_published(W, H, update)
    assert torch.equal(mask, keep)
    torch.testing.assert_close(W_hat, expected, rtol=RTOL[torch.float64], atol=1e-10)


def test_the_loss_is_half_the_damped_quadratic_error():
    W, H = problem()
    W_hat, _, loss = sparsegpt(W, H)
    D = W - W_hat
    torch.testing.assert_close(loss, (D @ damped(H) @ D.T).trace() / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("columns", [4, 8, 16, 64, 1024])
def test_the_result_does_not_depend_on_how_many_columns_are_updated_at_once(columns):
    W, H = problem()
    W_hat, mask, loss = sparsegpt(W, H)
    again = sparsegpt(W, H, columns=columns)
    assert torch.equal(again[1], mask)
    torch.testing.assert_close(again[0], W_hat, rtol=RTOL[torch.float64], atol=1e-12)
    torch.testing.assert_close(again[2], loss)


@pytest.mark.parametrize("update", [True, False])
def test_with_a_diagonal_h_the_mask_is_wanda_s(update):
    W, H = problem()
    diagonal = H.diagonal().diag()
    for damping in (0.0, 0.01):
        norm = damped(diagonal, damping).diagonal().sqrt()
        mask = sparsegpt(W, diagonal, update, damping=damping)[1]
        assert torch.equal(mask, hard_mask(wanda_scores(W, norm)))


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_half_of_every_group_is_plus_zero(dtype, update):
    W, H = problem()
    given = W.to(dtype), H.float() if dtype == torch.bfloat16 else H.to(dtype)
    before = [t.clone() for t in given]
    W_hat, mask, loss = sparsegpt(*given, update)
    assert (mask.view(24, -1, 4).sum(-1) == 2).all()
    assert not W_hat[~mask].any() and not W_hat[~mask].signbit().any() and W_hat[mask].all()
    assert W_hat.dtype == loss.dtype == given[1].dtype
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    if not update:
        assert torch.equal(W_hat[mask], given[0].to(W_hat.dtype)[mask])


def test_updates_lower_the_error_and_so_does_a_better_score():
    W, H = problem()

    def error(W_hat):
        D = W - W_hat
        return float((D @ H @ D.T).trace())

    magnitude = error(W.masked_fill(~hard_mask(W.abs()), 0))
    wanda = error(W.masked_fill(~hard_mask(wanda_scores(W, H.diagonal().sqrt())), 0))
    assert error(sparsegpt(W, H)[0]) < wanda < magnitude
    assert error(sparsegpt(W, H, False)[0]) < magnitude


def test_rows_are_independent_and_the_scale_of_h_does_not_matter():
    W, H = problem()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    W_hat, mask, _ = sparsegpt(W, H)
    moved = sparsegpt(W[order], H * 4)
    assert torch.equal(moved[1], mask[order])
    torch.testing.assert_close(moved[0], W_hat[order], rtol=RTOL[torch.float64], atol=1e-12)


def test_float32_finds_the_weights_of_float64():
    W, H = problem()
    exact, mask, _ = sparsegpt(W, H)
    W_hat, found, _ = sparsegpt(W.float(), H.float())
    assert (found == mask).double().mean() > 0.999
    both = (found == mask).all(1)
    torch.testing.assert_close(
        W_hat[both].double(), exact[both], rtol=RTOL[torch.float32], atol=RTOL[torch.float32]
    )


@pytest.mark.parametrize("update", [True, False])
def test_inputs_that_are_always_zero_lose_their_weights_first(update):
    W, H = problem(width=16)
    for j in (1, 2, 4, 5, 6, 7):
        H[j] = H[:, j] = 0
    W_hat, mask, _ = sparsegpt(W, H, update)
    expected = [True, False, False, True, True, True, False, False]
    assert (mask[:, :8] == torch.tensor(expected)).all()
    assert not W_hat[:, 4:8].any()
    assert (mask.view(24, 4, 4).sum(-1) == 2).all()


def test_an_indefinite_h_is_damped_ten_times_more_until_it_works():
    W, H = problem(width=8, dtype=torch.float32)
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    H = vectors @ values.diag() @ vectors.T
    U, _ = matrices.inverse_factor(H)
    expected = torch.linalg.inv(damped(H, 0.1))
    torch.testing.assert_close(U.T @ U, expected, rtol=RTOL[torch.float32], atol=1e-4)
    assert torch.equal(sparsegpt(W, H)[1], sparsegpt(W, H, damping=0.1)[1])


@pytest.mark.parametrize(
    "W, H, text",
    [
        (torch.zeros(2, 8), -torch.ones(8, 8) * 1e3 + torch.eye(8), "not positive definite"),
        (torch.zeros(2, 8), torch.full((8, 8), float("nan")), "H is not finite"),
        (torch.zeros(2, 6), torch.eye(6), r"W \(2, 6\).*4 divides"),
        (torch.zeros(2, 8), torch.eye(4), r"H \(4, 4\).*\(I, I\)"),
        (torch.full((2, 4), float("nan")), torch.eye(4), "NaN"),
    ],
)
def test_matrices_that_cannot_be_pruned_are_refused(W, H, text):
    with pytest.raises(ValueError, match=text):
        sparsegpt(W, H)


def test_products_are_float32_whatever_the_caller_allows_and_the_setting_is_restored():
    places = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(place, "fp32_precision") for place in places):
        pytest.skip("torch before 2.9 has no precision per backend")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(KeyError), matrices.full_float32():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
            raise KeyError
        assert [place.fp32_precision for place in places] == ["tf32", "bf16"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(before, model):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def hooks(model):
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@torch.no_grad()
def sequentially(model, method, blocks, update):
    """The definition: for each block, the whole model as it is by then, once over all tokens."""
    model, masks = copy.deepcopy(model), {}
    for layer in layers_of(model):
        inside = set(layer.modules())
        linears = {name: m for name, m in prunable(model).items() if m in inside}
        seen: dict[str, torch.Tensor] = {}

        def see(name, args, seen=seen):
            seen[name] = args[0].flatten(0, -2).float()

        for name, module in linears.items():
            module.register_forward_pre_hook(lambda m, args, name=name, see=see: see(name, args))
        model(blocks)
        for name, module in linears.items():
            x, W = seen[name], oriented(module)
            if method == "wanda":
                masks[name] = hard_mask(wanda_scores(W, x.norm(dim=0)))
                W_hat = W
            else:
                W_hat, masks[name], _ = sparsegpt(W, 2 / len(blocks) * x.T @ x, update)
            W.copy_((W_hat if update else W).masked_fill(~masks[name], 0))
    return masks, model


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", KINDS)
def test_masks_are_those_of_the_definition_and_the_model_is_as_before(family, method, monkeypatch):
    # Three micro-batches, the last of another size.
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 40)
    model, blocks = tiny_model(family), tokens(5, 20)
    before = bits(model)
    masks = one_shot_masks(model, method, blocks)
    assert same(before, model) and not hooks(model)
    expected, _ = sequentially(model, method, blocks, False)
    assert list(masks) == list(prunable(model))
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.sum() * 2 == mask.numel()
        assert torch.equal(mask, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma3_text"])
def test_updated_weights_are_written_and_nothing_else_is(family, monkeypatch):
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 40)
    model, blocks = tiny_model(family), tokens(5, 20)
    _, expected = sequentially(model, "sparsegpt", blocks, True)
    before = bits(model)
    masks = one_shot_masks(model, "sparsegpt", blocks, update=True)
    changed = dict(prunable(expected))
    for name, module in prunable(model).items():
        W, m = oriented(module), masks[name]
        assert is_two_four(W) and not W[~m].any() and not W[~m].signbit().any()
        torch.testing.assert_close(W, oriented(changed[name]), rtol=2e-3, atol=2e-4)
        assert not torch.equal(before.pop(f"{name}.weight"), module.weight)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], old) for name, old in before.items())


def test_block_one_reads_what_the_pruned_block_zero_puts_out():
    model, blocks = tiny_model("llama"), tokens(4, 20)
    masks = one_shot_masks(model, "wanda", blocks)
    first = layers_of(model)[0]
    with torch.no_grad():
        for name, module in prunable(model).items():
            if name.startswith("model.layers.0."):
                module.weight.masked_fill_(~masks[name], 0.0)
    seen = []
    layers_of(model)[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(blocks)
    norm = seen[0].flatten(0, 1).norm(dim=0)
    W = layers_of(model)[1].mlp.up_proj.weight
    assert torch.equal(masks["model.layers.1.mlp.up_proj"], hard_mask(wanda_scores(W, norm)))
    assert is_two_four(first.mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_with_attention_of_their_own_kind_keep_it(method):
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", sliding_window=4, layer_types=kinds)
    blocks = tokens(3, 24)
    masks = one_shot_masks(model, method, blocks)
    expected, _ = sequentially(model, method, blocks, False)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("family", KINDS)
def test_magnitude_needs_no_text(family):
    model = tiny_model(family)
    before = bits(model)
    masks = one_shot_masks(model, "magnitude")
    assert same(before, model)
    for name, module in prunable(model).items():
        assert torch.equal(masks[name], hard_mask(oriented(module).abs()))
    apply_masks(model, masks)


@pytest.mark.parametrize("update", [True, False])
def test_a_bfloat16_model_is_pruned_with_statistics_in_float32(update):
    model, blocks = tiny_model("llama", dtype=torch.bfloat16), tokens(6, 20)
    before = bits(model)
    masks = one_shot_masks(model, "sparsegpt", blocks, update=update)
    assert all(mask.sum() * 2 == mask.numel() for mask in masks.values())
    assert same(before, model) is not update
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    if update:
        assert all(is_two_four(oriented(module)) for module in prunable(model).values())


def test_the_size_of_micro_batches_and_the_caller_s_autocast_change_nothing(monkeypatch):
    model, blocks = tiny_model("llama"), tokens(5, 20)
    whole = one_shot_masks(model, "wanda", blocks)
    monkeypatch.setattr(one_shot, "TOKENS_AT_ONCE", 1)
    with torch.autocast("cpu", torch.bfloat16):
        single = one_shot_masks(model, "wanda", blocks)
    assert all(torch.equal(whole[name], mask) for name, mask in single.items())


def test_linears_that_read_one_tensor_share_its_statistics(monkeypatch):
    groups = []
    kept = one_shot._statistics

    def watch(*args, **options):
        groups.append(kept(*args, **options))
        return groups[-1]

    monkeypatch.setattr(one_shot, "_statistics", watch)
    one_shot_masks(tiny_model("llama"), "sparsegpt", tokens(4, 20))
    ends = [[name.rsplit(".", 1)[1] for name in names] for names, _ in groups[1]]
    assert ends == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]] + [
        ["down_proj"]
    ]


def test_inside_a_peft_wrapper_the_base_layers_are_pruned():
    model, blocks = tiny_model("llama"), tokens(4, 20)
    expected = one_shot_masks(model, "wanda", blocks)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    masks = one_shot_masks(wrapped, "wanda", blocks)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_each_module_s_mode_is_as_before():
    model = tiny_model("llama").train()
    layers_of(model)[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    one_shot_masks(model, "wanda", tokens(2, 8))
    assert [module.training for module in model.modules()] == modes


def test_progress_counts_blocks():
    seen = []
    one_shot_masks(
        tiny_model("llama"), "wanda", tokens(2, 8), progress=lambda *done: seen.append(done)
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_linear_and_leave_the_model(method, value):
    model = tiny_model("llama").train()
    with torch.no_grad():
        layers_of(model)[1].post_attention_layernorm.weight[3] = value
    before = {name: p.view(torch.int32).clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.gate_proj are not finite"):
        one_shot_masks(model, method, tokens(3, 12))
    assert all(torch.equal(before[n], p.view(torch.int32)) for n, p in model.named_parameters())
    assert not hooks(model) and all(module.training for module in model.modules())


@pytest.mark.parametrize("update", [True, False])
def test_an_error_half_way_leaves_the_block_as_it_was(update, monkeypatch):
    model = tiny_model("llama")
    before = bits(model)
    done = []
    real = one_shot.inverse_factor

    def breaks(H):
        done.append(H)
        if len(done) == 6:
            raise ValueError("no inverse")
        return real(H)

    monkeypatch.setattr(one_shot, "inverse_factor", breaks)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj: no inverse"):
        one_shot_masks(model, "sparsegpt", tokens(3, 12), update=update)
    for name, p in model.named_parameters():
        pruned = update and ".0." in name and "proj" in name
        assert torch.equal(before[name], p) is not pruned, name
    assert not hooks(model)


@pytest.mark.parametrize(
    "method, blocks, options, text",
    [
        ("wnda", None, {}, "'wnda'; expected one of sparsegpt, wanda, magnitude"),
        ("wanda", tokens(), {"update": True}, "only sparsegpt updates"),
        ("wanda", None, {}, "blocks are None; expected token ids"),
        ("sparsegpt", tokens().float(), {}, "torch.float32"),
        ("wanda", tokens()[0], {}, r"\(20,\)"),
        ("wanda", tokens(0, 20), {}, r"\(0, 20\)"),
    ],
)
def test_calls_that_make_no_sense_are_refused(method, blocks, options, text):
    with pytest.raises(ValueError, match=text):
        one_shot_masks(tiny_model("llama"), method, blocks, **options)


def test_nan_among_the_weights_names_the_linear():
    model = tiny_model("llama")
    with torch.no_grad():
        layers_of(model)[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        one_shot_masks(model, "magnitude")
