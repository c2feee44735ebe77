"""The noise of ops.gumbel_two_four: the published generator, its integers, the logarithms."""

import sys

import pytest
import torch
from test_gumbel_two_four import APPROXIMATE_G

gumbel = sys.modules["maskprune.ops.gumbel_two_four"]
# Key and counter, and the words that they give: kat_vectors of Random123, philox4x32 10.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_gives_its_published_words(counter, key, expected):
    words = gumbel.philox(*([torch.tensor(x) for x in xs] for xs in (counter, key)))
    assert tuple(word.item() for word in words) == expected


def test_the_six_integers_are_cut_from_the_published_words():
    a, b, c, d = KNOWN_ANSWERS[0][2]
    expected = [a >> 11, b >> 11, c >> 11, d >> 11]
    expected += [(a & 0x7FF) << 10 | b & 0x3FF, (c & 0x7FF) << 10 | d & 0x3FF]
    assert gumbel.noise(torch.tensor(0), 1)[:, 0].tolist() == expected


def test_noise_is_uniform_and_its_planes_are_independent():
    u = (gumbel.noise(torch.tensor(3), 50_000).double() + 0.5) / 2**21
    assert 0 < u.min() and u.max() < 1
    assert torch.equal(u.float().double(), u)
    assert ((u.mean(1) - 0.5).abs() < 4 * (1 / 12 / 50_000) ** 0.5).all()
    correlations = torch.corrcoef(torch.cat((u[:, 1:], u[:, :-1]))) - torch.eye(12)
    assert correlations.abs().max() < 4.5 / 50_000**0.5


@pytest.mark.parametrize("inner", [-1, 1])
@pytest.mark.parametrize("outer", [-1, 1])
def test_approximate_logarithms_at_their_worst_keep_the_budget_of_g(inner, outer):
    """lg2.approx errs by 2^-22, absolutely within (1/2, 2) and relatively outside; every n."""
    u = (torch.arange(2**21).double() + 0.5) / 2**21

    def approximate(log2, sign):
        return log2 + sign * 2.0**-22 * log2.abs().clamp(min=1)

    v = (1 - u).float()
    log2_e = 1 / torch.tensor(2.0).log()
    series = v * log2_e * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    exponential = torch.where(v <= 1 / 16, series.double(), -approximate(u.log2(), inner))
    error = (approximate(exponential.log2(), outer) - (-u.log2()).log2()) / log2_e.double()
    assert exponential.min() > 0 and error.abs().max() < APPROXIMATE_G
