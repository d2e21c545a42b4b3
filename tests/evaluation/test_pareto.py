"""k-hat against distributions whose tail index is known, and ArviZ row by row."""

import math

import numpy as np
import pytest
import torch

from pvae.evaluation import khat_share, khat_threshold, pareto_khat


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_it_finds_the_tail_of_pareto_weights(shape: float) -> None:
    rng = np.random.default_rng(0)
    log_w = shape * rng.exponential(size=(40, 5000))  # w = e^(k E) has a Pareto tail with index k
    khat = pareto_khat(torch.from_numpy(log_w))
    assert khat.mean().item() == pytest.approx(shape, abs=0.05)


def test_rows_are_fitted_each_by_itself() -> None:
    from arviz_stats.base import array_stats

    log_w = torch.randn(6, 200, dtype=torch.float64) * torch.arange(1.0, 7.0)[:, None]
    wanted = [float(array_stats.psislw(-row.numpy())[1]) for row in log_w]
    assert pareto_khat(log_w).tolist() == pytest.approx(wanted, abs=1e-12)
    shifted = log_w + torch.tensor([0.0, 1e3, -1e4, 5.0, -7.0, 0.0]).double()[:, None]
    torch.testing.assert_close(pareto_khat(shifted), pareto_khat(log_w), atol=1e-6, rtol=0)


def test_special_rows_leave_the_others_alone() -> None:
    log_w = torch.randn(7, 400, dtype=torch.float64)
    alone = pareto_khat(log_w)
    log_w[1] = -12.5  # equal weights: no tail
    log_w[2, 5] = math.nan
    log_w[3] = -math.inf
    log_w[4, :10] = -math.inf  # ten weights of zero
    log_w[6] = torch.arange(400) % 2  # two values: the tail has no spread
    khat = pareto_khat(log_w)
    assert khat[1] == -math.inf
    assert khat[2].isnan()
    assert khat[3].isnan()
    assert khat[4].isfinite()
    assert khat[6] == -math.inf
    torch.testing.assert_close(khat[[0, 5]], alone[[0, 5]])


def test_too_few_particles_give_no_khat() -> None:
    assert pareto_khat(torch.randn(3, 29)).isnan().all()
    assert pareto_khat(torch.randn(3, 30)).isfinite().all()


def test_the_threshold_is_that_of_the_paper() -> None:
    assert khat_threshold(10_000) == 0.7
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="num_particles must be positive"):
        khat_threshold(0)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_w must have shape \(N, K\)"):
        pareto_khat(torch.zeros(5))


def test_the_share_counts_what_is_known() -> None:
    k = torch.tensor([0.1, 0.69, 0.71, math.nan, -math.inf])
    assert khat_share(k, 10_000) == 0.25
    assert khat_share(k, 100) == 0.5  # a threshold of 0.5
    assert math.isnan(khat_share(k[3:4], 100))
