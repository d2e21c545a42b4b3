"""The conditional flow prior: normalised per label, sampled as it is scored, better than a Gaussian."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import ConditionalAffineCoupling
from pyro.nn import ConditionalDenseNN
from scipy import stats
from torch import Tensor, nn

from pvae.distributions import FlowNormal
from pvae.nn import LabelEmbedding, LabelSpace
from pvae.priors import ConditionalFlowPrior, CouplingFlow
from tests.distributions.tracing import assert_traceable

pytestmark = pytest.mark.usefixtures("float64")

CLASSES = LabelSpace("class", 3)
ATTRIBUTES = LabelSpace("attributes", 4)


def make(
    z_dim: int = 2,
    context: bool = True,
    space: LabelSpace = CLASSES,
    size: float = 0.3,
    **options: Any,
) -> ConditionalFlowPrior:
    """A prior whose last layers are awake."""
    labels = LabelEmbedding(space, 8)
    flow = CouplingFlow(z_dim, context_dim=8 if context else 0, hidden=16, **options)
    prior = ConditionalFlowPrior(z_dim, labels, flow, flow_context=context)
    net: Any
    for net in flow.nets:
        nn.init.normal_(net.mlp.out.weight, std=size)
        nn.init.normal_(net.mlp.out.bias, std=size)
    nn.init.normal_(prior.heads.out.weight, std=0.5)
    return prior


@pytest.mark.parametrize("context", [True, False])
def test_integrates_to_one_for_each_label(context: bool) -> None:
    prior = make(context=context, size=0.15)
    axis = torch.arange(-12, 12, 0.08)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        densities = [prior(torch.tensor(label)).log_prob(grid).exp() for label in range(3)]
    for density in densities:
        assert density.sum().item() * 0.08**2 == pytest.approx(1, abs=1e-6)
    assert (densities[0] - densities[1]).abs().max() > 1e-3


def test_draws_pushed_through_the_flow_are_the_base() -> None:
    prior = make(3)
    y = torch.arange(3)
    with torch.no_grad():
        z = prior(y).sample((40_000,))
        base = prior.base(y)
        u = prior.flow.condition(prior.labels(y))(z)
        error = base.stddev / 200
        assert ((u.mean(0) - base.mean).abs() < 4.5 * error).all()
        assert ((u.std(0) - base.stddev).abs() < 4.5 * error / math.sqrt(2)).all()
        assert (base.mean[0] - base.mean[1]).abs().max() > 0.05
        distance = stats.kstest(((u[:, 1, 2] - base.mean[1, 2]) / base.stddev[1, 2]).numpy(), "norm")
        assert distance.pvalue > 1e-4


def test_exact_draws_score_higher_than_literal_ones() -> None:
    prior, y = make(4), torch.arange(3)
    with torch.no_grad():
        p = prior(y)
        exact, literal = p.log_prob(p.sample((4000,))), p.log_prob(prior.base(y).sample((4000,)))
        assert (exact.mean(0) - literal.mean(0)).min() > 0.1
        # At the start, and without a flow, there is no difference: the same draws.
        for still in (
            ConditionalFlowPrior(4, LabelEmbedding(CLASSES, 8), CouplingFlow(4, context_dim=8)),
            ConditionalFlowPrior(4, LabelEmbedding(CLASSES, 8)),
        ):
            torch.manual_seed(1)
            exact = still(y).sample((5,))
            torch.manual_seed(1)
            assert torch.equal(exact, still.base(y).sample((5,)))


def test_starts_as_a_standard_normal() -> None:
    z, y = torch.randn(6, 4), torch.arange(6) % 3
    labels = LabelEmbedding(CLASSES, 8)
    gaussian = ConditionalFlowPrior(4, labels)
    flow = ConditionalFlowPrior(4, labels, CouplingFlow(4, context_dim=8))
    wanted = stats.norm.logpdf(z.numpy()).sum(-1)
    for prior in (gaussian, flow):
        torch.testing.assert_close(prior(y).log_prob(z), torch.from_numpy(wanted), rtol=0, atol=1e-12)
        torch.testing.assert_close(prior.base(y).mean, torch.zeros(6, 4), rtol=0, atol=0)
        torch.testing.assert_close(prior.base(y).stddev, torch.ones(6, 4), rtol=0, atol=1e-14)
    assert torch.equal(flow(y).log_prob(z), flow.base(y).log_prob(z))
    # Without a flow it is the plain Gaussian, whose KL the objectives know in closed form.
    assert type(gaussian(y)) is dist.Independent
    assert torch.distributions.kl_divergence(flow.base(y), gaussian(y)).abs().max() < 1e-14


def test_the_log_scale_stays_in_its_range_with_a_gradient() -> None:
    prior = ConditionalFlowPrior(2, LabelEmbedding(CLASSES, 8))
    with torch.no_grad():
        prior.heads.out.bias[2:] = torch.tensor([-60.0, 20.0])
    scale = prior.base(torch.tensor([1])).stddev
    torch.testing.assert_close(scale.log(), torch.tensor([[-7.0, 5.0]]), rtol=0, atol=0.01)
    scale.log().sum().backward()
    assert prior.heads.out.bias.grad is not None
    assert (prior.heads.out.bias.grad[2:] > 0).all()


def test_push_forward_identity() -> None:
    """The pair (flow prior, Gaussian guide) weighs z as (Gaussian prior, pushed guide) weighs f(z)."""
    prior, y = make(4), torch.arange(3)
    q = dist.Normal(torch.randn(3, 4), 0.2 + torch.rand(3, 4)).to_event(1)
    f = prior.flow.condition(prior.labels(y))
    z = q.sample()
    u = f(z)
    with torch.no_grad():
        ours = q.log_prob(z) - prior(y).log_prob(z)
        prior_of_u = prior.base(y).log_prob(u)
    for i in range(3):
        context = prior.labels(y[i])
        back = prior.flow.condition(context).inv
        jacobian = torch.autograd.functional.jacobian(back, u[i])
        pushed = (
            stats.norm.logpdf(back(u[i]).detach().numpy(), q.mean[i].numpy(), q.stddev[i].numpy()).sum()
            + torch.linalg.slogdet(jacobian).logabsdet
        )
        assert ours[i].item() == pytest.approx((pushed - prior_of_u[i]).item(), abs=1e-10)


@pytest.mark.parametrize("space", [CLASSES, ATTRIBUTES], ids=["class", "attributes"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("context", [True, False])
def test_shapes_with_and_without_particles(space: LabelSpace, batch: int, context: bool) -> None:
    prior = make(4, context, space)
    y = torch.arange(batch) % 3 if space is CLASSES else torch.randint(2, (batch, 4)).double()

    def model() -> Tensor:
        with pyro.plate("data", batch, dim=-1):
            return pyro.sample("z", prior(y))

    assert prior.conditional
    assert (prior(y).batch_shape, prior(y).event_shape) == ((batch,), (4,))
    with pyro.plate("particles", 3, dim=-2):
        node = poutine.trace(model).get_trace().nodes["z"]
    fn, z = node["fn"], node["value"]
    assert type(fn) is FlowNormal
    assert (fn.batch_shape, fn.has_rsample) == ((3, batch), True)
    assert z.shape == (3, batch, 4)
    torch.testing.assert_close(fn.log_prob(z), torch.stack([prior(y).log_prob(part) for part in z]))
    for i in range(batch):
        torch.testing.assert_close(prior(y[i]).log_prob(z[:, i]), fn.log_prob(z)[:, i])


def test_the_flow_sees_the_label_only_with_context() -> None:
    z, y = torch.randn(2, 4), torch.tensor([0, 1])
    seeing, blind = make(4, context=True), make(4, context=False)
    for prior, differs in ((seeing, True), (blind, False)):
        transform = prior(y).flow
        u = transform(z[:1].expand(2, 4))
        assert ((u[0] - u[1]).abs().max() > 1e-6) == differs


def test_pyros_conditional_flows_may_stand_in() -> None:
    labels = LabelEmbedding(CLASSES, 8)
    net = ConditionalDenseNN(2, 8, [8], param_dims=[2, 2])
    prior = ConditionalFlowPrior(4, labels, ConditionalAffineCoupling(2, net))
    y, z = torch.tensor([0, 1, 2]), torch.randn(3, 4)
    transform = prior.flow.condition(labels(y))
    wanted = dist.TransformedDistribution(prior.base(y), [transform.inv]).log_prob(z)
    torch.testing.assert_close(prior(y).log_prob(z), wanted)
    prior(y).log_prob(z).sum().backward()
    assert all(p.grad is not None for p in prior.parameters())


def test_nothing_is_stale_copies_work_and_states_are_restored() -> None:
    prior, other, z, y = make(4), make(4), torch.randn(5, 4), torch.arange(5) % 3
    before = prior(y).log_prob(z)
    before.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())
    twin = copy.deepcopy(prior)
    assert not torch.allclose(other(y).log_prob(z), before)
    other.load_state_dict(prior.state_dict())
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.1)
    assert (prior(y).log_prob(z) - before).abs().min() > 1e-6
    assert torch.equal(twin(y).log_prob(z), before)
    assert torch.equal(other(y).log_prob(z), before)


@pytest.mark.parametrize("context", [True, False])
def test_traceable(context: bool) -> None:
    prior = make(4, context).float()

    def log_prob(z: Tensor, y: Tensor) -> Tensor:
        return prior(y).log_prob(z)

    inputs = [(torch.randn(3, 6, 4).float().requires_grad_(), torch.randint(3, (6,))) for _ in range(2)]
    assert_traceable(log_prob, *inputs)


@pytest.mark.parametrize("context", [True, False])
def test_two_moons_are_bent_better_than_a_gaussian_can(context: bool) -> None:
    from sklearn.datasets import make_moons

    def fit(flow: CouplingFlow | None) -> tuple[ConditionalFlowPrior, float]:
        torch.manual_seed(0)
        prior = ConditionalFlowPrior(2, LabelEmbedding(LabelSpace("class", 2), 8), flow, context).float()
        optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
        z, y = moons(4000, seed=1)
        for _ in range(250):
            rows = torch.randint(len(z), (128,))
            loss = -prior(y[rows]).log_prob(z[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z, y = moons(2000, seed=2)
        with torch.no_grad():
            return prior, -prior(y).log_prob(z).mean().item()

    def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
        z, y = make_moons(n, noise=0.1, random_state=seed)
        return torch.from_numpy(z).float(), torch.from_numpy(y)

    pyro.enable_validation(False)
    try:
        _, gaussian = fit(None)
        prior, flow = fit(CouplingFlow(2, context_dim=8 if context else 0, hidden=32))
    finally:
        pyro.enable_validation(True)
    assert gaussian - flow > 0.3
    if not context:  # where only the base can tell the moons apart
        loc = prior.base(torch.tensor([0, 1])).mean
        assert (loc[0] - loc[1]).abs().max() > 0.3


def test_errors() -> None:
    labels = LabelEmbedding(CLASSES, 8)
    with pytest.raises(ValueError, match="y must be given: ConditionalFlowPrior is conditional"):
        ConditionalFlowPrior(4, labels)(None)
    with pytest.raises(ValueError, match="flow must have z_dim = 4, got 5"):
        ConditionalFlowPrior(4, labels, CouplingFlow(5, context_dim=8))
    with pytest.raises(ValueError, match="flow must have context_dim = 8, got 3"):
        ConditionalFlowPrior(4, labels, CouplingFlow(4, context_dim=3))
    with pytest.raises(ValueError, match="flow must have context_dim = 0, got 8"):
        ConditionalFlowPrior(4, labels, CouplingFlow(4, context_dim=8), flow_context=False)
    with pytest.raises(ValueError, match="a coupling needs at least two latent dimensions, got 1"):
        ConditionalFlowPrior(1, labels, CouplingFlow(1, context_dim=8))
    assert ConditionalFlowPrior(1, labels)(torch.tensor([0])).event_shape == (1,)
