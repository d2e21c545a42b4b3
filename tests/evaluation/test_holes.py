"""Planted holes are found, and none where the codes have the prior's distribution."""

import json

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import find_holes


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without_the_middle(num: int, radius: float, seed: int = 0) -> Tensor:
    z = draws(4 * num, 2, seed=seed)
    return z[z.norm(dim=1) > radius][:num]


def test_a_planted_hole_has_its_mass_and_its_place() -> None:
    codes, prior = without_the_middle(1500, 0.8), draws(1500, 2, seed=1)
    found = find_holes(codes, prior, level=0.05)
    inside = 1 - np.exp(-(0.8**2) / 2)  # mass of the disc
    assert found.found
    assert found.p_value < 1e-10
    # Draws near the rim have neighbours beyond it: too small, as it says.
    assert 0.2 * inside < found.mass.value < inside
    middle = prior.norm(dim=1) < 0.4
    assert bool(found.far[middle].double().mean() > 0.95)
    ring = (prior.norm(dim=1) > 0.9) & (prior.norm(dim=1) < 1.5)
    assert bool(found.far[ring].double().mean() < 0.1)
    assert str(found).endswith(f"(p = {found.p_value:.2g})")
    assert "of the prior in holes" in str(found)


@pytest.mark.parametrize("dim", [1, 30])
def test_none_are_reported_for_the_exact_prior(dim: int) -> None:
    p, shares = [], []
    for seed in range(100):
        found = find_holes(draws(120, dim, seed=2 * seed), draws(150, dim, seed=2 * seed + 1), seed=seed)
        p.append(found.p_value)
        shares.append(found.share.value)
    values = np.array(p)
    # 3 of 61: the largest level that 60 calibration codes can keep.
    assert np.mean(shares) == pytest.approx(3 / 61, abs=4 * float(np.std(shares)) / 10)
    for level in (0.01, 0.05, 0.3):
        assert scipy.stats.binom.sf((values <= level).sum() - 1, 100, level) > 1e-3
    assert values.mean() < 0.7
    assert "no holes found" in str(find_holes(draws(120, dim), draws(150, dim, seed=1)))


def test_distances_and_threshold_are_those_of_scipy() -> None:
    codes, prior = draws(41, 3), draws(25, 3, seed=1)
    found = find_holes(codes, prior, level=0.25, seed=3)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    tree = scipy.spatial.KDTree(codes[order[:20]].numpy())
    near, held = tree.query(prior.numpy())[0], tree.query(codes[order[20:]].numpy())[0]
    assert found.distance.numpy() == pytest.approx(near)
    assert found.code_distance.numpy() == pytest.approx(held)
    # floor(0.25 * 22) = 5: a draw is far if at most four of the 21 codes are at least as far.
    assert found.threshold == pytest.approx(np.sort(held)[-5])
    assert found.far.tolist() == [bool((held >= d).sum() <= 4) for d in near]
    assert found.share.value == pytest.approx((near > found.threshold).mean())


def test_what_it_writes_goes_into_json() -> None:
    found = find_holes(draws(40, 2), draws(30, 2, seed=1))
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["share"]["value"] == found.share.value
    assert (record["num_codes"], record["num_prior"]) == (20, 30)
    assert found.mass.low == max(0.0, (found.share.low - 0.05) / 0.95)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"codes must have shape \(N, d\) with N >= 20, got \(3, 2\)"):
        find_holes(draws(3, 2), draws(3, 2))
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        find_holes(draws(30, 2), draws(3, 3))
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 1"):
        find_holes(draws(30, 2), draws(3, 2), level=1.0)
