"""Bootstrap intervals: their coverage, and that what resampling adds is taken out."""

import math

import pytest
import torch
from torch import Tensor

from pvae.evaluation import Interval, bootstrap_intervals


def test_intervals_of_means_cover_them_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = torch.zeros(2)
    for repeat in range(150):
        a = torch.randn(60, generator=generator) + 1
        b = torch.rand(40, generator=generator)

        def statistic(i: Tensor, j: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return torch.stack([a[i].mean() - b[j].mean(), b[j].mean()])

        found = bootstrap_intervals(statistic, 60, 40, num_bootstrap=100, level=0.9, seed=repeat)
        truths = (0.5, 0.5)
        covered += torch.tensor([t.low < v < t.high for t, v in zip(found, truths, strict=True)])
    # Binomial standard error 0.025; percentile intervals of 40 and 60 data are a little short.
    assert ((covered / 150 - 0.88).abs() < 0.1).all()


def test_what_resampling_adds_is_taken_out() -> None:
    a = torch.randn(50, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def statistic(i: Tensor) -> Tensor:
        return a[i].mean(0).square().sum()

    # Resamples have twice the squared mean: all of their values may lie above the estimate.
    (interval,) = bootstrap_intervals(statistic, 50, num_bootstrap=200)
    assert interval.low < interval.value < interval.high
    (cut,) = bootstrap_intervals(statistic, 50, num_bootstrap=200, least=interval.value)
    assert cut.low == interval.value
    assert cut.high == interval.high


def test_no_resamples_leave_no_ends_and_a_seed_settles_all() -> None:
    def statistic(i: Tensor) -> Tensor:
        return i.double().mean()

    (bare,) = bootstrap_intervals(statistic, 5, num_bootstrap=0)
    assert bare.value == 2
    assert math.isnan(bare.low)
    state = torch.get_rng_state()
    first = bootstrap_intervals(statistic, 5, seed=3)
    assert first == bootstrap_intervals(statistic, 5, seed=3) != bootstrap_intervals(statistic, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(Interval(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]"


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_bootstrap": -1}, "num_bootstrap"), ({"level": 1.0}, "level must lie")]
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(lambda i: i.double().mean(), 5, **settings)  # type: ignore[arg-type]
