"""Every guide: its density against an independent one, its sites, and where it starts."""

import copy
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.inspect import get_model_relations
from scipy import stats
from torch import Tensor, nn

from pvae.distributions import AnalyticEntropyNormal
from pvae.guides import FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.inference import registered
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal


def analytic(encoder: nn.Module) -> NormalGuide:
    """The diagonal guide by its entropy in closed form."""
    return NormalGuide(encoder, entropy="analytic")


GUIDES = [NormalGuide, analytic, FullCovarianceGuide, FlowGuide]
pytestmark = pytest.mark.usefixtures("float64")


def make(kind: Any, z_dim: int = 3, jolt: float = 0.3) -> Any:
    torch.manual_seed(0)
    guide = kind(MLPEncoder((1, 2, 2), z_dim, hidden=(8,)))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(jolt * torch.randn_like(parameter))
    return guide


def site(guide: nn.Module, x: Tensor) -> Any:
    return poutine.trace(guide).get_trace(x).nodes["z"]


@pytest.mark.parametrize("kind", GUIDES)
def test_sites_shapes_particles_and_gradients(kind: Any) -> None:
    guide, x = make(kind), torch.rand(5, 1, 2, 2)
    trace = poutine.trace(guide).get_trace(x)
    assert [name for name, s in trace.nodes.items() if s["type"] == "sample" and name != "data"] == ["z"]
    assert trace.nodes["z"]["value"].shape == (5, 3)
    assert trace.nodes["z"]["fn"].has_rsample
    with pyro.plate("particles", 7, dim=-2):
        node = site(guide, x)
    assert node["value"].shape == (7, 5, 3)
    log_prob = node["fn"].log_prob(node["value"])
    assert log_prob.shape == (7, 5)
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("kind", GUIDES)
def test_copies_and_saved_states_give_the_same_density(kind: Any) -> None:
    guide, other, x = make(kind), make(kind, jolt=0.5), torch.rand(5, 1, 2, 2)
    node = site(guide, x)
    other.load_state_dict(guide.state_dict())
    for twin in (copy.deepcopy(guide), other):
        assert torch.equal(site(twin, x)["fn"].log_prob(node["value"]), node["fn"].log_prob(node["value"]))


def test_full_covariance_is_the_gaussian_of_its_cholesky_factor() -> None:
    guide, x = make(FullCovarianceGuide), torch.rand(4, 1, 2, 2)
    with torch.no_grad():
        node = site(guide, x)
        h = guide.encoder.features(x)
        loc, scale = guide.encoder.heads(h)
        factor = guide.scale_tril(h, scale)
    assert (factor.tril(-1).abs() > 0).any()
    for i in range(4):
        covariance = (factor[i] @ factor[i].T).numpy()
        wanted = stats.multivariate_normal.logpdf(node["value"][i].numpy(), loc[i].numpy(), covariance)
        assert node["fn"].log_prob(node["value"])[i].item() == pytest.approx(wanted, rel=1e-9)


def test_a_flow_has_the_density_of_its_jacobian() -> None:
    guide, x = make(FlowGuide), torch.rand(4, 1, 2, 2)
    fn = site(guide, x)["fn"]
    with torch.no_grad():
        base = fn.base_dist.sample()
    for i in range(4):

        def push(z0: Tensor, i: int = i) -> Tensor:
            z = base.clone().index_put((torch.tensor(i),), z0)
            for transform in fn.transforms:
                z = transform(z)
            return z[i]

        jacobian = torch.autograd.functional.jacobian(push, base[i])
        z = base
        for transform in fn.transforms:
            z = transform(z)
        wanted = fn.base_dist.log_prob(base)[i] - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(fn.log_prob(z)[i], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [FullCovarianceGuide, FlowGuide])
def test_flexible_guides_start_as_the_diagonal_one(kind: Any) -> None:
    torch.manual_seed(0)
    encoder = MLPEncoder((1, 2, 2), 3, hidden=(8,))
    x = torch.rand(5, 1, 2, 2)
    torch.manual_seed(1)
    wanted = site(NormalGuide(encoder), x)
    guide = kind(encoder)
    torch.manual_seed(1)
    ours = site(guide, x)
    torch.testing.assert_close(ours["value"], wanted["value"])
    torch.testing.assert_close(
        ours["fn"].log_prob(ours["value"]), wanted["fn"].log_prob(wanted["value"]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("z_dim", [2, 3])
def test_samples_follow_the_density(kind: Any, z_dim: int) -> None:
    guide, x = make(kind, z_dim, jolt=0.1), torch.rand(1, 1, 2, 2)
    with torch.no_grad(), pyro.plate("particles", 40_000, dim=-2):
        z = site(guide, x)["value"][:, 0]
        fn = site(guide, x)["fn"]
        # E_q[f(z) / q(z)] = 1 for any density f within q's: a Gaussian over the middle of the draws.
        low, middle, high = z.quantile(torch.tensor([0.3, 0.5, 0.7]), 0)
        f = torch.distributions.Normal(middle, high - low)
        ratio = (f.log_prob(z).sum(-1) - fn.log_prob(z[:, None])[:, 0]).exp()
    error = ratio.std().item() / 200
    assert ratio.mean().item() == pytest.approx(1, abs=4 * error)
    assert error < 0.02


def test_what_a_flow_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_flows must be positive, got 0"):
        FlowGuide(MLPEncoder((4,), 3), num_flows=0)
    with pytest.raises(ValueError, match="a coupling needs at least two latent dimensions, got 1"):
        FlowGuide(MLPEncoder((4,), 1))


@pytest.mark.parametrize("kind", GUIDES)
def test_one_latent_dimension_works_where_it_can(kind: Any) -> None:
    if kind is not FlowGuide:
        assert site(make(kind, 1), torch.rand(5, 1, 2, 2))["value"].shape == (5, 1)


@pytest.mark.parametrize("kind", GUIDES)
def test_every_guide_runs_under_stock_pyro(kind: Any) -> None:
    model = VAE(StandardNormal(3), MLPDecoder(3, (1, 2, 2), hidden=(8,)), Bernoulli())
    guide, x = make(kind, jolt=0.03), (torch.rand(20, 1, 2, 2) < 0.5).double()
    svi = SVI(
        registered(model, "model"),
        registered(guide, "guide"),
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    )
    losses = [svi.step(x) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    draws = Predictive(model, guide=guide, num_samples=6, parallel=True)(x)
    assert draws["z"].shape == (6, 20, 3)
    assert get_model_relations(model, (x,))["sample_sample"] == {"z": [], "x": ["z"]}


def test_the_entropy_of_a_normal_guide_changes_no_density() -> None:
    x = torch.rand(5, 1, 2, 2)
    sites = []
    for kind in (NormalGuide, analytic):
        guide = make(kind)
        torch.manual_seed(1)
        sites.append(site(guide, x))
    sampled, closed = sites
    assert type(closed["fn"]) is AnalyticEntropyNormal
    assert torch.equal(closed["value"], sampled["value"])
    assert torch.equal(closed["fn"].log_prob(closed["value"]), sampled["fn"].log_prob(sampled["value"]))
    with pytest.raises(ValueError, match="entropy must be 'sampled' or 'analytic', got 'exact'"):
        NormalGuide(MLPEncoder((4,), 3), entropy="exact")  # type: ignore[arg-type]


class SeesLabels(nn.Module):
    """An encoder that is none of ours and has a place for labels."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc = x if y is None else x + y
        return loc, torch.ones_like(loc)


class SeesData(nn.Module):
    """An encoder that is none of ours and has no such place."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x)


def test_a_normal_guide_shows_labels_to_encoders_that_have_a_place_for_them() -> None:
    x, y = torch.zeros(5, 3), torch.full((5, 1), 2.0)

    def mean(encoder: Any, *args: Tensor) -> Tensor:
        return poutine.trace(NormalGuide(encoder)).get_trace(*args).nodes["z"]["fn"].mean

    assert (mean(SeesLabels(), x) == 0).all()
    assert (mean(SeesLabels(), x, y) == 2).all()
    assert (mean(SeesData(), x, y) == 0).all()
    assert (mean(lambda x: (x + 1, x + 1), x, y) == 1).all()
    assert mean(MLPEncoder((3,), 2), x, y).shape == (5, 2)


def test_a_normal_guide_shows_labels_to_an_encoder_that_embeds_them() -> None:
    encoder = MLPEncoder((3,), 2, hidden=(8,), labels=LabelEmbedding(LabelSpace("class", 3), 4))
    x, guide = torch.zeros(2, 3), NormalGuide(encoder)
    one, other = (poutine.trace(guide).get_trace(x, torch.tensor(y)).nodes["z"] for y in ([0, 1], [0, 2]))
    assert torch.equal(one["fn"].mean[0], other["fn"].mean[0])
    assert not torch.equal(one["fn"].mean[1], other["fn"].mean[1])
    with pytest.raises(ValueError, match="y must be given"):
        guide(x)
