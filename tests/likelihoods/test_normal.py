"""Normal likelihood against SciPy; what a learned sigma does, and one that is fitted to each batch."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pvae.likelihoods import Bernoulli, Likelihood, Normal
from tests.distributions.tracing import host_syncs

IMAGE = (3, 2, 4)


def test_fixed_sigma_equals_scipy() -> None:
    mean, x = torch.randn(2, 5, *IMAGE, dtype=torch.float64).unbind()
    log_prob = Normal(value=0.25).double()(mean).log_prob(x)
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), 0.25).sum((1, 2, 3))
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-13)


def test_unit_sigma_is_half_the_squared_error() -> None:
    mean, x = torch.randn(2, 5, 6, dtype=torch.float64).unbind()
    expected = -0.5 * (x - mean).square().sum(-1) - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(Normal()(mean).log_prob(x), expected, rtol=0, atol=1e-12)


def test_sigma_per_channel_equals_scipy() -> None:
    likelihood = Normal("learned", value=0.3, channels=3).double()
    with torch.no_grad():
        likelihood.log_sigma.copy_(torch.tensor([-1.0, 0.0, 0.75]))
    sigma = 1e-3 + np.exp([-1.0, 0.0, 0.75])
    mean, x = torch.randn(2, 5, *IMAGE, dtype=torch.float64).unbind()
    expected = stats.norm.logpdf(x.numpy(), mean.numpy(), sigma[:, None, None]).sum((1, 2, 3))
    np.testing.assert_allclose(likelihood(mean).log_prob(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("channels", [None, 3])
def test_learned_sigma_starts_at_its_value(channels: int | None) -> None:
    likelihood = Normal("learned", value=0.2, channels=channels)
    assert likelihood.sigma.shape == (() if channels is None else (3,))
    torch.testing.assert_close(likelihood.sigma.detach(), torch.full_like(likelihood.sigma, 0.2))


def test_fixed_sigma_is_no_parameter_but_is_saved() -> None:
    likelihood = Normal(value=0.4)
    assert list(likelihood.parameters()) == []
    other = Normal(value=1.0)
    other.load_state_dict(likelihood.state_dict())
    assert other.sigma.item() == pytest.approx(0.4)


def test_gradient_of_sigma_vanishes_at_the_root_mean_square_error() -> None:
    mean, x = torch.randn(2, 5, 6, dtype=torch.float64).unbind()
    best = (x - mean).square().mean().sqrt().item()

    def gradient(value: float) -> float:
        likelihood = Normal("learned", value=value).double()
        # The start is held in double precision here.
        likelihood.log_sigma.data.fill_(math.log(value - likelihood.floor))
        (g,) = torch.autograd.grad(likelihood(mean).log_prob(x).sum(), likelihood.log_sigma)
        return g.item()

    assert gradient(best) == pytest.approx(0.0, abs=1e-10)
    assert gradient(0.9 * best) > 1
    assert gradient(1.1 * best) < -1


def test_learned_sigma_stays_above_its_floor_smoothly() -> None:
    likelihood = Normal("learned", floor=0.05)
    with torch.no_grad():
        likelihood.log_sigma.fill_(-10.0)
    assert likelihood.sigma.item() == pytest.approx(0.05, abs=1e-4)
    (gradient,) = torch.autograd.grad(likelihood.sigma, likelihood.log_sigma)
    assert gradient > 0


def test_channels_must_agree() -> None:
    likelihood = Normal("learned", channels=3)
    message = r"x_shape must begin with channels = 3, got \(1, 2, 4\)"
    with pytest.raises(ValueError, match=message):
        likelihood.param_shape((1, 2, 4))
    with pytest.raises(ValueError, match=message):
        likelihood(torch.zeros(5, 1, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": "optimal"}, "sigma must be 'fixed', 'learned', 'batch' or 'frozen', got 'optimal'"),
        ({"sigma": "frozen", "value": -1.0}, "value must be above 0 and floor at least 0, got -1 and 0.001"),
        ({"sigma": "batch", "value": 1e-4}, "value must be above 0.001 and floor at least 0, got 0.0001"),
        ({"sigma": "batch", "floor": 0.0}, "floor must be positive for sigma = 'batch', got 0"),
        ({"sigma": "batch", "channels": 0}, "channels must be positive, and None for a fixed sigma, got 0"),
        ({"sigma": "batch", "clamp": "none"}, "clamp must be 'hard', or 'soft' for sigma = 'batch', got"),
        (
            {"sigma": "learned", "clamp": "soft"},
            "clamp must be 'hard', or 'soft' for sigma = 'batch'",
        ),
        ({"value": 0.0}, "value must be above 0 and floor at least 0, got 0 and 0.001"),
        (
            {"sigma": "learned", "value": 1e-3},
            "value must be above 0.001 and floor at least 0, got 0.001 and 0.001",
        ),
        ({"floor": -1.0}, "value must be above 0 and floor at least 0, got 1 and -1"),
        ({"value": math.nan}, "value must be above 0 and floor at least 0, got nan and 0.001"),
        ({"channels": 3}, "channels must be positive, and None for a fixed sigma, got 3"),
        ({"sigma": "learned", "channels": 0}, "channels must be positive, and None for a fixed sigma, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normal(**arguments)  # type: ignore[arg-type]


def residuals(*batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means ``(*batch, 6, *IMAGE)`` and data ``(6, *IMAGE)``, each channel with errors of its own size."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*batch, 6, *IMAGE, generator=generator, dtype=torch.float64)
    x = torch.randn(6, *IMAGE, generator=generator, dtype=torch.float64)
    return mean, x + x * torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("channels", [None, 3])
def test_the_batch_is_scored_at_its_root_mean_square_error(
    batch: tuple[int, ...], channels: int | None
) -> None:
    mean, x = residuals(*batch)
    log_prob = Normal("batch", channels=channels).double()(mean, x).log_prob(x)
    assert log_prob.shape == (*batch, 6)
    errors = (x - mean).numpy().reshape(-1, *IMAGE)
    sigma = np.sqrt((errors**2).mean(axis=(0, 2, 3) if channels else None))
    scale = sigma[:, None, None] if channels else sigma
    expected = stats.norm.logpdf(errors, 0.0, scale).sum((1, 2, 3)).reshape(*batch, 6)
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-12)
    # n / 2 (log MSE + 1 + log 2 pi), with a third of the entries in each channel.
    bound = 0.5 * errors.size * (np.log(sigma**2).mean() + 1 + math.log(2 * math.pi))
    assert -log_prob.sum().item() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("entries", [1, 2, 24])
def test_a_batch_of_one_is_scored_at_its_own_error(entries: int) -> None:
    mean, x = torch.randn(2, 1, entries, dtype=torch.float64).unbind()
    p = Normal("batch").double()(mean, x)
    sigma = np.sqrt(np.mean((x - mean).numpy() ** 2))
    assert p.log_prob(x).item() == pytest.approx(
        -entries * (math.log(sigma) + 0.5 * math.log(2 * math.pi * math.e))
    )
    perfect = Normal("batch").double()(x, x).log_prob(x)
    assert perfect.item() == pytest.approx(-entries * math.log(1e-3 * math.sqrt(2 * math.pi)))


def test_no_sigma_scores_the_batch_better() -> None:
    mean, x = residuals()
    fitted = Normal("batch").double()(mean, x)
    best = (x - mean).square().mean().sqrt()
    torch.testing.assert_close(fitted.base_dist.scale, best.expand(6, *IMAGE), rtol=1e-14, atol=0)
    log_sigma = best.log().requires_grad_()
    nll = -torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(nll, log_sigma)
    assert gradient.item() == pytest.approx(0.0, abs=1e-10)
    for factor in np.linspace(0.5, 2.0, 16):
        other = torch.distributions.Normal(mean, factor * best).log_prob(x).sum()
        assert fitted.log_prob(x).sum() >= other


def test_the_gradient_of_the_mean_is_that_of_the_log_of_the_error() -> None:
    mean, x = residuals()
    mean.requires_grad_()
    (ours,) = torch.autograd.grad(-Normal("batch").double()(mean, x).log_prob(x).sum(), mean)
    mse = (x - mean).square().mean()
    (wanted,) = torch.autograd.grad(0.5 * x.numel() * mse.log(), mean, retain_graph=True)
    through_sigma = -torch.distributions.Normal(mean, mse.sqrt()).log_prob(x).sum()
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(through_sigma, mean)[0], ours, rtol=1e-12, atol=1e-13)


def test_a_soft_clamp_has_the_bias_of_its_formula_and_a_hard_one_none() -> None:
    sigma = torch.tensor([1e-4, 2e-3, 0.01, 0.1, 1.0], dtype=torch.float64)
    least = math.log(2e-3)
    soft = Normal("batch", floor=2e-3, clamp="soft").optimum(sigma.square())
    bias = torch.log1p(torch.exp(least - sigma.log()))
    torch.testing.assert_close(soft.log() - sigma.log(), bias, rtol=1e-12, atol=1e-13)
    assert (soft > 2e-3).all()
    hard = Normal("batch", floor=2e-3).optimum(sigma.square())
    torch.testing.assert_close(hard, torch.tensor([2e-3, 2e-3, 0.01, 0.1, 1.0], dtype=torch.float64))


def test_a_perfect_reconstruction_stands_on_the_floor() -> None:
    x = torch.rand(4, *IMAGE)
    likelihood = Normal("batch", floor=0.02)
    p = likelihood(x, x)
    torch.testing.assert_close(p.base_dist.scale, torch.full_like(x, 0.02))
    assert p.log_prob(x).isfinite().all()
    assert likelihood.sigma.item() == pytest.approx(0.02)


def test_an_evaluation_never_looks_at_the_batch() -> None:
    mean, x = residuals()
    likelihood = Normal("batch").double()
    fitted = likelihood(mean, x).log_prob(x)
    # In training mode a datum feels its companions ...
    assert not torch.allclose(likelihood(mean[:3], x[:3]).log_prob(x[:3]), fitted[:3])
    likelihood.freeze(0.9 * (x - mean).square().mean().sqrt())
    likelihood.eval()
    frozen = likelihood(mean, x).log_prob(x)
    # ... and here it does not, though the sum is lower.
    order = torch.tensor([4, 1, 5, 0, 2, 3])
    assert torch.equal(likelihood(mean[order], x[order]).log_prob(x[order]), frozen[order])
    assert torch.equal(likelihood(mean[:1], x[:1]).log_prob(x[:1]), frozen[:1])
    assert torch.equal(likelihood(mean).log_prob(x), frozen)
    assert frozen.sum() < fitted.sum()


@pytest.mark.parametrize("rho", [0.3, 1.0, 1.05, 2.5])
def test_refitting_flatters_by_its_formula(rho: float) -> None:
    mean, x = residuals()
    likelihood = Normal("batch").double()
    refitted = likelihood(mean, x).log_prob(x).sum()
    likelihood.freeze(((x - mean).square().mean() / rho).sqrt())
    honest = likelihood.eval()(mean, x).log_prob(x).sum()
    optimism = 0.5 * (rho - 1 - math.log(rho))
    assert (refitted - honest).item() / x.numel() == pytest.approx(optimism, rel=1e-9, abs=1e-12)
    assert rho != 1.05 or optimism == pytest.approx(0.0006, abs=1e-5)


@pytest.mark.parametrize("channels", [None, 3])
def test_the_moving_average_follows_training_alone(channels: int | None) -> None:
    likelihood = Normal("batch", value=0.7, channels=channels).double()
    torch.testing.assert_close(likelihood.sigma, torch.full_like(likelihood.sigma, 0.7))
    errors = []
    for seed in range(5):
        mean, x = residuals(seed=seed)
        likelihood(mean, x)
        squares = (x - mean).square().numpy()
        errors.append(squares.mean((0, 2, 3)) if channels else squares.mean())
        weights = 0.99 ** np.arange(seed, -1, -1)
        average = np.average(errors, axis=0, weights=weights)
        np.testing.assert_allclose(likelihood.sigma.numpy(), np.sqrt(average), rtol=1e-12)
    before = likelihood.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    likelihood(mean)
    with torch.no_grad():
        likelihood(mean, x)
    likelihood.eval()(mean, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in likelihood.state_dict().items())


def test_training_any_further_discards_what_was_measured() -> None:
    mean, x = residuals()
    likelihood = Normal("batch").double()
    likelihood.freeze(0.3)
    with torch.no_grad():
        likelihood(mean, x)
    assert likelihood.sigma.item() == 0.3
    likelihood.check_held_out()
    likelihood(mean, x)
    assert likelihood.sigma.item() == pytest.approx((x - mean).square().mean().sqrt().item())
    with pytest.raises(ValueError, match="must be measured"):
        likelihood.check_held_out()


def test_without_data_a_draw_has_the_stored_sigma() -> None:
    likelihood = Normal("batch", value=0.7)
    assert (likelihood(torch.zeros(2, *IMAGE)).base_dist.scale == 0.7).all()
    likelihood.freeze(0.2)
    assert (likelihood(torch.zeros(2, *IMAGE)).base_dist.scale == 0.2).all()


def test_only_an_unmeasured_sigma_refuses_held_out_data() -> None:
    others: list[Likelihood] = [Bernoulli(), Normal(), Normal("learned"), Normal("frozen", value=0.3)]
    for other in others:
        assert not other.profiled
        other.check_held_out()
    likelihood = Normal("batch")
    assert likelihood.profiled
    likelihood.check(torch.zeros(2, *IMAGE))
    with pytest.raises(ValueError, match=r"train with pvae\.fit, or call pvae\.inference\.measure_sigma"):
        likelihood.check_held_out()


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("channels", [None, 3])
def test_a_frozen_sigma_is_saved_and_no_parameter(mode: Any, channels: int | None) -> None:
    likelihood = Normal(mode, value=0.4, channels=channels)
    assert list(likelihood.parameters()) == []
    torch.testing.assert_close(likelihood.sigma, torch.full_like(likelihood.sigma, 0.4))
    mean, x = (t.float() for t in residuals())
    likelihood(mean, x)
    running, other = copy.deepcopy(likelihood), Normal(mode, channels=channels)
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(other.sigma, running.sigma)
    new = torch.tensor([0.1, 0.2, 0.3]) if channels else torch.tensor(0.1)
    likelihood.freeze(new)
    assert torch.equal(likelihood.sigma, new)
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(other.eval()(mean, x).log_prob(x), likelihood.eval()(mean, x).log_prob(x))
    assert not torch.equal(running.sigma, new)
    likelihood.freeze(0.25)
    assert (likelihood.sigma == 0.25).all()


@pytest.mark.parametrize(
    ("mode", "sigma", "message"),
    [
        ("fixed", 0.1, "freeze needs sigma = 'batch' or 'frozen', got 'fixed'"),
        ("learned", 0.1, "freeze needs sigma = 'batch' or 'frozen', got 'learned'"),
        ("batch", 0.0, "sigma must be positive and finite, got 0.0"),
        ("batch", 1e-60, "sigma must be positive and finite, got 0.0"),
        ("frozen", math.inf, "sigma must be positive and finite, got inf"),
        ("batch", torch.ones(3), r"sigma must have shape \(\), got \(3,\)"),
    ],
)
def test_what_cannot_be_frozen_is_refused(mode: Any, sigma: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normal(mode).freeze(sigma)


def test_channels_of_a_fitted_sigma_must_agree() -> None:
    with pytest.raises(ValueError, match=r"x_shape must begin with channels = 3, got \(1, 2, 4\)"):
        Normal("batch", channels=3)(torch.zeros(5, 1, 2, 4), torch.zeros(5, 1, 2, 4))


@pytest.mark.parametrize("clamp", ["hard", "soft"])
def test_fitting_does_not_synchronise(clamp: Any) -> None:
    likelihood = Normal("batch", clamp=clamp)
    mean, x = (t.float() for t in residuals())
    mean.requires_grad_()
    assert host_syncs(lambda: likelihood(mean, x).log_prob(x).sum().backward()) == []
    assert host_syncs(lambda: likelihood.eval()(mean, x).log_prob(x)) == []
