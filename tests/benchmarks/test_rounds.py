"""The benchmark of rounds: what one removal does, and that pruned channels stay pruned."""

import pytest
import torch
from models import tiny_model, tokens

from benchmarks.quality.rounds import Student, remove
from maskprune.structured.compensation import RIDGE


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (5, 8), H (8, 8) of correlated inputs, G (5, 5)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    g = torch.randn(32, 5, generator=generator)
    return torch.randn(5, 8, generator=generator), x.T @ x, g.T @ g


def damped(H: torch.Tensor) -> torch.Tensor:
    H = H.double()
    return H + RIDGE * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def least_squares(W: torch.Tensor, H: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """The weights on `keep` alone that are nearest to W in the norm of H."""
    H, W = damped(H), W.double()
    best = torch.zeros_like(W)
    best[:, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ W.T).T
    return best


def test_removals_one_by_one_are_the_least_squares_of_all() -> None:
    W, H, _ = problem()
    new, gone = W.clone(), torch.zeros(8, dtype=torch.bool)
    remove(new, H, gone, torch.tensor([6, 1, 3]))
    assert gone.nonzero()[:, 0].tolist() == [1, 3, 6]
    torch.testing.assert_close(
        new.double(), least_squares(W, H, [0, 2, 4, 5, 7]), atol=1e-4, rtol=1e-4
    )
    assert (new[:, gone] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_choice_is_the_cheapest_after_its_least_squares(seed: int) -> None:
    W, H, G = problem(seed)
    new, gone = W.clone(), torch.zeros(8, dtype=torch.bool)
    remove(new, H, gone, G.expand(1, -1, -1))

    def cost(unit: int) -> float:
        change = least_squares(W, H, [i for i in range(8) if i != unit]) - W.double()
        return float(torch.trace(G.double() @ change @ damped(H) @ change.T))

    costs = [cost(unit) for unit in range(8)]
    assert gone.nonzero()[:, 0].tolist() == [costs.index(min(costs))]


def test_a_second_round_leaves_what_is_gone() -> None:
    W, H, G = problem()
    gone = torch.zeros(8, dtype=torch.bool)
    remove(W, H, gone, torch.tensor([2, 5]))
    first = W.clone()
    remove(W, H, gone, G.expand(3, -1, -1))
    assert gone.sum() == 5 and gone[[2, 5]].all()
    assert (W[:, gone] == 0).all() and not torch.equal(W, first)


def test_pruned_channels_stay_pruned_and_nothing_else_is_zero() -> None:
    model = tiny_model("llama")
    student = Student(model)
    ids = tokens()
    seen = student.look(ids)
    student.remove_heads(seen, 1)
    student.remove_units(seen, 5, "obs", torch.Generator())
    size = (
        model.config.head_dim * model.config.num_attention_heads // model.config.num_key_value_heads
    )
    for (kind, _), gone in student.gone.items():
        assert int(gone.sum()) == (size if kind == "head" else 5)
    student.model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1
    student.stay_pruned()
    for place, module in student.outputs.items():
        zero = (module.weight == 0).all(dim=0)
        assert torch.equal(zero, student.gone[place])
