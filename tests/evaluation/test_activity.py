"""Active units of encoders whose means are known."""

import json
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae.data import from_tensors
from pvae.evaluation import active_units
from pvae.testing import LinearGaussianVAE
from tests.inference.programs import LinearGuide, LinearModel

from .programs import Encoding, Latent, Layers


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_variance_of_the_posterior_means() -> None:
    oracle = LinearGaussianVAE(x_dim=5, z_dim=3)
    x = oracle.model.sample(200)
    found = active_units(oracle.model, oracle.exact_guide, x)
    torch.testing.assert_close(found.variance, oracle.posterior(x)[0].var(0))
    torch.testing.assert_close(found.prior_scale, torch.ones(3).double(), rtol=0, atol=0.1)
    assert found.count == int((oracle.posterior(x)[0].var(0) > 0.01).sum())


def test_a_collapsed_encoder_has_no_active_unit(float64: None) -> None:
    found = active_units(Latent(), Encoding(gain=0.0, scale=1.0), draws(50, 3))
    assert found.variance.tolist() == [0, 0, 0]
    assert found.count == found.relative_count == 0
    still = active_units(LinearModel(), _silent(LinearGuide()), torch.randn(50, 5).double())
    assert still.count == 0


def test_thresholds_are_absolute_or_in_prior_scales(float64: None) -> None:
    x = draws(400, 3) * torch.tensor([1.0, 0.15, 0.05])
    found = active_units(Latent(), Encoding(), x)
    assert (found.count, found.relative_count) == (2, 2)
    assert active_units(Latent(), Encoding(), x, threshold=0.5).count == 1
    # Ten times the scale everywhere: only the relative count knows that nothing has changed.
    wide = active_units(Latent(scale=10.0), Encoding(gain=10.0), x)
    assert (wide.count, wide.relative_count) == (3, 2)
    assert found.active.tolist() == [True, True, False]


def test_noise_of_averaged_draws_is_no_activity(float64: None) -> None:
    x = draws(300, 3) * torch.tensor([0.0, 0.0, 1.0])
    # E z_1 = x_3 / 2, averaged over draws of z_2 whose sum has variance 1/2.
    found = active_units(Layers(), Layers(guide=True), x, num_draws=10)
    assert found.variance[:2].tolist() == [0, 0]
    assert found.variance[2].item() == pytest.approx((x[:, 2] / 2).var().item(), abs=0.02)
    still = active_units(Layers(), Layers(guide=True), 0 * x, num_draws=10)
    assert still.variance[2] < 0.01 < 0.05  # the averages' own variance


def test_a_split_brings_contexts_to_a_conditional_model_only(float64: None) -> None:
    seen: list[Any] = []

    class Guide(Encoding):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append(y)
            return super().forward(x, y)

    split = from_tensors(draws(30, 3).float(), y=torch.arange(30) % 2, name="pairs").train
    active_units(Latent(label_weight=2.0), Guide(), split)
    assert all(y is not None for y in seen)
    seen.clear()
    active_units(Latent(), Guide(), split)
    assert all(y is None for y in seen)


def test_it_leaves_the_programs_and_generators() -> None:
    model, guide = Latent(), Encoding()
    guide.train()
    state = torch.get_rng_state()
    first = active_units(model, guide, draws(40, 3).float())
    assert guide.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert first.to_dict() == active_units(model, guide, draws(40, 3).float()).to_dict()
    assert not pyro.get_param_store().keys()


def test_it_prints_one_line_and_goes_into_json(float64: None) -> None:
    found = active_units(Latent(), Encoding(), draws(50, 3))
    assert str(found).startswith("3 of 3 units active")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["active_units"] == 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_draws must be positive, got 0"):
        active_units(Latent(), Encoding(), torch.zeros(4, 3), num_draws=0)
    with pytest.raises(ValueError, match="x must hold at least two data, got 1"):
        active_units(Latent(), Encoding(), torch.zeros(1, 3))

    def outside(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="must lie in the plate"):
        active_units(Latent(), outside, torch.zeros(4, 3))


def _silent(guide: LinearGuide) -> LinearGuide:
    torch.nn.init.zeros_(guide.encoder.weight)
    return guide


def test_intervals_cover_the_variance_and_say_where_they_leave_a_doubt(float64: None) -> None:
    scale = torch.tensor([1.0, 0.1, 0.01])
    covered = []
    for seed in range(60):
        found = active_units(Latent(), Encoding(), draws(150, 3, seed=seed) * scale, num_draws=1, seed=seed)
        assert found.reach is not None
        low, high = found.reach.T
        assert bool(((low <= found.variance) & (found.variance <= high)).all())
        covered.append((low <= scale**2) & (scale**2 <= high))
        assert found.count_reach is not None
        sure, perhaps = found.count_reach
        assert sure <= found.count <= perhaps
    share = torch.stack(covered).double().mean()
    assert 0.86 < share < 0.99
    # The second unit's variance is the threshold itself.
    assert found.count_reach == (1, 2)
    assert "1 to 2 by its intervals" in str(found)
    record = found.to_dict()
    assert record["active_units_reach"] == (1, 2)
    assert found.by_site["z"].count_reach == (1, 2)
    bare = active_units(Latent(), Encoding(), draws(50, 3), num_bootstrap=0)
    assert bare.reach is None
    assert bare.count_reach is None
    assert bare.relative_count_reach is None
    assert "intervals" not in str(bare)
    with pytest.raises(ValueError, match="num_bootstrap must not be negative, got -1"):
        active_units(Latent(), Encoding(), draws(50, 3), num_bootstrap=-1)
