"""The diffusion prior: its modes, calibration against closed forms, schedule, state, and training."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.nn import MLPDenoiser, UNetDenoiser
from pvae.priors import DiffusionPrior

pytestmark = pytest.mark.usefixtures("float64")

VARIANCE = 0.3


class Optimal(nn.Module):
    """The optimal v of independent N(0, VARIANCE), dropped half of the time in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        gamma = gamma.unsqueeze(-1)
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        u = signal.sqrt() * VARIANCE * y / (signal * VARIANCE + noise)
        return self.dropout(self.gain * (signal.sqrt() * y - u) / noise.sqrt())


def made(**options: Any) -> DiffusionPrior:
    return DiffusionPrior(Optimal(), (2,), **options)


def draws(count: int, size: int = 5000) -> Iterator[Tensor]:
    for _ in range(count):
        yield math.sqrt(VARIANCE) * torch.randn(size, 2)


def test_call_gives_one_distribution_over_u() -> None:
    prior = DiffusionPrior(UNetDenoiser((1, 5, 5)), (1, 5, 5), num_steps=3)
    p = prior()
    assert (p.batch_shape, p.event_shape, prior.z_dim) == ((), (1, 5, 5), 25)
    assert not prior.conditional
    u = p.expand(torch.Size([2, 4])).sample()
    assert p.log_prob(u).shape == (2, 4)
    with pytest.raises(ValueError, match="DiffusionPrior is unconditional: y must be None"):
        prior(torch.zeros(2, 3))


def test_mode_chooses_the_estimator() -> None:
    prior = made()
    assert (prior.train()().estimator, prior.eval()().estimator) == ("vlb", "chain")
    with prior.using("vlb", num_times=8) as same:
        p = same()
        assert (p.estimator, p.num_times) == ("vlb", 8)
        assert prior.train()().num_times == 8
    assert (prior.estimator, prior.num_times) == (None, 1)
    with pytest.raises(ValueError, match="y must be None"), prior.using("chain"):
        prior(torch.zeros(1))
    assert prior.estimator is None


@pytest.mark.parametrize("num_steps", [5, 20])
def test_calibration_measures_the_error_of_the_denoiser(num_steps: int) -> None:
    prior = made(num_steps=5)
    assert not prior.calibrated
    assert prior.calibrate(draws(8), num_steps) is prior
    assert prior.calibrated
    gamma = -7 + 14 * torch.arange(1, num_steps + 1) / num_steps
    ratio = VARIANCE * (-gamma).exp()
    wanted = (ratio / (1 + ratio)).unsqueeze(-1).expand(num_steps, 2)
    # Dropout was off: with it the error would be another.
    assert (prior.mse / wanted - 1).abs().max() < 5 * math.sqrt(2 / 40_000)
    assert prior.training
    assert prior.denoiser.training
    p = prior.eval()()
    assert p.num_steps == num_steps
    assert p.mse is prior.mse


def test_calibration_makes_the_density_of_few_steps_right_and_its_samples_too() -> None:
    prior = made(num_steps=4).eval()
    u = math.sqrt(VARIANCE) * torch.randn(40_000, 2)
    entropy = math.log(2 * math.pi * math.e * VARIANCE)
    with torch.no_grad():
        before, spread = -prior().log_prob(u).mean() - entropy, prior.sample((40_000,)).var()
        prior.calibrate(draws(4))
        after = -prior().log_prob(u).mean() - entropy
    assert before > 2
    assert abs(after) < 0.03
    assert spread < 0.8 * VARIANCE
    assert prior.sample((40_000,)).var().item() == pytest.approx(VARIANCE, rel=0.02)


def test_calibration_needs_draws() -> None:
    prior = made()
    with pytest.raises(ValueError, match="u must hold at least one draw, got none"):
        prior.calibrate([torch.zeros(0, 2)])
    with pytest.raises(ValueError, match=r"u must have shape \(\*batch, 2\), got \(7, 3\)"):
        prior.calibrate([torch.zeros(7, 3)])
    with pytest.raises(ValueError, match="num_steps must be positive, got 0"):
        prior.calibrate(draws(1), 0)
    with pytest.raises(ValueError, match="finite errors of the denoiser, got NaN or infinite ones"):
        prior.calibrate([torch.full((3, 2), math.inf)])
    assert not prior.calibrated
    assert prior.training
    assert prior.denoiser.training


def test_weights_of_batches_of_unequal_sizes() -> None:
    prior = made(num_steps=2)
    torch.manual_seed(1)
    sizes = (1, 3, 4)
    us = [torch.randn(size, 2) for size in sizes]
    torch.manual_seed(2)
    prior.calibrate(us)
    torch.manual_seed(2)
    prior.eval()
    parts = [size * prior().squared_errors(u) for size, u in zip(sizes, us, strict=True)]
    torch.testing.assert_close(prior.mse, sum(parts) / 8)


@pytest.mark.parametrize("learned", [False, True])
def test_state(learned: bool) -> None:
    prior = made(num_steps=3, gamma_min=-5.0, gamma_max=6.0, learned=learned).calibrate(draws(1))
    assert dict(prior.named_parameters()).keys() - {"denoiser.gain"} == (
        {"gamma_min", "log_span"} if learned else set()
    )
    fresh = made(num_steps=3, learned=not learned)
    assert not fresh.calibrated
    fresh.load_state_dict(prior.state_dict())
    assert fresh.calibrated
    assert (fresh.gamma_min.item(), fresh.gamma_max.item()) == pytest.approx((-5, 6))
    torch.testing.assert_close(fresh.mse, prior.mse)
    u = torch.randn(6, 2)
    values = []
    for one in (prior, fresh):
        torch.manual_seed(3)
        values.append(one.eval()().log_prob(u))
    torch.testing.assert_close(*values)


def test_a_learned_schedule_keeps_its_order_and_widens_to_the_data() -> None:
    # The best gamma_min of data without noise of their own is minus infinity.
    prior = made(gamma_min=-2.0, gamma_max=2.0, learned=True)
    prior.denoiser.eval()
    optimizer = torch.optim.Adam([prior.gamma_min, prior.log_span], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (-prior().log_prob(next(draws(1, 500))).mean()).backward()
        optimizer.step()
    assert prior.gamma_min < -3
    assert prior.gamma_max > 3
    with torch.no_grad():
        prior.log_span.fill_(-5.0)
    low, high = prior().schedule
    assert low < high


def test_temperature_scales_the_spread_of_samples() -> None:
    prior = made(num_steps=50).calibrate(draws(4))
    assert prior.sample((3, 2)).shape == (3, 2, 2)
    assert not prior.sample().requires_grad
    prior.denoiser.eval()
    spread = [prior.sample((20_000,), temperature).var().item() for temperature in (1.0, 0.49)]
    assert spread[1] / spread[0] == pytest.approx(0.49, rel=0.04)


def test_training_finds_a_density_that_is_not_normal() -> None:
    # Two modes and a correlation: log p in closed form, entropy by a large sample.
    centres = torch.tensor([[-1.0, -0.5], [1.0, 0.5]])
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(2)),
        torch.distributions.Independent(torch.distributions.Normal(centres, 0.3), 1),
    )
    torch.manual_seed(0)
    prior = DiffusionPrior(MLPDenoiser((2,), hidden=48, blocks=1), (2,), num_steps=30)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    held_out = mixture.sample((4000,))
    entropy = -mixture.log_prob(held_out).mean().item()
    normal = 0.5 * torch.logdet(torch.cov(held_out.T)).item() + math.log(2 * math.pi * math.e)

    def bound() -> float:
        with torch.no_grad(), prior.using("vlb", num_times=20):
            return -prior().log_prob(held_out).mean().item()

    before = bound()
    for _ in range(500):
        optimizer.zero_grad()
        (-prior().log_prob(mixture.sample((256,))).mean()).backward()
        optimizer.step()
    after = bound()
    assert before > normal
    assert entropy - 0.05 < after < 0.5 * (entropy + normal)
    prior.eval().calibrate(mixture.sample((256,)) for _ in range(20))
    with torch.no_grad():
        log_w = prior().log_prob(held_out[:200].expand(50, 200, 2))
        steps = -(log_w.logsumexp(0) - math.log(50)).mean().item()
        assert -log_w.mean().item() < after + 0.15
    # The chain's importance-weighted value is below the mean of its logarithm, above the truth.
    truth = -mixture.log_prob(held_out[:200]).mean().item()
    assert truth - 0.03 < steps < -log_w.mean().item()
    u = prior.sample((4000,))
    side = (u @ centres[1] > 0).double().mean().item()
    assert 0.35 < side < 0.65
    assert -mixture.log_prob(u).mean().item() == pytest.approx(entropy, abs=0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma_min": 1.0, "gamma_max": 1.0}, "gamma_min must be below gamma_max, got 1.0 and 1.0"),
        ({"num_steps": 0}, "num_steps must be positive, got 0"),
        ({"prediction": "u"}, "prediction must be one of v, eps, got 'u'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)
