"""The two-level VAE and its guide: densities by hand, evidence by quadrature, samples, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from scipy import stats
from scipy.special import expit, logsumexp
from torch import Tensor, nn

import pvae
from pvae.guides import HVAEGuide
from pvae.inference import ELBO
from pvae.inference.program import parameters_of
from pvae.likelihoods import Bernoulli
from pvae.models import HVAE
from pvae.nn import MLPEncoder, PairDecoder, PairEncoder, PairMLP
from pvae.priors import StandardNormal, VampPrior

pytestmark = pytest.mark.usefixtures("float64")

Array = NDArray[np.float64]


def programs(z_1: int = 3, z_2: int = 2, vamp: bool = True, gated: bool = True) -> tuple[HVAE, HVAEGuide]:
    torch.manual_seed(0)
    encoder = MLPEncoder((1, 2, 2), z_2, hidden=(5, 5), gated=gated)
    guide = HVAEGuide(encoder, PairEncoder((1, 2, 2), z_2, z_1, hidden=4, gated=gated))
    prior: nn.Module = VampPrior(encoder, torch.rand(6, 1, 2, 2)) if vamp else StandardNormal(z_2)
    conditional = MLPEncoder((z_2,), z_1, hidden=(5, 5), gated=gated)
    model = HVAE(prior, conditional, PairDecoder((z_1, z_2), (1, 2, 2), hidden=4, gated=gated), Bernoulli())
    with torch.no_grad():
        for part in (guide, conditional, model.decoder):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, guide


def binary(n: int) -> Tensor:
    return (torch.rand(n, 1, 2, 2) < 0.5).double()


class ByHand:
    """Gated networks replayed in NumPy from their saved numbers."""

    def __init__(self, module: nn.Module) -> None:
        self.numbers = {name: t.detach().numpy() for name, t in module.state_dict().items()}

    def linear(self, name: str, x: Array) -> Array:
        return np.asarray(x @ self.numbers[f"{name}.weight"].T + self.numbers[f"{name}.bias"])

    def gated(self, name: str, x: Array) -> Array:
        value, gate = np.split(self.linear(f"{name}.linear", x), 2, -1)
        return np.asarray(value * expit(gate))

    def encoder(self, name: str, x: Array) -> tuple[Array, Array]:
        h = self.gated(f"{name}hidden.1", self.gated(f"{name}hidden.0", x))
        return _moments(self.linear(f"{name}head", h))

    def pair(self, name: str, a: Array, b: Array) -> Array:
        b_first = [self.gated(f"{name}b.0", b), self.gated(f"{name}a.0", a)]
        h = np.concatenate(np.broadcast_arrays(*b_first), -1)
        return self.linear(f"{name}both.out", self.gated(f"{name}both.hidden.0", h))


def _moments(out: Array) -> tuple[Array, Array]:
    loc, log_var = np.split(out, 2, -1)
    return loc, np.exp(0.5 * (6 - np.logaddexp(0, 20 - np.logaddexp(0, log_var + 14))))


def joint(model: HVAE, guide: HVAEGuide, x: Array, z_1: Array, z_2: Array) -> Array:
    """log p(x, z_1, z_2), by hand."""
    p, q = ByHand(model), ByHand(guide)
    if isinstance(model.prior, VampPrior):
        loc, scale = q.encoder("encoder.", model.prior.u.detach().numpy().reshape(6, 4).clip(0, 1))
        components = stats.norm.logpdf(z_2[..., None, :], loc, scale).sum(-1)
        above = logsumexp(components, -1) - np.log(6)
    else:
        above = stats.norm.logpdf(z_2).sum(-1)
    below = stats.norm.logpdf(z_1, *p.encoder("conditional_prior.", z_2)).sum(-1)
    mean = expit(p.pair("decoder.net.", z_1, z_2))
    return np.asarray(above + below + stats.bernoulli.logpmf(x, mean).sum(-1))


@pytest.mark.parametrize("vamp", [True, False])
def test_densities_are_those_of_a_replay_by_hand(vamp: bool) -> None:
    model, guide = programs(vamp=vamp)
    x = binary(4)
    q = poutine.trace(guide).get_trace(x)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    assert (
        [n for n in q.nodes if n.startswith("z")]
        == [n for n in p.nodes if n.startswith("z")]
        == ["z_2", "z_1"]
    )
    p.compute_log_prob()
    q.compute_log_prob()
    flat = x.flatten(1).numpy()
    z_1, z_2 = (q.nodes[name]["value"].detach().numpy() for name in ("z_1", "z_2"))
    ours = sum(p.nodes[name]["log_prob"] for name in ("z_2", "z_1", "x"))
    np.testing.assert_allclose(ours.detach().numpy(), joint(model, guide, flat, z_1, z_2), rtol=1e-9)
    hand = ByHand(guide)
    wanted = stats.norm.logpdf(z_2, *hand.encoder("encoder.", flat)).sum(-1)
    np.testing.assert_allclose(q.nodes["z_2"]["log_prob"].detach().numpy(), wanted, rtol=1e-9)
    wanted = stats.norm.logpdf(z_1, *_moments(hand.pair("below.net.", flat, z_2))).sum(-1)
    np.testing.assert_allclose(q.nodes["z_1"]["log_prob"].detach().numpy(), wanted, rtol=1e-9)


def test_importance_weighting_tends_to_the_integral_over_both_latents_from_below() -> None:
    model, guide = programs(1, 1)
    with torch.no_grad():  # wide proposals, whose weights are bounded
        for layer in (guide.encoder.head, guide.below.net.both.out):
            assert isinstance(layer, nn.Linear)
            layer.bias[1:] += 1.0
    x = binary(6)
    grid = np.linspace(-9, 9, 601)
    z_1, z_2 = (axis.reshape(1, -1, 1) for axis in np.meshgrid(grid, grid))
    with np.errstate(divide="ignore"):
        density = joint(model, guide, x.flatten(1).numpy()[:, None], z_1, z_2)
    exact = torch.from_numpy(logsumexp(density, -1) + 2 * np.log(grid[1] - grid[0]))
    gaps = [
        pvae.log_likelihood(model, guide, x, num_particles=k, progress=False).log_prob - exact
        for k in (1, 100, 5000)
    ]
    assert gaps[0].mean() < gaps[1].mean() < 0.05
    torch.testing.assert_close(gaps[2], torch.zeros(6), atol=0.1, rtol=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["elbo", "mean_field", "iwae"])
def test_every_parameter_has_a_gradient_and_particles_broadcast(kind: Any, gated: bool) -> None:
    model, guide = programs(gated=gated)
    terms = ELBO(kind, 3).terms(model, guide, binary(40))
    terms.loss.backward()
    assert {"kl/z_2", "kl/z_1"} <= terms.parts.keys()
    for name, parameter in parameters_of(model, guide):
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_dependences_are_those_of_the_plate_diagram() -> None:
    model, _ = programs()
    relations = get_model_relations(model, (binary(2),))["sample_sample"]
    assert {site: sorted(parents) for site, parents in relations.items()} == {
        "z_2": [],
        "z_1": ["z_2"],
        "x": ["z_1", "z_2"],
    }


def test_samples_follow_the_joint_density() -> None:
    model, guide = programs(1, 1)
    x = model.sample(20_000).flatten(1).numpy()
    grid = np.linspace(-9, 9, 301)
    z_1, z_2 = (axis.reshape(-1, 1) for axis in np.meshgrid(grid, grid))
    for pixels in ([0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]):
        with np.errstate(divide="ignore"):
            density = joint(model, guide, np.array(pixels), z_1, z_2)
        probability = np.exp(logsumexp(density)) * (grid[1] - grid[0]) ** 2
        found = (x == np.array(pixels)).all(-1).mean()
        assert found == pytest.approx(probability, abs=4 * np.sqrt(probability / 20_000))
    assert model.sample(5, mean=True).shape == (5, 1, 2, 2)
    assert model.decode(torch.zeros(7, 1, 1), torch.zeros(5, 1)).batch_shape == (7, 5)
    assert model.z_dim == 2


def test_a_pair_is_one_network_of_both_inputs() -> None:
    net = PairMLP(3, 2, 4, hidden=5)
    a, b = torch.randn(6, 3), torch.randn(7, 6, 2)
    assert net(a, b).shape == (7, 6, 4)
    torch.testing.assert_close(net(a, b)[3, 2], net(a[2], b[3, 2]))


def test_parts_that_do_not_fit_are_refused() -> None:
    model, guide = programs()
    with pytest.raises(ValueError, match="same size of z_2, got 5 and 2"):
        HVAE(StandardNormal(5), model.conditional_prior, model.decoder, Bernoulli())
    with pytest.raises(ValueError, match="same size of z_1, got 4 and 3"):
        HVAE(StandardNormal(2), MLPEncoder((2,), 4), model.decoder, Bernoulli())
    with pytest.raises(ValueError, match="encoder and below must have the same size of z_2, got 4 and 2"):
        HVAEGuide(MLPEncoder((1, 2, 2), 4), guide.below)
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        model.sample(0)
    with pytest.raises(ValueError, match=r"given must have shape \(\*batch, 2\), got \(4, 3\)"):
        guide.below(binary(4), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"z_2 must have shape \(\*batch, 2\), got \(4, 3\)"):
        model.decoder(torch.zeros(4, 3), torch.zeros(4, 3))
