"""Precision and recall against scikit-learn's neighbours, and where the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pvae.evaluation import precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_it_equals_neighbourhoods_by_scikit_learn(neighbours: int) -> None:
    real, made = normal(1200, 3), 0.7 * normal(1100, 3, seed=1) + 0.5

    def radii(z: Any) -> Any:
        return NearestNeighbors(n_neighbors=neighbours).fit(z).kneighbors()[0][:, -1]

    r, g = real.numpy(), made.numpy()
    distance = np.sqrt(((r[:, None] - g) ** 2).sum(-1))
    around_real, around_made = distance <= radii(r)[:, None], distance <= radii(g)
    found = precision_recall(real, made, neighbours=neighbours)
    assert found.precision == pytest.approx(around_real.any(0).mean())
    assert found.recall == pytest.approx(around_made.any(1).mean())
    assert found.density == pytest.approx(around_real.sum() / (neighbours * len(g)))
    assert found.coverage == pytest.approx(around_real.any(1).mean())
    assert 0 < found.recall < found.precision < 1


def test_a_dropped_mode_costs_recall_and_noise_costs_precision() -> None:
    centre = torch.tensor([20.0, 0.0], dtype=torch.float64)
    real = torch.cat([normal(400, 2), normal(400, 2, seed=1) + centre])
    dropped = precision_recall(real, normal(800, 2, seed=2))
    assert dropped.precision > 0.9
    assert dropped.recall == pytest.approx(0.5, abs=0.05)
    assert dropped.coverage == pytest.approx(0.5, abs=0.05)
    away = normal(400, 2, seed=4) - 50
    noisy = precision_recall(real, torch.cat([real[::2] + 1e-6, away]))
    assert noisy.precision == pytest.approx(0.5)
    assert noisy.recall > 0.95


def test_the_same_set_scores_one() -> None:
    real = normal(100, 5)
    found = precision_recall(real, real)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density > 1
    assert "precision 1.000, recall 1.000" in str(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "a must have shape .* at least 4"),
        (
            lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), neighbours=0),
            "neighbours must be positive",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
