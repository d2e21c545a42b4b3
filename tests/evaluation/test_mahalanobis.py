"""Squared distances against SciPy's, under the covariance that scikit-learn shrinks."""

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from pvae.evaluation import fit_cloud


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_are_scipys_under_the_shrunk_covariance() -> None:
    scale = torch.tensor([0.1, 1.0, 30.0])
    codes = draws(40, 3) @ draws(3, 3, seed=1) * scale + 2.0
    cloud = fit_cloud(codes)
    mean, spread = codes.mean(0).numpy(), codes.std(0).numpy()
    shrunk = LedoitWolf(assume_centered=True).fit((codes.numpy() - mean) / spread)
    inverse = np.linalg.inv(shrunk.covariance_ * np.outer(spread, spread))
    other = draws(5, 3, seed=2) * scale
    expected = [scipy.spatial.distance.mahalanobis(c, mean, inverse) ** 2 for c in other.numpy()]
    assert cloud.distance(other).numpy() == pytest.approx(expected, rel=1e-6)
    assert cloud.shrinkage == pytest.approx(shrunk.shrinkage_)
    assert cloud.num_codes == 40


def test_of_many_gaussian_codes_they_are_chi_square() -> None:
    map_ = draws(4, 4, seed=3)
    cloud = fit_cloud(draws(20_000, 4) @ map_)
    found = cloud.distance(draws(2000, 4, seed=1) @ map_)
    assert scipy.stats.kstest(found.numpy(), scipy.stats.chi2(4).cdf).pvalue > 1e-3


def test_few_codes_and_still_units_are_no_trouble() -> None:
    codes = torch.cat([draws(10, 30), torch.full((10, 1), 3.0)], -1)
    cloud = fit_cloud(codes)
    distance = cloud.distance(torch.cat([codes, codes + 1.0]))
    assert bool(distance.isfinite().all())
    assert cloud.shrinkage > 0
    assert distance[10:].mean() > distance[:10].mean()


def test_units_of_the_codes_do_not_matter() -> None:
    codes, other = draws(50, 3), draws(9, 3, seed=1)
    scale = torch.tensor([1e-3, 1.0, 1e4])
    assert torch.allclose(
        fit_cloud(codes).distance(other), fit_cloud(codes * scale).distance(other * scale), rtol=1e-6
    )


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"codes must have shape \(M, d\) with M >= 2, got \(1, 3\)"):
        fit_cloud(draws(1, 3))
    with pytest.raises(ValueError, match="codes must be finite, got 1 other entries"):
        fit_cloud(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"codes must have shape \(N, 3\), got \(4, 2\)"):
        fit_cloud(draws(9, 3)).distance(draws(4, 2))
