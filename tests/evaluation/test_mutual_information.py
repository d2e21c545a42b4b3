"""Information of linear-Gaussian codes, in closed form, between its bounds."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.evaluation import mutual_information
from pvae.testing import LinearGaussianVAE

from .programs import Encoding, Latent, Layers
from .traces import everything


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_bounds_enclose_the_closed_form(float64: None) -> None:
    # z = x + 0.5 e in three dimensions, x of N(0, I): I = 3/2 log(1 + 4).
    exact, kl = 1.5 * math.log(5), 1.5 * (1.25 - 1 - math.log(1.25))
    low, high, rate, kl_low, kl_high = [], [], [], [], []
    for seed in range(12):
        found = mutual_information(
            Latent(), Encoding(scale=0.5), draws(150, 3, seed=seed), num_bootstrap=0, seed=seed
        )
        assert found.high is not None
        assert found.rate is not None
        assert found.kl_low is not None
        assert found.kl_high is not None
        low.append(found.low.value)
        high.append(found.high.value)
        rate.append(found.rate.value)
        kl_low.append(found.kl_low.value)
        kl_high.append(found.kl_high.value)
        assert found.rate.value - found.low.value == pytest.approx(found.kl_high.value)
    error = 4 * float(np.std(rate)) / math.sqrt(12)
    assert np.mean(low) - error < exact < np.mean(high) + error
    assert np.mean(rate) == pytest.approx(exact + kl, abs=error)
    assert np.mean(kl_low) < kl < np.mean(kl_high)
    assert np.mean(high) - np.mean(low) < 0.4


def test_of_an_exact_guide_the_rate_is_the_information() -> None:
    oracle = LinearGaussianVAE(x_dim=4, z_dim=2)
    x = oracle.model.sample(1500)
    weight = oracle.model.weight.detach()
    exact = 0.5 * float(torch.logdet(torch.eye(2) + weight.T @ weight / 0.25))
    found = mutual_information(oracle.model, oracle.exact_guide, x)
    assert found.high is not None
    assert found.rate is not None
    assert found.rate.low < exact < found.rate.high
    assert found.low.value < exact + (found.rate.high - found.rate.value)
    assert found.high.value - found.low.value < 0.15
    assert not found.saturated


def test_no_information_is_none() -> None:
    x = draws(200, 3).float()
    found = mutual_information(Latent(), Encoding(gain=0.0, scale=1.0), x)
    assert found.low.value == pytest.approx(0, abs=1e-5)
    assert found.high is not None
    assert found.high.value == pytest.approx(0, abs=1e-5)


def test_the_lower_bound_saturates_at_the_ceiling_and_says_so(float64: None) -> None:
    found = mutual_information(Latent(), Encoding(scale=1e-3), draws(50, 3))
    assert found.low.value == pytest.approx(math.log(50), abs=1e-6)
    assert found.ceiling == pytest.approx(math.log(50))
    assert found.saturated
    assert "saturated" in str(found)
    assert found.kl_low is not None
    assert found.kl_low.value < 0
    assert "<= KL" not in str(found)
    assert found.kl_high is not None
    assert found.rate is not None
    assert found.kl_high.value == pytest.approx(found.rate.value - math.log(50), abs=1e-6)


def test_under_labels_all_is_within_a_label(float64: None) -> None:
    y = torch.arange(120) % 3
    x = 4.0 * y.unsqueeze(-1) + draws(120, 3)
    found = mutual_information(Latent(label_weight=4.0), Encoding(scale=0.5), x, y)
    assert found.conditional
    assert found.ceiling == pytest.approx(math.log(40))
    assert found.high is not None
    parts = [
        mutual_information(Latent(loc=4.0 * k), Encoding(scale=0.5), x[y == k], num_bootstrap=0)
        for k in range(3)
    ]
    each = np.mean([part.low.value for part in parts])
    assert found.low.value == pytest.approx(each, abs=0.35)  # other draws
    # The label's own log 3 nats are no part of it.
    assert found.low.value < 1.5 * math.log(5) + 0.3
    alone = mutual_information(Latent(label_weight=4.0), Encoding(), x[:3], y[:3], num_bootstrap=0)
    assert alone.high is None
    assert alone.kl_low is None
    assert alone.saturated


def test_several_sites_count_together(float64: None) -> None:
    found = mutual_information(Layers(), Layers(guide=True), draws(400, 3))
    # z_2 = x_12 / 2 + e / 2; z_1 = x_3 / 2 + z_2 . 1 + e' / 2: I = 3/2 log 2.
    assert found.high is not None
    assert found.low.low < 1.5 * math.log(2) < found.high.high
    assert found.low.value == pytest.approx(1.5 * math.log(2), abs=0.2)


def test_it_changes_nothing_and_follows_its_seed() -> None:
    model, guide, x = Latent(), Encoding(), draws(40, 3).float()
    guide.train()
    before = everything(model, guide)
    first = mutual_information(model, guide, x, num_bootstrap=20)
    assert everything(model, guide) == before
    torch.manual_seed(5)
    assert mutual_information(model, guide, x, num_bootstrap=20) == first
    assert mutual_information(model, guide, x, num_bootstrap=20, seed=1) != first
    record = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert record["low"]["value"] == first.low.value
    assert json.dumps(mutual_information(model, guide, x, num_bootstrap=0).to_dict(), allow_nan=False)


def test_bad_arguments_are_named() -> None:
    model, guide, x = Latent(), Encoding(), draws(4, 3).float()
    with pytest.raises(ValueError, match="x must hold at least two data, got 1"):
        mutual_information(model, guide, x[:1])
    with pytest.raises(ValueError, match="num_bootstrap must not be negative, got -1"):
        mutual_information(model, guide, x, num_bootstrap=-1)
    with pytest.raises(ValueError, match="the same latents"):
        mutual_information(Layers(), guide, x)
