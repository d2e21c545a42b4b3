"""Every distribution of ours, in the kit."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae.distributions import (
    AffineCoupling,
    AnalyticEntropyNormal,
    CodeMixture,
    ContinuousBernoulli,
    Diffusion,
    DiscretizedLogisticMixture,
    FlowNormal,
    IndependentBernoulli,
    JacobianNormal,
    LevelCategorical,
    NegativeBinomial,
    NormalMixture,
)
from pvae.nn import CouplingNet
from pvae.priors import CodePrior, CodeStats, CouplingFlow, GaussianMixture, StandardNormal, VampPrior
from pvae.testing import check_distribution


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic_mixture(channels: int, num_components: int = 3, levels: int = 8) -> dist.TorchDistribution:
    """One pixel, so that its values can be listed."""
    logits = random(num_components, 1, 1)
    loc = 0.5 + 0.4 * random(num_components, channels, 1, 1, seed=1)
    scale = 0.05 + 0.1 * random(num_components, channels, 1, 1, seed=2).abs()
    coefficients = random(num_components, 3, 1, 1, seed=3).tanh() if channels == 3 else None
    return DiscretizedLogisticMixture(logits, loc, scale, coefficients, levels=levels)


@pytest.mark.parametrize(("channels", "levels"), [(1, 8), (1, 256), (3, 5)])
def test_discretized_logistic_mixture(channels: int, levels: int) -> None:
    grid = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    values = torch.cartesian_prod(*[grid] * channels).reshape(-1, channels, 1, 1)
    # The mean of a later channel is approximate, and says so.
    skip = ["moments"] if channels == 3 else []
    report = check_distribution(logistic_mixture(channels, levels=levels), values=values, skip=skip)
    assert {"integrates to 1", "sampler follows density", "float32"} <= set(report.applied)


@pytest.mark.parametrize(("z_dim", "batch"), [(1, 3), (2, 2), (4, 1)])
def test_analytic_entropy_normal(z_dim: int, batch: int) -> None:
    q = AnalyticEntropyNormal(random(batch, z_dim), 0.3 + random(batch, z_dim, seed=1).abs())
    report = check_distribution(q)
    wanted = {"parameter gradients", "integrates to 1", "sampler follows density", "moments"}
    assert wanted | {"pathwise gradient"} <= set(report.applied)


def test_continuous_bernoulli() -> None:
    report = check_distribution(ContinuousBernoulli(torch.tensor([-4.0, -0.01, 0.0, 3.0]).double()))
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


def test_independent_bernoulli() -> None:
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 4).view(-1, 2, 2)
    report = check_distribution(IndependentBernoulli(random(3, 2, 2), 2), values=values)
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


def test_level_categorical() -> None:
    report = check_distribution(LevelCategorical(logits=random(2, 5)))
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


def test_negative_binomial() -> None:
    report = check_distribution(NegativeBinomial(torch.tensor([0.7, 5.0]).double(), logits=random(2)))
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


@pytest.mark.parametrize("z_dim", [1, 2, 4])
def test_normal_mixture(z_dim: int) -> None:
    mixture = NormalMixture(random(3), 2 * random(3, z_dim, seed=1), 0.3 + random(3, z_dim, seed=2).abs())
    report = check_distribution(mixture)
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("z_dim", [1, 2, 4])
def test_code_mixture(z_dim: int, covariance: str) -> None:
    logits, loc, scale = random(3), 2 * random(3, z_dim, seed=1), 0.3 + random(3, z_dim, seed=2).abs()
    if covariance == "diag":
        mixture = CodeMixture(logits, loc, scale)
    else:
        lower = 0.5 * random(3, z_dim, z_dim, seed=3).tril(-1)
        mixture = CodeMixture(logits, loc, scale_tril=lower + torch.diag_embed(scale))
    report = check_distribution(mixture)
    wanted = {"parameter gradients", "float32", "integrates to 1", "sampler follows density", "moments"}
    assert wanted <= set(report.applied)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("variant", ["diag", "full", "gmm", "kde", "marginal", "paired"])
def test_code_prior(variant: str, learn: bool) -> None:
    stats = CodeStats(2, "full")
    stats.update(random(60, 2) @ random(2, 2, seed=1) + random(2, seed=2))
    prior = CodePrior(2, variant, components=3, num_codes=20, learn=learn)  # type: ignore[arg-type]
    report = check_distribution(prior.double().fit_(stats)())
    assert {"integrates to 1", "sampler follows density", "moments"} <= set(report.applied)


@pytest.mark.parametrize(("z_dim", "batch"), [(2, 1), (2, 3), (5, 1)])
def test_affine_coupling(z_dim: int, batch: int) -> None:
    context = random(batch, 4)
    couplings = []
    for i in range(3):
        net = CouplingNet(z_dim, 4, 8).double()
        with torch.no_grad():
            for j, parameter in enumerate(net.parameters()):
                parameter.copy_(0.5 * random(*parameter.shape, seed=10 * i + j))
        couplings.append(AffineCoupling(net, torch.arange(z_dim) % 2 == i % 2, context))
    base = dist.Normal(context.new_zeros(z_dim), 1.0).to_event(1)
    report = check_distribution(dist.TransformedDistribution(base, couplings))
    assert {"log-determinant", "integrates to 1", "sampler follows density"} <= set(report.applied)


@pytest.mark.parametrize(("z_dim", "batch"), [(2, 1), (3, 2)])
def test_flow_normal(z_dim: int, batch: int) -> None:
    context = random(batch, 4)
    flow = CouplingFlow(z_dim, 3, context_dim=4, hidden=8, masks="halves").double()
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=i))
    loc, scale = random(batch, z_dim), 0.5 + random(z_dim, seed=99).abs()
    report = check_distribution(FlowNormal(loc, scale, flow.condition(context)))
    assert {"log-determinant", "integrates to 1", "sampler follows density"} <= set(report.applied)

    def made(loc: Tensor, scale: Tensor, context: Tensor) -> FlowNormal:
        return FlowNormal(loc, scale, flow.condition(context))

    # The weights, which are no argument, stay in double precision.
    parameters = {"loc": loc, "scale": scale, "context": context}
    report = check_distribution(made, parameters, skip=["float32"])
    assert {"parameter gradients", "pathwise gradient"} <= set(report.applied)


@pytest.mark.parametrize(("z_dim", "batch"), [(1, 3), (2, 2), (3, 1)])
def test_jacobian_normal(z_dim: int, batch: int) -> None:
    def made(x: Tensor, weight: Tensor, noise: Tensor) -> JacobianNormal:
        return JacobianNormal(
            lambda x: (x @ weight).tanh() + x[..., :z_dim], lambda z: z @ weight.T, x, noise, z_dim
        )

    parameters = {"x": random(batch, 4), "weight": random(4, z_dim, seed=1), "noise": torch.tensor(0.4)}
    report = check_distribution(made, parameters)
    wanted = {"parameter gradients", "float32", "integrates to 1", "sampler follows density", "moments"}
    assert wanted <= set(report.applied)


@pytest.mark.parametrize("event", [(1,), (2,), (1, 1, 3)])
def test_diffusion(event: tuple[int, ...]) -> None:
    # Its density is an estimate, but for the limit of a schedule without ends under an optimal denoiser with
    # calibrated variances: there one path is worth as much as any.
    steps = torch.arange(1, 21, dtype=torch.float64) / 20

    def made(loc: Tensor, scale: Tensor, ends: Tensor) -> Diffusion:
        def denoise(y: Tensor, gamma: Tensor) -> Tensor:
            gamma = gamma.reshape(*gamma.shape, *(1 for _ in event))
            signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
            return noise.sqrt() * (y - signal.sqrt() * loc) / (signal * scale.square() + noise)

        gamma = (ends[0] + (ends[1] - ends[0]) * steps).reshape(-1, *(1 for _ in event))
        ratio = scale.square() * (-gamma).exp()
        mse = (ratio / (1 + ratio)).expand(20, *event)
        return Diffusion(denoise, (ends[0], ends[1]), event, num_steps=20, prediction="eps", mse=mse)

    ends = torch.tensor([-55.0, 55.0], dtype=torch.float64)
    parameters = {"loc": random(*event), "scale": 0.5 + random(*event, seed=1).abs(), "ends": ends}
    report = check_distribution(made, parameters)
    wanted = {
        "value gradient",
        "parameter gradients",
        "float32",
        "integrates to 1",
        "sampler follows density",
    }
    assert wanted <= set(report.applied)


class Linear(torch.nn.Module):
    """An encoder in one line."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 0.3 + x.square()


@pytest.mark.parametrize(
    "prior",
    [StandardNormal(2), GaussianMixture(2, 3), VampPrior(Linear(), torch.rand(4, 2))],
    ids=lambda prior: type(prior).__name__,
)
def test_priors(prior: torch.nn.Module) -> None:
    report = check_distribution(prior.double()(None))
    assert {"integrates to 1", "sampler follows density"} <= set(report.applied)
