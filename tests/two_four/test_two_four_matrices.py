"""Wanda and SparseGPT obey their papers' laws on one matrix."""

from __future__ import annotations

import pytest
import torch

from maskprune.two_four import (
    hard_mask,
    matrices,
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
