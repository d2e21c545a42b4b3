"""Agreement of two log-densities of the same data, against SciPy and against laws that are known."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import density_agreement


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("digits", [12, 0])
def test_every_figure_is_scipys_with_and_without_ties(digits: int) -> None:
    rho = (3 * draws(80)).round(decimals=digits)
    s = (0.5 * rho + draws(80, 1) - 4).round(decimals=digits)
    found = density_agreement(s, rho, num_bootstrap=0)
    a, b = s.numpy(), rho.numpy()
    expected = {
        "ks": scipy.stats.ks_2samp(a, b).statistic,
        "ks_centred": scipy.stats.ks_2samp(a - a.mean(), b - b.mean()).statistic,
        "wasserstein": scipy.stats.wasserstein_distance(a, b),
        "wasserstein_centred": scipy.stats.wasserstein_distance(a - a.mean(), b - b.mean()),
        "pearson": scipy.stats.pearsonr(a, b).statistic,
        "spearman": scipy.stats.spearmanr(a, b).statistic,
        "offset": (a - b).mean(),
        "slope": scipy.stats.linregress(b, a).slope,
    }
    assert list(found.measures()) == list(expected)
    for name, value in expected.items():
        assert found.measures()[name].value == pytest.approx(value, abs=1e-12), name
        assert math.isnan(found.measures()[name].low)
    assert found.pull_mean is None
    assert found.pull_std is None
    assert found.num_data == 80


def test_errors_that_are_as_large_as_they_say_have_a_standard_normal_pull() -> None:
    truth, sigma = 2 * draws(4000), 0.2 + draws(4000, 2).abs()
    rho = truth + sigma * draws(4000, 1)
    found = density_agreement(truth, rho, sigma)
    assert found.pull_mean is not None
    assert found.pull_std is not None
    assert found.reliability is not None
    assert found.pull_mean.value == pytest.approx(0, abs=4 / math.sqrt(4000))
    assert found.pull_std.value == pytest.approx(1, abs=4 / math.sqrt(8000))
    assert found.pull_std.low < found.pull_std.value < found.pull_std.high
    share = 1 - float(sigma.square().mean() / rho.var())
    assert found.reliability.value == pytest.approx(share)
    # The slope is flattened by what is noise in rho, no more and no less.
    assert found.slope.value == pytest.approx(share, abs=0.03)
    too_small = density_agreement(truth, rho + 1, sigma / 2, num_bootstrap=0)
    assert too_small.pull_std is not None
    assert too_small.pull_mean is not None
    assert too_small.pull_std.value > 2
    assert too_small.pull_mean.value > 0  # the density is above log p(z)


def test_a_constant_between_the_two_is_seen_in_the_raw_figures_alone() -> None:
    rho = draws(500)
    found = density_agreement(rho - 7, rho, num_bootstrap=20)
    assert found.ks.value == 1
    assert found.wasserstein.value == pytest.approx(7)
    assert found.offset.value == pytest.approx(-7)
    assert found.ks_centred.value < 0.01
    assert found.wasserstein_centred.value == pytest.approx(0, abs=1e-12)
    assert found.pearson.value == pytest.approx(1)
    assert found.slope.value == pytest.approx(1)
    assert found.wasserstein_centred.low >= 0
    assert found.pearson.high <= 1
    assert found.ks.high <= 1


def test_a_prior_that_is_flat_has_no_correlation() -> None:
    found = density_agreement(torch.full((30,), 0.1).double(), draws(30), num_bootstrap=0)
    assert found.pearson.value == found.spearman.value == 0
    assert found.slope.value == pytest.approx(0, abs=1e-12)


def test_intervals_cover() -> None:
    covered = 0
    for repeat in range(50):
        rho = draws(150, 2 * repeat)
        s = 0.6 * rho + 0.8 * draws(150, 2 * repeat + 1)
        interval = density_agreement(s, rho, num_bootstrap=60, seed=repeat).pearson
        covered += interval.low < 0.6 < interval.high
    assert covered >= 42


def test_what_it_says() -> None:
    found = density_agreement(draws(50), draws(50, 1), torch.ones(50))
    record = json.loads(json.dumps(found.to_dict()))
    assert record["num_data"] == 50
    assert set(record["measures"]["ks"]) == {"value", "low", "high"}
    assert record["measures"]["pull_std"]["value"] == found.pull_std.value  # type: ignore[union-attr]
    assert "KS 0." in str(found)
    assert "pull" in str(found)
    assert "on 50 data" in str(found)
    assert len(found.to_markdown().splitlines()) == 2 + 11
    plain = density_agreement(draws(50), draws(50, 1), num_bootstrap=0)
    assert "pull" not in str(plain)
    assert json.loads(json.dumps(plain.to_dict()))["measures"]["ks"]["low"] is None
    assert density_agreement(draws(50), draws(50, 1), torch.ones(50)) == found


def test_bad_arguments_are_refused() -> None:
    s = draws(10)
    with pytest.raises(ValueError, match=r"log_prior must have shape \(N,\), got \(5, 2\)"):
        density_agreement(s.reshape(5, 2), s)
    with pytest.raises(ValueError, match="log_density must have one entry for each of the 10 data, got 9"):
        density_agreement(s, s[1:])
    with pytest.raises(ValueError, match="standard_error must have one entry"):
        density_agreement(s, s, s[1:])
    with pytest.raises(ValueError, match="standard_error must be positive, got 0"):
        density_agreement(s, s, torch.zeros(10))
    with pytest.raises(ValueError, match="log_density must be finite, got 1 other entries"):
        density_agreement(s, torch.from_numpy(np.where(np.arange(10) == 3, np.nan, 0.0)))
    with pytest.raises(ValueError, match="log_prior must hold at least 3 data, got 2"):
        density_agreement(s[:2], s[:2])
    with pytest.raises(ValueError, match="num_bootstrap must not be negative"):
        density_agreement(s, s, num_bootstrap=-1)
