"""Priors against mixtures written out, and their starting points against the data they come from."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from pvae.nn import MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal, VampPrior

pytestmark = pytest.mark.usefixtures("float64")


def brute_force(z: Tensor, weight: Tensor, loc: Tensor, scale: Tensor) -> np.ndarray:
    """Log-density of a mixture of diagonal Gaussians by SciPy, component by component."""
    density = sum(
        w * np.exp(stats.norm.logpdf(z.numpy(), m.numpy(), s.numpy()).sum(-1))
        for w, m, s in zip(weight.tolist(), loc, scale, strict=True)
    )
    return np.log(density)


def test_standard_normal_is_the_standard_normal() -> None:
    z = torch.randn(6, 3)
    wanted = stats.norm.logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(StandardNormal(3)().log_prob(z).numpy(), wanted, rtol=1e-12)
    assert list(StandardNormal(3).parameters()) == []


def test_gaussian_mixture_is_the_mixture() -> None:
    prior = GaussianMixture(3, components=4)
    with torch.no_grad():
        prior.logits.normal_()
        prior.raw_scale.normal_()
        z = torch.randn(6, 3)
        scale = nn.functional.softplus(prior.raw_scale) + 1e-3
        wanted = brute_force(z, prior.logits.softmax(0), prior.loc, scale)
        np.testing.assert_allclose(prior().log_prob(z).numpy(), wanted, rtol=1e-10)


def test_gaussian_mixture_starts_from_codes() -> None:
    centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]])
    z = (centres[:, None] + 0.3 * torch.randn(3, 200, 2)).reshape(-1, 2)
    prior = GaussianMixture.from_codes(z, 3, seed=1)
    distance = torch.cdist(centres, prior.loc.detach()).min(1).values
    assert distance.max() < 0.1
    scale = nn.functional.softplus(prior.raw_scale.detach()) + 1e-3
    torch.testing.assert_close(scale, torch.full((3, 2), 0.3), atol=0.05, rtol=0)
    torch.testing.assert_close(prior.logits.detach().softmax(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    better = prior().log_prob(z).mean() - GaussianMixture(2, 3)().log_prob(z).mean()
    assert better > 1


def encoder() -> MLPEncoder:
    torch.manual_seed(1)
    return MLPEncoder((1, 2, 2), 2, hidden=(16,))


def test_vamp_is_the_mean_of_the_posteriors_at_its_pseudoinputs() -> None:
    net, u = encoder(), torch.rand(7, 1, 2, 2)
    with torch.no_grad():
        z = torch.randn(5, 2)
        loc, scale = net(u)
        wanted = brute_force(z, torch.full((7,), 1 / 7), loc, scale)
        np.testing.assert_allclose(VampPrior(net, u)().log_prob(z).numpy(), wanted, rtol=1e-10)
        # The order of the pseudoinputs does not matter.
        np.testing.assert_allclose(VampPrior(net, u.flip(0))().log_prob(z).numpy(), wanted, rtol=1e-10)


def test_vamp_with_one_datum_is_its_posterior_and_with_all_the_aggregate() -> None:
    net, x = encoder(), torch.rand(6, 1, 2, 2)
    with torch.no_grad():
        z = torch.randn(4, 2)
        loc, scale = net(x)
        posterior = torch.distributions.Normal(loc[:1], scale[:1]).log_prob(z).sum(-1)
        torch.testing.assert_close(VampPrior(net, x[:1])().log_prob(z), posterior)
        each = torch.distributions.Normal(loc, scale).log_prob(z[:, None]).sum(-1).exp()
        torch.testing.assert_close(VampPrior(net, x)().log_prob(z), each.mean(1).log())


def test_vamp_integrates_to_one() -> None:
    torch.manual_seed(0)
    net = MLPEncoder((3,), 1, hidden=(8,))
    with torch.no_grad():
        grid = torch.linspace(-30, 30, 60_001)[:, None]
        total = torch.trapezoid(VampPrior(net, torch.rand(5, 3))().log_prob(grid).exp(), grid[:, 0])
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_vamp_trains_encoder_and_pseudoinputs_but_owns_only_the_latter() -> None:
    net, u = encoder(), torch.rand(3, 1, 2, 2)
    prior = VampPrior(net, u)
    assert [name for name, _ in prior.named_parameters()] == ["u"]
    prior().log_prob(torch.randn(4, 2)).sum().backward()
    assert prior.u.grad is not None
    assert prior.u.grad.abs().sum() > 0
    assert all(p.grad is not None for p in net.parameters())
    prior.load_state_dict(copy.deepcopy(prior.state_dict()))
    assert prior.z_dim == 2


def test_vamp_clips_its_pseudoinputs_to_the_range_of_the_data() -> None:
    prior = VampPrior(encoder(), torch.rand(3, 1, 2, 2))
    with torch.no_grad():
        prior.u.add_(5)
    assert prior.pseudoinputs.max() == 1
    free = VampPrior(encoder(), torch.full((3, 1, 2, 2), 5.0), bounds=None)
    assert free.pseudoinputs.min() == 5


def test_samples_of_the_priors_follow_their_densities() -> None:
    priors = [GaussianMixture(2, 3), VampPrior(encoder(), torch.rand(4, 1, 2, 2)), StandardNormal(2)]
    for prior in priors:
        with torch.no_grad():
            p = prior()
            z = p.sample((20_000,))
            centre, spread = z.mean(0), z.std(0)
            grid = torch.stack(
                torch.meshgrid(
                    *(m + s * torch.linspace(-9, 9, 601) for m, s in zip(centre, spread, strict=True)),
                    indexing="ij",
                ),
                -1,
            )
            density = p.log_prob(grid).exp()
            cell = (18 / 600) ** 2 * spread.prod()
            assert (density.sum() * cell).item() == pytest.approx(1, abs=1e-3)
            entropy = -(density * p.log_prob(grid)).sum() * cell
            error = p.log_prob(z).std() / 20_000**0.5
            assert abs(-p.log_prob(z).mean() - entropy) < 4 * error
            mean = (density.unsqueeze(-1) * grid).sum((0, 1)) * cell
            assert ((centre - mean).abs() < 4 * spread / 20_000**0.5).all()


@pytest.mark.parametrize("prior", [StandardNormal(2), GaussianMixture(2, 3)])
def test_context_is_refused(prior: nn.Module) -> None:
    with pytest.raises(ValueError, match="is unconditional: y must be None"):
        prior(torch.zeros(3))


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.rand(3), r"u must have shape \(K, \*x_shape\)"),
        (torch.full((2, 4), float("nan")), "u must be finite"),
        (torch.full((2, 4), -0.05), r"u must lie in bounds \(0.0, 1.0\), got values in \[-0.05, -0.05\]"),
    ],
)
def test_unusable_pseudoinputs_are_refused(u: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VampPrior(encoder(), u)


def test_sizes_and_codes_are_checked() -> None:
    with pytest.raises(ValueError, match="z_dim must be positive"):
        StandardNormal(0)
    with pytest.raises(ValueError, match="z_dim and components must be positive"):
        GaussianMixture(2, 0)
    with pytest.raises(ValueError, match=r"z must have shape \(N, z_dim\) with N >= 5"):
        GaussianMixture.from_codes(torch.zeros(3, 2), 5)
