"""Typicality is two-sided: a constant image of very high density is as strange as one of very low density."""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.evaluation import auroc, conformal_test, typicality


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_normal(x: Tensor) -> Tensor:
    return torch.from_numpy(scipy.stats.norm.logpdf(x.numpy())).sum(-1)


def test_it_catches_the_constant_image_that_the_density_prefers() -> None:
    training, inside = log_normal(draws(2000, 200)), log_normal(draws(500, 200, seed=1))
    plain = log_normal(0.02 * draws(100, 1, seed=2).expand(100, 200))
    assert plain.min() > inside.max()  # likelier than every datum
    assert auroc(-inside, -plain) == 0.0
    assert auroc(typicality(inside, training), typicality(plain, training)) == 1.0
    # By the entropy of the normal: 100 nats above, where the standard deviation of log p is 10.
    assert float(typicality(plain, training).mean()) == pytest.approx(100, abs=2)


def test_its_conformal_test_keeps_its_level() -> None:
    training = log_normal(draws(500, 20))
    calibration, inside = (typicality(log_normal(draws(400, 20, seed=i)), training) for i in (1, 2))
    strange = typicality(log_normal(0.3 * draws(100, 20, seed=3)), training)
    for level in conformal_test(calibration, inside, strange).levels:
        assert level.holds
        assert level.false_alarms.low <= level.alpha <= level.false_alarms.high
        assert level.detections.value > level.alpha


def test_it_is_the_distance_from_the_mean_of_minus_log_p() -> None:
    found = typicality(torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, -4.0]))
    assert found.tolist() == [0.0, 4.0]
    assert found.dtype == torch.float64


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"log_prob must have shape \(N,\), got \(2, 1\)"):
        typicality(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="training must be finite, got 1 other entries"):
        typicality(torch.zeros(2), torch.tensor([0.0, -math.inf]))
    with pytest.raises(ValueError, match="training must hold at least one"):
        typicality(torch.zeros(2), torch.zeros(0))
