"""TWO-NN on manifolds of known dimension, and on ratios drawn from its own law."""

import numpy as np
import pytest

from pvae.density import NeighbourSearch, two_nn


@pytest.mark.parametrize("method", ["fit", "mle"])
@pytest.mark.parametrize("dim", [0.5, 2, 11.3])
def test_it_finds_the_exponent_of_pareto_ratios(dim: float, method: str) -> None:
    # P(mu > t) = t^-D: log mu is exponential with rate D.
    rng = np.random.default_rng(0)
    first = rng.random(20_000) + 0.1
    radii = np.stack([first, first * np.exp(rng.exponential(1 / dim, 20_000))], 1)
    assert two_nn(radii, method=method) == pytest.approx(dim, rel=0.02)  # type: ignore[arg-type]


def test_both_methods_by_hand() -> None:
    # log mu = log 2 times 1, 2, 3, 4; of four points the lowest 90 % are three.
    radii = np.array([[1.0, 16], [3, 6], [1, 8], [2, 8]])
    ranks = np.array([1, 2, 3])
    height = -np.log(1 - ranks / 4)
    slope = (ranks * height).sum() / (ranks**2).sum() / np.log(2)
    assert two_nn(radii) == pytest.approx(slope, rel=1e-14)
    assert two_nn(radii, method="mle") == pytest.approx(3 / (10 * np.log(2)), rel=1e-14)
    assert two_nn(radii, fraction=0.5) == pytest.approx(
        (np.array([1, 2]) @ height[:2]) / 5 / np.log(2), rel=1e-14
    )


def test_a_bent_sheet_in_many_dimensions_has_its_own_dimension() -> None:
    rng = np.random.default_rng(1)
    sheet = rng.random((5000, 2))
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    bent = np.stack([np.sin(3 * sheet[:, 0]), np.cos(3 * sheet[:, 0]), sheet[:, 1]], 1)
    points = np.pad(bent, ((0, 0), (0, 9))) @ rotation
    assert two_nn(NeighbourSearch(points).among(2).radii) == pytest.approx(2, abs=0.12)


@pytest.mark.parametrize(
    ("radii", "options", "said"),
    [
        (np.ones((10, 1)), {}, r"radii must have shape \(N, k\) .* got \(10, 1\)"),
        (np.ones((2, 2)), {}, r"N at least 3 .* got \(2, 2\)"),
        (np.ones((10, 2)), {}, "at different distances, got equal ones, as on a grid: give the dimension"),
        (np.tile([0.0, 1], (9, 1)), {}, "radii must be positive, got 9 first neighbours at distance 0"),
        (np.tile([1.0, 2], (9, 1)), {"fraction": 1}, "fraction must lie between 0 and 1, got 1"),
        (np.tile([1.0, 2], (9, 1)), {"method": "map"}, "method must be 'fit' or 'mle', got 'map'"),
    ],
)
def test_what_it_refuses(radii: np.ndarray, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        two_nn(radii, **options)  # type: ignore[arg-type]
