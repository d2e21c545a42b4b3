"""The diffusion against normals whose optimal denoiser is known, quadrature, and its chain written out."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from scipy.integrate import quad
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pvae.distributions import Diffusion
from pvae.distributions import diffusion as module
from pvae.inference import ELBO
from tests.distributions.tracing import host_syncs

pytestmark = pytest.mark.usefixtures("float64")

ENDS = (-6.0, 7.0)


def schedule(ends: tuple[float, float] = ENDS) -> tuple[Tensor, Tensor]:
    return torch.tensor(ends[0]), torch.tensor(ends[1])


def optimal(loc: float, variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise that the posterior mean of u ~ N(loc, variance) implies, for vectors u."""

    def denoise(y: Tensor, gamma: Tensor) -> Tensor:
        signal, noise = torch.sigmoid(-gamma).unsqueeze(-1), torch.sigmoid(gamma).unsqueeze(-1)
        precision = 1 / variance + signal / noise
        u = (loc / variance + signal.sqrt() * y / noise) / precision
        return (y - signal.sqrt() * u) / noise.sqrt()

    return denoise


def errors(variance: float, num_steps: int, ends: tuple[float, float] = ENDS) -> Tensor:
    """Mean squared error of the optimal prediction at the end of each step, shape ``(num_steps, 1)``."""
    gamma = ends[0] + (ends[1] - ends[0]) * torch.arange(1, num_steps + 1) / num_steps
    ratio = variance * (-gamma).exp()
    return (ratio / (1 + ratio)).unsqueeze(-1)


def normal(
    loc: float,
    variance: float,
    num_steps: int | None,
    *,
    calibrated: bool = False,
    ends: tuple[float, float] = ENDS,
    size: int = 1,
    num_times: int = 1,
) -> Diffusion:
    """The optimal diffusion of a normal; without steps the bound in continuous time."""
    mse = errors(variance, num_steps, ends).expand(-1, size) if calibrated and num_steps else None
    return Diffusion(
        optimal(loc, variance),
        schedule(ends),
        (size,),
        "chain" if num_steps else "vlb",
        num_steps or 1,
        num_times,
        prediction="eps",
        mse=mse,
    )


@contextmanager
def noise_from(columns: Iterator[Tensor]) -> Iterator[None]:
    """Make each draw of normal noise the next of ``columns``, the same for every event dimension."""

    def randn(*shape: Any, **_: Any) -> Tensor:
        size = shape[0] if isinstance(shape[0], torch.Size) else shape
        return next(columns).unsqueeze(-1).expand(size).clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        patch.setattr(torch, "randn_like", lambda x: randn(x.shape))
        yield


def expected(p: Diffusion, loc: float, scale: float) -> Tensor:
    """Exact mean of ``log_prob`` over its noise and u ~ N(loc, scale^2), in one dimension.

    With an affine denoiser it is quadratic in all normal variables, where the mean over the points
    +-sqrt(n) e_i has no error.
    """
    n = (p.num_steps + 1 if p.estimator == "chain" else 1) + 1
    points = math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)])
    columns = iter(points.T)
    u = loc + scale * next(columns)
    with noise_from(columns):
        return p.log_prob(u.unsqueeze(-1)).mean()


def entropy(variance: float) -> float:
    return 0.5 * math.log(2 * math.pi * math.e * variance)


def reached(loc: float, variance: float, num_steps: int, calibrated: bool) -> tuple[float, float]:
    """Mean and variance of u under the chain of an optimal denoiser, by its affine recursion in y / alpha."""
    gamma = np.linspace(*ENDS, num_steps + 1)
    # The ratio of noise to signal, the variance of y / alpha given u.
    ratio = np.exp(gamma)
    mean, var = 0.0, 1 + ratio[-1]
    for t, s in zip(ratio[:0:-1], ratio[-2::-1], strict=True):
        posterior = 1 / (1 / variance + 1 / t)
        # y_s / alpha_s given u and y_t is normal around a mix of both, and u given y_t is normal too.
        mix, spread = 1 - s / t, s * (1 - s / t)
        slope = s / t + mix * posterior / t
        mean = slope * mean + mix * posterior * loc / variance
        var = slope**2 * var + spread + (mix**2 * posterior if calibrated else 0)
    return mean, var + ratio[0]


GAPS = [
    (1.0, ENDS, {None: 0.0012, 25: 0.7663, 50: 0.3535, 100: 0.1704, 1000: 0.0176}),
    (0.05, ENDS, {None: 0.0242, 25: 0.3380, 50: 0.1704, 100: 0.0948, 1000: 0.0310}),
    (0.01, ENDS, {None: 0.1107, 25: 0.2282, 50: 0.1665, 100: 0.1379, 1000: 0.1134}),
    (0.05, (-10.0, 7.0), {None: 0.0005, 25: 1.2710, 100: 0.2695, 1000: 0.0261}),
]


@pytest.mark.parametrize(("variance", "ends", "gaps"), GAPS)
def test_gap_to_the_entropy_of_a_normal(
    variance: float, ends: tuple[float, float], gaps: dict[int | None, float]
) -> None:
    for num_steps, gap in gaps.items():
        p = normal(0.0, variance, num_steps, ends=ends, num_times=100_000)
        bound = -expected(p, 0.0, math.sqrt(variance)).item()
        assert bound - entropy(variance) == pytest.approx(gap, abs=1e-4), num_steps


@pytest.mark.parametrize("num_steps", [1, 2, 25, 100])
def test_calibrated_variances_close_the_gap_of_a_normal_at_every_number_of_steps(num_steps: int) -> None:
    loc, variance = 0.4, 0.05
    low, high = ENDS
    alpha, sigma = 1 / (1 + math.exp(high)), 1 / (1 + math.exp(-high))
    steps = math.log((1 + variance * math.exp(-low)) / (1 + variance * math.exp(-high)))
    first = math.log(2 * math.pi) + low + 1
    last = alpha * (variance + loc**2) + sigma - math.log(sigma) - 1
    p = normal(loc, variance, num_steps, calibrated=True)
    assert -expected(p, loc, math.sqrt(variance)).item() == pytest.approx(0.5 * (first + steps + last))
    # And it is the gap in continuous time, at the same loc.
    p = normal(loc, variance, None, num_times=100_000)
    bound = -expected(p, loc, math.sqrt(variance)).item()
    assert bound == pytest.approx(0.5 * (first + steps + last), abs=1e-4)


def test_a_denoiser_that_gives_zero() -> None:
    p = Diffusion(lambda y, _: 0 * y, schedule(), (1, 7, 7), "vlb", prediction="eps")
    u = torch.randn(3, 1, 7, 7)
    variance = 1 / (1 + math.exp(-ENDS[1]))
    last = 0.5 * ((1 - variance) * u.square() + variance - math.log(variance) - 1).sum((1, 2, 3))
    ones = iter([torch.ones(1)] * 2)
    with noise_from(ones):
        nats = -p.log_prob(u) - last
    torch.testing.assert_close(nats, torch.full((3,), 241.0), atol=0.05, rtol=0)
    assert nats[0].item() == pytest.approx(49 * 6.5 + 24.5 * (math.log(2 * math.pi) - 6 + 1))


@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_both_predictions_are_one_model(variance: float) -> None:
    eps = optimal(0.2, variance)

    def v(y: Tensor, gamma: Tensor) -> Tensor:
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        noise = eps(y, gamma)
        return alpha * noise - sigma * (y - sigma * noise) / alpha

    u = torch.randn(5, 3)
    for estimator in ("vlb", "chain"):
        values = []
        for prediction, denoise in (("eps", eps), ("v", v)):
            torch.manual_seed(1)
            p = Diffusion(denoise, schedule(), (3,), estimator, 10, prediction=prediction)  # type: ignore
            values.append(p.log_prob(u))
        torch.testing.assert_close(*values)


def test_the_chain_is_unbiased() -> None:
    # Four equal coordinates under N(.2, .05), gamma from -6 to 7.
    u = torch.full((100_000, 4), 0.35)
    exact = 4 * stats.norm(0.2, math.sqrt(0.05)).logpdf(0.35)
    assert exact == pytest.approx(1.4157, abs=1e-4)
    for num_steps, calibrated in ((2, True), (25, True), (25, False)):
        log_w = normal(0.2, 0.05, num_steps, calibrated=calibrated, size=4).log_prob(u)
        w = log_w.exp()
        mean, variance = reached(0.2, 0.05, num_steps, calibrated)
        wanted = math.exp(4 * stats.norm(mean, math.sqrt(variance)).logpdf(0.35))
        assert abs(w.mean() - wanted) < 4 * w.std() / math.sqrt(len(w))
        if calibrated:
            assert variance == pytest.approx(0.05 + 2 * math.exp(-6), abs=2e-5)
            assert w.mean().log().item() - exact == pytest.approx(-0.1077, abs=0.003)
            assert log_w.mean().item() - exact == pytest.approx(-0.148, abs=0.004)
            # A thousand at a time, as an evaluation has them.
            parts = log_w.reshape(100, 1000).logsumexp(-1) - math.log(1000)
            assert parts.mean().item() - exact == pytest.approx(-0.1078, abs=0.003)


def bound_of_a_normal(u: float, loc: float, variance: float) -> float:
    """The bound in continuous time at one u, under the optimal denoiser, by quadrature over gamma."""

    def error(gamma: float) -> float:
        signal, noise = 1 / (1 + math.exp(gamma)), 1 / (1 + math.exp(-gamma))
        total = signal * variance + noise
        return ((signal * variance) ** 2 + noise * signal * (u - loc) ** 2) / total**2

    low, high = ENDS
    alpha, sigma = 1 / (1 + math.exp(high)), 1 / (1 + math.exp(-high))
    last = alpha * u**2 + sigma - math.log(sigma) - 1
    return -0.5 * (math.log(2 * math.pi) + low + 1 + quad(error, low, high)[0] + last)


def test_exponentiating_the_bound_gives_none() -> None:
    p = normal(0.2, 0.05, None, size=4)
    u = torch.full((200_000, 4), 0.35)
    mean = 4 * expected(normal(0.2, 0.05, None, num_times=100_000), 0.35, 0.0).item()
    assert mean == pytest.approx(4 * bound_of_a_normal(0.35, 0.2, 0.05), abs=1e-3)
    assert mean == pytest.approx(1.274, abs=0.023)
    log_prob = p.log_prob(u)
    assert abs(log_prob.mean() - mean) < 4 * log_prob.std() / math.sqrt(len(u))
    exponentiated = (log_prob.logsumexp(0) - math.log(len(u))).item()
    exact = 4 * stats.norm(0.2, math.sqrt(0.05)).logpdf(0.35)
    assert exponentiated > exact + 3


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("num_steps", [1, 4, 25])
def test_moments_of_samples(num_steps: int, calibrated: bool) -> None:
    n = 100_000
    u = normal(0.2, 0.05, num_steps, calibrated=calibrated).sample((n,))
    mean, variance = reached(0.2, 0.05, num_steps, calibrated)
    assert abs(u.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(u.var().item() - variance) < 4 * variance * math.sqrt(2 / n)
    if calibrated and num_steps > 1:
        assert (mean, variance) == pytest.approx((0.2, 0.05 + 2 * math.exp(-6)), abs=2e-3)


# Short enough for paths from one u to have weights of a moderate variance under any denoiser.
WAVE_ENDS = (-1.5, 2.0)


class Wave(nn.Module):
    """A denoiser of no particular merit, smooth and far from affine."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.size, self.calls = size, 0
        self.first = nn.Parameter(torch.randn(size + 1, 8, generator=generator))
        self.second = nn.Parameter(0.3 * torch.randn(8, size, generator=generator))

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        self.calls += 1
        level = (gamma / 5).expand(y.shape[:-1]).unsqueeze(-1)
        return torch.tanh(torch.cat([y, level], -1) @ self.first) @ self.second


def wave(size: int, num_steps: int, **options: Any) -> Diffusion:
    mse = 0.5 + 0.5 * torch.rand(num_steps, size, generator=torch.Generator().manual_seed(2))
    return Diffusion(Wave(size), schedule(WAVE_ENDS), (size,), num_steps=num_steps, mse=mse, **options)


def transition(p: Diffusion, i: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of y at grid point i - 1 given ``y`` at i, in the paper's terms."""
    low, high = p.schedule
    gamma = low + (high - low) * torch.tensor([i - 1.0, i]) / p.num_steps
    alpha_s, alpha_t = (1 / (1 + gamma.exp())).sqrt()
    var_s, var_t = 1 / (1 + (-gamma).exp())
    between = var_t - (alpha_t / alpha_s) ** 2 * var_s
    u = alpha_t * y - var_t.sqrt() * p.denoise(y, gamma[1])  # of v
    mean = alpha_t / alpha_s * var_s / var_t * y + alpha_s * between / var_t * u
    assert p.mse is not None
    reverse = between * var_s / var_t * (1 + torch.expm1(gamma[1] - gamma[0]) * p.mse[i - 1])
    return mean, reverse.sqrt()


def last_step(p: Diffusion, y: Tensor) -> dist.TorchDistribution:
    """p(u | y_0)."""
    return dist.Normal(y * (1 + p.schedule[0].exp()).sqrt(), (0.5 * p.schedule[0]).exp()).to_event(1)


def test_explicit_sites_are_the_internal_path() -> None:
    p, batch = wave(4, 5), 6
    u = torch.randn(batch, 4)

    def model() -> None:
        with pyro.plate("data", batch):
            y = pyro.sample("y_5", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            for i in range(5, 0, -1):
                mean, scale = transition(p, i, y)
                y = pyro.sample(f"y_{i - 1}", dist.Normal(mean, scale).to_event(1))
            pyro.sample("u", last_step(p, y), obs=u)

    def guide() -> None:
        gamma = torch.linspace(*WAVE_ENDS, 6)
        alpha, var = (1 / (1 + gamma.exp())).sqrt(), 1 / (1 + (-gamma).exp())
        with pyro.plate("data", batch):
            y = pyro.sample("y_5", dist.Normal(alpha[5] * u, var[5].sqrt()).to_event(1))
            for t in range(5, 0, -1):
                s = t - 1
                between = var[t] - (alpha[t] / alpha[s]) ** 2 * var[s]
                mean = alpha[t] / alpha[s] * var[s] / var[t] * y + alpha[s] * between / var[t] * u
                y = pyro.sample(f"y_{s}", dist.Normal(mean, (between * var[s] / var[t]).sqrt()).to_event(1))

    torch.manual_seed(3)
    q = poutine.trace(guide).get_trace()
    joint = poutine.trace(poutine.replay(model, trace=q)).get_trace()
    for trace in (q, joint):
        trace.compute_log_prob()
    ys = [f"y_{i}" for i in range(6)]
    wanted = sum(joint.nodes[y]["log_prob"] - q.nodes[y]["log_prob"] for y in ys)
    torch.manual_seed(3)
    torch.testing.assert_close(p.log_prob(u), wanted + joint.nodes["u"]["log_prob"])


def test_the_chain_agrees_with_a_simulation_of_the_sampler() -> None:
    p, u, n = wave(4, 5), torch.tensor([0.3, -0.4, 0.2, 0.6]), 200_000
    with torch.no_grad():
        w = p.log_prob(u.expand(n, 4)).exp()
        y = torch.randn(n, 4)
        for i in range(5, 0, -1):
            mean, scale = transition(p, i, y)
            y = mean + scale * torch.randn_like(y)
        forward = last_step(p, y).log_prob(u).exp()
    error = math.hypot(*(float(part.std()) / math.sqrt(n) for part in (w, forward)))
    assert error < 0.03 * w.mean()
    assert abs(w.mean() - forward.mean()) < 4 * error
    # Its mean is a lower bound.
    assert w.log().mean() < w.mean().log() - 0.1


def propagated(p: Diffusion, nodes: Tensor) -> Tensor:
    """Density of u on a grid in one dimension, by quadrature over y step after step."""
    width = nodes[1] - nodes[0]
    density = dist.Normal(0.0, 1.0).log_prob(nodes).exp()
    with torch.no_grad():
        for i in range(p.num_steps, 0, -1):
            mean, scale = transition(p, i, nodes.unsqueeze(-1))
            density = dist.Normal(mean, scale).log_prob(nodes).exp().mT @ density * width
        kernel = last_step(p, nodes.unsqueeze(-1).unsqueeze(-1)).log_prob(nodes.unsqueeze(-1)).exp()
    return kernel.mT @ density * width


def test_samples_and_chain_follow_the_density_by_quadrature() -> None:
    p, nodes = wave(1, 4), torch.linspace(-12, 12, 1201)
    density = propagated(p, nodes)
    width = float(nodes[1] - nodes[0])
    assert density.sum().item() * width == pytest.approx(1, abs=1e-8)
    # Not a normal: a test of moments alone would be a weak one.
    mean = float((nodes * density).sum() * width)
    variance = float(((nodes - mean) ** 2 * density).sum() * width)
    fourth = float(((nodes - mean) ** 4 * density).sum() * width)
    assert abs(fourth / variance**2 - 3) > 0.1
    cumulative = np.concatenate([[0.0], np.cumsum(((density[1:] + density[:-1]) / 2 * width).numpy())])
    u = p.sample((20_000,)).squeeze(-1)
    test = stats.kstest(u.numpy(), lambda x: np.interp(x, nodes.numpy(), cumulative))
    assert test.pvalue > 1e-4
    for index in (480, 600, 700):
        w = p.log_prob(nodes[index].expand(100_000, 1)).exp().detach()
        assert abs(w.mean() - density[index]) < 4 * w.std() / math.sqrt(len(w))


def test_samples_and_chain_agree_in_two_dimensions() -> None:
    p = wave(2, 3)
    axis = torch.linspace(-9, 9, 101)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = torch.stack([p.log_prob(grid).exp() for _ in range(60)]) * (axis[1] - axis[0]) ** 2
    u = p.sample((100_000,))
    for statistic in (
        lambda x: torch.ones(len(x)),
        lambda x: x[:, 0],
        lambda x: x[:, 0] * x[:, 1],
        lambda x: x[:, 1].square(),
        lambda x: torch.cos(2 * x[:, 0] - x[:, 1]),
    ):
        by_density = (density * statistic(grid)).sum(-1)
        by_samples = statistic(u)
        error = math.hypot(
            float(by_density.std()) / math.sqrt(len(by_density)), float(by_samples.std()) / math.sqrt(len(u))
        )
        assert error < 0.03 * (1 + by_samples.std())
        assert abs(by_density.mean() - by_samples.mean()) < 4 * error


@pytest.mark.parametrize("num_times", [1, 7])
def test_the_bound_is_the_integral_over_time(num_times: int) -> None:
    p = wave(2, 1, estimator="vlb", num_times=num_times)
    u = torch.tensor([0.5, -0.3])
    with torch.no_grad():
        drawn = p.log_prob(u.expand(40_000, 2))
        # The same by a midpoint rule over times and by Gauss and Hermite over the noise.
        points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
        eps = torch.cartesian_prod(points, points)
        weight = torch.cartesian_prod(weights, weights).prod(-1) / (2 * math.pi)
        low, high = WAVE_ENDS
        gamma = (low + (high - low) * (torch.arange(400) + 0.5) / 400).unsqueeze(-1)
        signal, noise = (part.unsqueeze(-1) for part in (1 / (1 + gamma.exp()), 1 / (1 + (-gamma).exp())))
        y = signal.sqrt() * u + noise.sqrt() * eps
        error = (eps - noise.sqrt() * y - signal.sqrt() * p.denoise(y, gamma)).square().sum(-1)
        alpha, sigma = 1 / (1 + math.exp(high)), 1 / (1 + math.exp(-high))
        last = (alpha * u.square() + sigma - math.log(sigma) - 1).sum()
        first = 2 * (math.log(2 * math.pi) + low + 1)
        wanted = -0.5 * (first + (high - low) * (error @ weight).mean() + last)
    assert abs(drawn.mean() - wanted) < 4 * drawn.std() / math.sqrt(len(drawn))


def test_times_are_stratified_and_in_random_order() -> None:
    p = wave(1, 1, estimator="vlb", num_times=3)
    batch = torch.Size((4, 5))
    t = p._times(batch, torch.zeros(()))
    assert t.shape == (3, 4, 5)
    torch.testing.assert_close(t.flatten().sort().values.diff(), torch.full((59,), 1 / 60))
    # Of one datum, too.
    torch.testing.assert_close(t[:, 2, 3].diff(), torch.full((2,), 1 / 3))
    first = torch.stack([p._times(batch, torch.zeros(()))[0] for _ in range(500)])
    # Each is uniform, and neighbours are not tied to one another.
    assert all(stats.kstest(3 * first[:, 0, j].numpy(), "uniform").pvalue > 1e-4 for j in range(5))
    assert (3 * (first[:, 0, 0] - first[:, 0, 1])).std() > 0.3


def test_gradient_of_the_ends_of_the_schedule() -> None:
    ends = [torch.tensor(end, requires_grad=True) for end in ENDS]
    p = Diffusion(optimal(0.0, 0.05), (ends[0], ends[1]), (1,), "vlb", num_times=100_000, prediction="eps")
    gradients = torch.autograd.grad(-expected(p, 0.0, math.sqrt(0.05)), ends)
    low, high = (torch.tensor(end, requires_grad=True) for end in ENDS)
    diffusion = torch.log1p(0.05 * (-low).exp()) - torch.log1p(0.05 * (-high).exp())
    variance = torch.sigmoid(high)
    bound = 0.5 * (low + diffusion + (1 - variance) * 0.05 + variance - variance.log())
    for ours, wanted in zip(gradients, torch.autograd.grad(bound, (low, high)), strict=True):
        assert ours.item() == pytest.approx(wanted.item(), abs=1e-4)


@pytest.mark.parametrize("estimator", ["vlb", "chain"])
def test_gradients_reach_value_denoiser_and_schedule(estimator: Any) -> None:
    ends = tuple(torch.tensor(end, requires_grad=True) for end in ENDS)
    net, u = Wave(3), torch.randn(5, 3, requires_grad=True)
    Diffusion(net, ends, (3,), estimator, 4).log_prob(u).sum().backward()  # type: ignore[arg-type]
    for leaf in (*ends, *net.parameters(), u):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("estimator", ["vlb", "chain"])
def test_every_element_of_a_batch_has_its_own_noise(estimator: Any) -> None:
    p = wave(2, 3, estimator=estimator).expand((4, 5))
    u = torch.zeros(2)
    log_prob = p.log_prob(u)
    assert log_prob.shape == (4, 5)
    assert log_prob.unique().numel() == 20
    assert p.log_prob(torch.zeros(3, 1, 5, 2)).shape == (3, 4, 5)
    assert type(p) is Diffusion
    assert p.sample((3,)).shape == (3, 4, 5, 2)
    assert not p.sample().requires_grad
    assert p.density == {"vlb": "bound", "chain": "unbiased"}[estimator]


@pytest.mark.parametrize("rows", [1, 20, 4096])
def test_the_number_of_steps_in_a_pass_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, u = wave(2, 7), torch.randn(3, 3, 2)
    torch.manual_seed(1)
    wanted = p.log_prob(u)
    monkeypatch.setattr(module, "_PASS_ROWS", rows)
    torch.manual_seed(1)
    torch.testing.assert_close(p.log_prob(u), wanted)
    assert isinstance(p.denoise, Wave)
    p.denoise.calls = 0
    p.log_prob(u)
    assert p.denoise.calls == {1: 7, 20: 4, 4096: 1}[rows]


def test_squared_errors() -> None:
    p = normal(0.2, 0.05, 7, size=2)
    u = 0.2 + math.sqrt(0.05) * torch.randn(50, 800, 2)
    found, wanted = p.squared_errors(u), errors(0.05, 7).expand(7, 2)
    assert (found / wanted - 1).abs().max() < 5 * math.sqrt(2 / 40_000)


def test_temperature() -> None:
    p = normal(0.2, 0.05, 10, calibrated=True, size=3)
    draws = []
    for temperature in (1.0, 0.25, 0.0):
        torch.manual_seed(1)
        draws.append(p.sample((4,), temperature))
    # The denoiser is affine, and so is a draw as a function of its noise.
    torch.testing.assert_close(draws[1] - draws[2], 0.5 * (draws[0] - draws[2]))
    assert draws[2].unique().numel() == 1
    torch.manual_seed(1)
    assert torch.equal(p.sample((4,)), draws[0])


@pytest.mark.parametrize("estimator", ["vlb", "chain"])
def test_no_host_sync(estimator: Any) -> None:
    p, u = wave(3, 5, estimator=estimator), torch.randn(4, 3, requires_grad=True)
    assert host_syncs(lambda: p.log_prob(u).sum().backward()) == []
    assert host_syncs(lambda: p.sample((4,))) == []


@pytest.mark.parametrize("estimator", ["vlb", "chain"])
def test_single_precision_at_least(estimator: Any) -> None:
    ends = tuple(end.float() for end in schedule((-10.0, 7.0)))
    linear = nn.Linear(49, 49).float()

    def half(y: Tensor, gamma: Tensor) -> Tensor:
        assert y.dtype == gamma.dtype == torch.float32
        return 0.1 * linear(y)

    def made(denoise: Any) -> Diffusion:
        return Diffusion(denoise, ends, (49,), estimator, 20)  # type: ignore[arg-type]

    u = torch.randn(8, 49, dtype=torch.bfloat16)
    values = {}
    for name, autocast in (("single", False), ("half", True)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert made(half).log_prob(u).dtype == torch.float32
            values[name] = made(lambda y, _: (0 * y).to(torch.bfloat16)).log_prob(u)
            assert made(half).sample((2,)).dtype == torch.float32
    # The network's own figures in half do not matter here; all that is made of them is as before.
    assert torch.equal(values["single"], values["half"])
    torch.manual_seed(1)
    made(half).log_prob(u)
    double = Diffusion(lambda y, _: 0 * y, schedule((-10.0, 7.0)), (49,), estimator, 20)
    assert double.log_prob(u.double()).dtype == torch.float64


def test_no_closed_form_kl() -> None:
    q = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, wave(3, 2))


@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO(), TraceMeanField_ELBO(), ELBO("elbo"), ELBO("mean_field"), ELBO("mean_field", 3)],
)
def test_one_pass_of_the_denoiser_for_a_step_of_training(objective: Any) -> None:
    p = wave(2, 50, estimator="vlb")
    x = torch.randn(6, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", p)
            pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("u", dist.Normal(x / 2, 0.5).to_event(1))

    objective.differentiable_loss(model, guide, x)
    assert isinstance(p.denoise, Wave)
    assert p.denoise.calls == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "estimator must be one of vlb, chain, got 'exact'"),
        ({"prediction": "x"}, "prediction must be one of v, eps, got 'x'"),
        ({"num_steps": 0}, "num_steps must be positive, got 0"),
        ({"num_times": 0}, "num_times must be positive, got 0"),
        ({"u_shape": ()}, r"u_shape must have at least one dimension, got \(\)"),
        ({"mse": torch.zeros(9, 2)}, r"mse must have shape \(100, 2\), got \(9, 2\)"),
        ({"schedule": (torch.tensor(2.0), torch.tensor(1.0))}, "schedule must increase, got 2.0 to 1.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"denoise": Wave(2), "schedule": schedule(), "u_shape": (2,), **options}
    with pytest.raises(ValueError, match=message):
        Diffusion(**arguments)


def test_bad_values() -> None:
    p = wave(2, 3)
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        p.sample((), -1)
