"""FIVE and its kin against closed forms of the linear case and quadrature of a curved one."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae.guides import FiveGuide, LaplaceGuide
from pvae.inference import ELBO
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.priors import StandardNormal
from tests.guides.five import Affine, Linear, linear_pair
from tests.oracles import LinearGaussianVAE, linear_gaussian_elbo

pytestmark = pytest.mark.usefixtures("float64")

SPECTRUM = torch.tensor([4.0, 1.0, 0.3, 0.1, 0.08, 0.06]).double()


# The linear case ----------------------------------------------------------------------------------------


def test_a_map_encoder_has_the_posterior_less_its_square() -> None:
    oracle = LinearGaussianVAE(x_dim=6, z_dim=3, scale=0.6)
    w = oracle.model.weight.detach()
    _, laplace = oracle.posterior(torch.zeros(1, 6))
    a = laplace @ w.T / 0.36
    encoder, decoder, likelihood = linear_pair(a, w, 0.6, "fixed")
    q = FiveGuide(encoder, decoder, likelihood).posterior(oracle.model.sample(4))
    torch.testing.assert_close(
        q.exact().covariance_matrix[0], laplace - laplace @ laplace, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(q.laplace().covariance_matrix[1], laplace, rtol=1e-9, atol=1e-12)
    # (2.2) and (2.3): J G = I - Sigma_L, and the pseudo-inverse of J is G (J G)^-1.
    torch.testing.assert_close(a @ w, torch.eye(3) - laplace, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.linalg.pinv(a), w @ torch.linalg.inv(a @ w), rtol=1e-8, atol=1e-10)


def test_elbos_of_the_linear_model_and_agreeing_proposals() -> None:
    oracle = LinearGaussianVAE(x_dim=6, z_dim=3, scale=0.6)
    w, x = oracle.model.weight.detach(), oracle.model.sample(6)
    _, laplace = oracle.posterior(x)
    model, (encoder, decoder, likelihood) = oracle.model, linear_pair(laplace @ w.T / 0.36, w, 0.6, "fixed")

    class Centred(Linear):
        def forward(self, value: Tensor) -> Tensor:
            return super().forward(value - model.bias.detach())

    encoder.__class__ = Centred
    guide = FiveGuide(encoder, decoder, likelihood)
    exact = guide.posterior(x).exact()
    lam = torch.linalg.eigvalsh(laplace)
    gap = 0.5 * (-lam - torch.log1p(-lam)).sum()
    elbo = linear_gaussian_elbo(oracle, exact.mean.detach(), exact.covariance_matrix[0].detach(), x)
    torch.testing.assert_close(elbo, oracle.log_prob(x) - gap, rtol=1e-10, atol=1e-10)
    five = pvae.log_likelihood(model, guide.proposal("five"), x, num_particles=4000)
    best = pvae.log_likelihood(model, guide.proposal("laplace"), x, num_particles=50)
    torch.testing.assert_close(best.log_prob, oracle.log_prob(x), rtol=0, atol=1e-9)
    assert best.elbo == pytest.approx(oracle.log_prob(x).mean().item(), abs=1e-9)
    assert ((five.log_prob - oracle.log_prob(x)).abs() < 0.1).all()
    assert five.elbo == pytest.approx(elbo.mean().item(), abs=0.05)


def closed_elbo(a: Tensor, w: Tensor, log_sigma: Tensor, x: Tensor) -> Tensor:
    """Sum over data of the ELBO of N(A x, sigma^2 A A^T), term by term in expectation."""
    (z_dim, x_dim), sigma2 = a.shape, torch.exp(2 * log_sigma)
    mu, cov = x @ a.T, sigma2 * a @ a.T
    error = (x - mu @ w.T).square().sum(-1) + (w @ cov @ w.T).trace()
    rec = -0.5 * x_dim * torch.log(2 * math.pi * sigma2) - 0.5 * error / sigma2
    prior = -0.5 * (z_dim * math.log(2 * math.pi) + mu.square().sum(-1) + cov.trace())
    entropy = 0.5 * z_dim * math.log(2 * math.pi * math.e) + 0.5 * torch.logdet(cov)
    return (rec + prior + entropy).sum()


@pytest.mark.parametrize("logdet", ["exact", "pinv"])
@pytest.mark.parametrize("objective", ["pyro", "mean_field", "ours"])
def test_averaged_gradients_are_those_of_the_closed_form(logdet: Any, objective: str) -> None:
    torch.manual_seed(5)
    encoder, decoder, likelihood = linear_pair(0.5 * torch.randn(2, 6), torch.randn(6, 2), 0.7)
    model = VAE(StandardNormal(2), decoder, likelihood)
    guide = FiveGuide(encoder, decoder, likelihood, logdet=logdet)
    x = torch.randn(4, 6)
    leaves = [encoder.weight, decoder.weight, likelihood.log_sigma]
    loss = -closed_elbo(encoder.weight, decoder.weight, likelihood.log_sigma, x)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    options = {"num_particles": 16, "vectorize_particles": True, "max_plate_nesting": 1}
    kinds = {"pyro": Trace_ELBO, "mean_field": TraceMeanField_ELBO}
    elbo = kinds[objective](**options) if objective in kinds else ELBO("elbo", 16)
    gradients, values = [], []
    for _ in range(60):
        value = elbo.differentiable_loss(model, guide, x)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)]))
        values.append(value.detach())
    found, losses = torch.stack(gradients), torch.stack(values)
    z = (found.mean(0) - wanted) / (found.std(0) / 60**0.5)
    assert z.abs().max() < 4.5
    assert 0.5 < z.square().mean().sqrt() < 1.5
    assert losses.mean().item() == pytest.approx(loss.item(), abs=4 * losses.std().item() / 60**0.5)


@pytest.mark.parametrize(("probes", "bias"), [({"num_probes": 2}, 0.0), ({"probe": "data"}, 0.35)])
def test_at_the_mode_the_surrogate_is_biased_by_the_posterior_variance(probes: Any, bias: float) -> None:
    torch.manual_seed(5)
    w, sigma2 = torch.randn(6, 2), 0.04
    precision = torch.eye(2) + w.T @ w / sigma2
    a = torch.linalg.solve(precision, w.T) / sigma2
    encoder, decoder, likelihood = linear_pair(a, w, 0.2, "fixed")
    guide = FiveGuide(encoder, decoder, likelihood, **probes)
    q = guide.posterior(torch.randn(400, 6))
    (ours,) = torch.autograd.grad(-q.score_parts(q.rsample()).entropy_term.mean(), encoder.weight)
    wanted = torch.linalg.pinv(a).T
    lam = 1 / torch.linalg.eigvalsh(precision)
    assert (ours - wanted).norm() / wanted.norm() < lam.max() + bias
    assert q.health is not None
    assert q.health.mean().item() == pytest.approx(1 - lam.mean().item(), abs=1e-9 if bias == 0 else 0.2)


def fixed_point(kind: str) -> tuple[Tensor, Tensor, float]:
    """Squared singular values of W, singular values of A and sigma^2, from the table of closed forms."""
    kept, lost = SPECTRUM[:3], SPECTRUM[3:]
    if kind == "five exact":
        sigma2 = 0.078717
        for _ in range(50):
            sigma2 = float(lost.sum() / (3 + (sigma2**2 / (kept + sigma2) ** 2).sum()))
        return kept**2 / (kept + sigma2), (kept + sigma2).rsqrt(), sigma2
    sigma2 = float(lost.mean())
    s2 = kept - sigma2 if kind == "laplace" else kept
    a = s2.rsqrt() if kind == "fif" else s2.sqrt() / (s2 + sigma2)
    return s2, a, sigma2


FIXED: dict[str, Callable[..., nn.Module]] = {
    "five exact": lambda *parts: FiveGuide(*parts, logdet="exact"),
    "five": lambda *parts: FiveGuide(*parts, num_probes=3),
    "five data": lambda *parts: FiveGuide(*parts, probe="data"),
    "fif": lambda *parts: FiveGuide(*parts, objective="fif", num_probes=3),
    "laplace": LaplaceGuide,
}


@pytest.mark.parametrize("kind", FIXED)
def test_training_arrives_at_the_fixed_points_of_the_linear_case(kind: str) -> None:
    s2, gain, sigma2 = fixed_point(kind)
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    basis = torch.eye(6)[:, :3]
    start = 1.08
    encoder, decoder, likelihood = linear_pair(
        start * turn @ (gain * basis).T, start * (s2.sqrt() * basis) @ turn.T, start * sigma2**0.5
    )
    model, guide = VAE(StandardNormal(3), decoder, likelihood), FIXED[kind](encoder, decoder, likelihood)
    # Data whose covariance is the spectrum exactly, with every sign, so that means vanish too.
    x = torch.cat([torch.diag(SPECTRUM.sqrt()), -torch.diag(SPECTRUM.sqrt())]) * 6**0.5
    parameters = [encoder.weight, decoder.weight, likelihood.log_sigma]
    steps, average = 700, [torch.zeros_like(p) for p in parameters]
    optimiser = torch.optim.Adam(parameters, lr=0.02, betas=(0.9, 0.99))
    objective = ELBO("elbo", 1 if kind == "fif" else 64)
    with pyro.validation_enabled(False):
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / steps) ** 2 + 1e-4
            optimiser.zero_grad()
            objective.differentiable_loss(model, guide, x).backward()
            optimiser.step()
            for mean, parameter in zip(average, parameters, strict=True):
                if step >= 400:
                    mean += parameter.detach() / 300
    a, w, log_sigma = average
    torch.testing.assert_close(torch.linalg.svdvals(w).square(), s2, rtol=4e-3, atol=0)
    torch.testing.assert_close(torch.linalg.svdvals(a).sort().values, gain.sort().values, rtol=2e-3, atol=0)
    assert (2 * log_sigma).exp().item() == pytest.approx(sigma2, rel=2e-3)


# Curved posteriors --------------------------------------------------------------------------------------


class Saddle(nn.Module):
    """g(z) = (z_1, z_2, a z_1 z_2)."""

    z_dim = 2

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z, self.a * z.prod(-1, keepdim=True)], -1)


def saddle_mode(a: float, sigma: float, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The mode of p(z | x) by Newton's method, and the Jacobian of the map from x to it."""

    def energy(z: Tensor, x: Tensor) -> Tensor:
        g = torch.stack([z[0], z[1], a * z[0] * z[1]])
        return 0.5 * ((x - g) / sigma).square().sum() + 0.5 * z.square().sum()

    for _ in range(50):
        gradient = torch.func.grad(energy)(z, x)
        z = z - torch.linalg.solve(torch.func.hessian(energy)(z, x), gradient)
    mixed = torch.func.jacrev(torch.func.grad(energy), 1)(z, x)
    return z, -torch.linalg.solve(torch.func.hessian(energy)(z, x), mixed)


def saddle_grid(a: float, sigma: float, x: Tensor, around: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A grid over the posterior, its normalised weights there, and log p(x)."""
    reach, n = 8 * sigma, 601
    axes = [torch.linspace(float(m) - reach, float(m) + reach, n) for m in around]
    z = torch.cartesian_prod(*axes)
    g = torch.stack([z[:, 0], z[:, 1], a * z[:, 0] * z[:, 1]], -1)
    log = -0.5 * ((x - g) / sigma).square().sum(-1) - 3 * math.log(sigma) - 0.5 * z.square().sum(-1)
    log = log - 2.5 * math.log(2 * math.pi) + 2 * math.log(2 * reach / (n - 1))
    return z, log, log.logsumexp(0)


SADDLES = [
    # a, sigma, z, log p(x), Sigma_L, Sigma_E, ELBO under q_L and q_E: quadrature on a grid of 2001 x 2001.
    (1.0, 0.1, (1.0, 1.0), -2.007844, (0.006619, -0.003282), (0.006508, -0.003167), (-2.010082, -2.009991)),
    (2.0, 0.1, (1.0, 1.0), -2.562903, (0.005507, -0.004394), (0.005373, -0.004260), (-2.573969, -2.573280)),
    (1.0, 0.3, (1.0, 1.0), -3.132619, (0.056427, -0.026142), (0.049366, -0.018796), (-3.153270, -3.149283)),
    (1.0, 0.1, (1.0, -0.5), -1.485478, (0.008801, 0.002186), (0.008685, 0.002108), (-1.488242, -1.488195)),
]


@pytest.mark.parametrize(("a", "sigma", "start", "log_x", "laplace", "five", "elbos"), SADDLES)
def test_the_saddle_has_the_posteriors_of_the_table(
    a: float, sigma: float, start: Any, log_x: float, laplace: Any, five: Any, elbos: Any
) -> None:
    decoder = Saddle(a)
    x = decoder(torch.tensor(start))
    mode, rows = saddle_mode(a, sigma, x, torch.tensor(start))
    guide = FiveGuide(Affine(x, mode, rows), decoder, Normal("fixed", sigma).double())
    q = guide.posterior(x.unsqueeze(0))
    z, log_joint, total = saddle_grid(a, sigma, x, mode)
    assert total.item() == pytest.approx(log_x, abs=2e-6)
    weights = (log_joint - total).exp()
    centred = z - weights @ z
    true = (weights.unsqueeze(-1) * centred).T @ centred
    for normal, wanted, elbo in ((q.laplace(), laplace, elbos[0]), (q.exact(), five, elbos[1])):
        covariance = normal.covariance_matrix[0]
        assert covariance[0, 0].item() == pytest.approx(wanted[0], abs=1e-6)
        assert covariance[0, 1].item() == pytest.approx(wanted[1], abs=1e-6)
        log_q = normal.log_prob(z)
        cell = 2 * math.log(16 * sigma / 600)
        mass = (log_q + cell).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        assert (mass * (log_joint - cell - log_q)).sum().item() == pytest.approx(elbo, abs=1e-5)
        # The true covariance is matched to within a fifth, which no diagonal one can do.
        assert (covariance - true).norm() < 0.2 * true.norm()


class Cubic(nn.Module):
    """Polynomials of third degree in x, which begin as its first two numbers."""

    z_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 + 9 + 27, 2)
        with torch.no_grad():
            self.linear.weight.zero_()[:, :2] = torch.eye(2)
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        cube = (square.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        return self.linear(torch.cat([x, square, cube], -1))


def test_a_trained_encoder_correlates_the_latents_as_the_true_posterior_does() -> None:
    torch.manual_seed(0)
    decoder, likelihood, encoder = Saddle(1.0), Normal("fixed", 0.2).double(), Cubic()
    model, guide = VAE(StandardNormal(2), decoder, likelihood), FiveGuide(encoder, decoder, likelihood)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.01)
    with pyro.validation_enabled(False):
        for step in range(300):
            optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
            x = decoder(torch.randn(64, 2)) + 0.2 * torch.randn(64, 3)
            optimiser.zero_grad()
            ELBO().differentiable_loss(model, guide, x).backward()
            optimiser.step()
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    covariance = guide.posterior(decoder(z)).exact().covariance_matrix.detach()
    correlation = covariance[:, 0, 1] / (covariance[:, 0, 0] * covariance[:, 1, 1]).sqrt()
    # The true posterior's is near -0.46 z_1 z_2; the encoder starts without any.
    assert (correlation * z.prod(-1) < 0).all()
    assert -0.7 < (correlation * z.prod(-1)).mean() < -0.2
