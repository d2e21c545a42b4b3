"""Bits per dimension against entropies in closed form, and against probabilities of levels."""

import math

import pytest
import scipy.stats
import torch

from pvae.evaluation import bits_per_dimension


def test_a_uniform_density_gives_the_bits_of_the_levels() -> None:
    assert bits_per_dimension(0.0, 784) == pytest.approx(8.0, abs=1e-12)
    assert bits_per_dimension(0.0, 3, levels=17) == pytest.approx(math.log2(17), abs=1e-12)
    # On [-1, 1] and on [0, 256] the same data have the densities 1/2 and 1/256 for each entry.
    assert bits_per_dimension(-784 * math.log(2), 784, width=2.0) == pytest.approx(8.0, abs=1e-12)
    assert bits_per_dimension(-784 * math.log(256), 784, width=256.0) == pytest.approx(8.0, abs=1e-12)
    # Halving the density everywhere costs one bit in all.
    assert bits_per_dimension(-math.log(2), 10) == pytest.approx(8.1, abs=1e-12)


@pytest.mark.parametrize("width", [1.0, 2.0, 5.0])
def test_a_density_constant_within_levels_gives_their_entropy(width: float) -> None:
    levels, x_dim = 5, 2
    p = torch.tensor([0.4, 0.1, 0.25, 0.2, 0.05], dtype=torch.float64)
    entropy = scipy.stats.entropy(p.numpy(), base=2)
    # Independent entries: P(k) spread over its cell of width w / L.
    log_prob = (p * (p / (width / levels)).log()).sum() * x_dim
    assert bits_per_dimension(float(log_prob), x_dim, levels, width) == pytest.approx(entropy, abs=1e-12)


def test_noise_makes_an_upper_bound_on_the_bits_of_the_levels() -> None:
    levels, normal = 8, scipy.stats.norm(0.4, 0.1)
    for k in range(levels):
        u = (torch.arange(1000).double() + 0.5) / 1000
        density = float(torch.from_numpy(normal.logpdf(((k + u) / levels).numpy())).mean())
        mass = normal.cdf((k + 1) / levels) - normal.cdf(k / levels)
        assert bits_per_dimension(density, 1, levels) > -math.log2(mass) + 1e-4


def test_tensors_come_back_datum_by_datum() -> None:
    log_prob = torch.tensor([0.0, -math.log(2), 3.0]).double()
    found = bits_per_dimension(log_prob, 4, 16)
    assert found.tolist() == pytest.approx([bits_per_dimension(v, 4, 16) for v in log_prob.tolist()])


@pytest.mark.parametrize("name", ["x_dim", "levels", "width"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        bits_per_dimension(0.0, **({"x_dim": 4} | {name: 0}))
