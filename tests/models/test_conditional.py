"""The conditional VAE: its sites, its bound under a flow that is the identity, its two ways to sample."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae.data import load
from pvae.guides import FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.inference import ELBO, registered
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import ConditionalFlowPrior, CouplingFlow, GaussianMixture, StandardNormal

CLASSES = LabelSpace("class", 3)
X_SHAPE, Z = (1, 2, 3), 4


def labels() -> LabelEmbedding:
    return LabelEmbedding(CLASSES, 6)


def flow_prior(stirred: bool = True) -> ConditionalFlowPrior:
    """A flow prior; ``stirred``: not the identity, not the same for every label."""
    prior = ConditionalFlowPrior(Z, labels(), CouplingFlow(Z, 2, 6, 8))
    if stirred:
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


def conditional(prior: nn.Module | None = None, sees: bool = True) -> ConditionalVAE:
    decoder = MLPDecoder(Z, X_SHAPE, (8,), labels=labels() if sees else None)
    return ConditionalVAE(prior or flow_prior(), decoder, Normal(value=0.5))


def guide(sees: bool = True) -> NormalGuide:
    return NormalGuide(MLPEncoder(X_SHAPE, Z, (8,), labels=labels() if sees else None))


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    torch.manual_seed(0)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(5, *X_SHAPE), torch.tensor([0, 1, 2, 1, 0])


def test_its_sites_are_the_plate_diagram(batch: tuple[Tensor, Tensor]) -> None:
    trace = poutine.trace(conditional()).get_trace(*batch)
    trace.compute_log_prob()
    assert trace.observation_nodes == ["x"]
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (5,)
    assert "y" not in trace.nodes


@pytest.mark.parametrize("prior", [StandardNormal(Z), GaussianMixture(Z, 3), None])
@pytest.mark.parametrize("family", [NormalGuide, FullCovarianceGuide, FlowGuide])
def test_every_prior_and_guide_combine(
    prior: nn.Module | None, family: type[nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    model, q = conditional(prior), family(MLPEncoder(X_SHAPE, Z, (8,), labels=labels()))
    terms = ELBO("elbo", num_particles=3).terms(model, q, *batch)
    assert terms.bound.shape == (5,)
    terms.loss.backward()
    for name, parameter in [*model.named_parameters(), *q.named_parameters()]:
        assert parameter.grad is not None, name


def test_the_identity_flow_gives_the_gaussian_bound_exactly(batch: tuple[Tensor, Tensor]) -> None:
    plain = conditional(StandardNormal(Z))
    flowing = ConditionalVAE(flow_prior(stirred=False), plain.decoder, plain.likelihood)
    q, values = guide(), []
    for model in (plain, flowing):
        torch.manual_seed(1)
        values.append(ELBO().terms(model, q, *batch).bound)
    torch.testing.assert_close(values[0], values[1], rtol=1e-13, atol=1e-13)


def test_the_identity_flow_agrees_with_the_closed_form(batch: tuple[Tensor, Tensor]) -> None:
    """Mean-field ELBO on the Gaussian prior (closed KL) and sampled ELBO on the flow prior, in the mean."""
    plain, q = conditional(StandardNormal(Z)), guide()
    flowing = ConditionalVAE(flow_prior(stirred=False), plain.decoder, plain.likelihood)
    closed = ELBO("mean_field", num_particles=4000).terms(plain, q, *batch).bound
    draws = ELBO("elbo", num_particles=4000).terms(flowing, q, *batch)
    log_w = draws.log_x - sum(draws.ratios)
    error = log_w.std(0) / 4000**0.5
    assert ((closed - log_w.mean(0)).abs() < 5 * error).all()


def test_the_push_forward_is_the_same_program(batch: tuple[Tensor, Tensor]) -> None:
    """Moving flow from the prior to the decoder and the guide changes no weight (cvae_nf, sec. 6)."""
    x, y = batch
    prior, decoder = flow_prior(), MLPDecoder(Z, X_SHAPE, (8,), labels=labels())
    model, q = ConditionalVAE(prior, decoder, Normal(value=0.5)), guide()
    z = poutine.trace(q).get_trace(x, y).nodes["z"]["value"]
    flow = prior.flow.condition(prior.labels(y))
    u = flow(z)
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda row, i=i: prior.flow.condition(prior.labels(y[i]))(row), z[i].detach()
            )
            for i in range(len(x))
        ]
    )
    log_q_u = torch.distributions.Normal(*q.encoder(x, y)).log_prob(z).sum(-1) - jacobian.det().abs().log()
    base = prior.base(y)
    log_x = model.decode(flow.inv(u), y).log_prob(x)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x, y)
    trace.compute_log_prob()
    log_q_z = torch.distributions.Normal(*q.encoder(x, y)).log_prob(z).sum(-1)
    weight = trace.nodes["x"]["log_prob"] + trace.nodes["z"]["log_prob"] - log_q_z
    torch.testing.assert_close(weight, log_x + base.log_prob(u) - log_q_u, rtol=1e-10, atol=1e-10)


def test_exact_samples_come_from_the_prior_and_paper_samples_from_its_base() -> None:
    prior = flow_prior()
    model = ConditionalVAE(prior, _Through(), Normal(value=1e-6))
    y = torch.full((20_000,), 2)
    u = prior.flow.condition(prior.labels(torch.tensor(2)))(model.sample(20_000, y, mean=True))
    base = prior.base(torch.tensor(2))
    torch.testing.assert_close(u.mean(0), base.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(u.std(0), base.stddev, atol=0.05, rtol=0)
    literal = model.sample(20_000, y, mean=True, sampling="paper")
    torch.testing.assert_close(literal.mean(0), base.mean, atol=0.05, rtol=0)
    exact = model.sample(20_000, y, mean=True)
    assert prior(y).log_prob(exact).mean() > prior(y).log_prob(literal).mean() + 0.1


def test_without_a_flow_both_ways_to_sample_are_one() -> None:
    for prior in (ConditionalFlowPrior(Z, labels()), flow_prior(stirred=False), StandardNormal(Z)):
        model, drawn = conditional(prior), []
        for sampling in ("exact", "paper"):
            torch.manual_seed(3)
            drawn.append(model.sample(6, torch.arange(3).repeat(2), mean=True, sampling=sampling))
        torch.testing.assert_close(drawn[0], drawn[1])


def test_one_row_of_labels_serves_every_draw() -> None:
    model = conditional()
    torch.manual_seed(0)
    one = model.sample(6, torch.tensor([1]), mean=True)
    torch.manual_seed(0)
    torch.testing.assert_close(one, model.sample(6, torch.ones(6, dtype=torch.int64), mean=True))


@pytest.mark.parametrize(
    ("n", "y", "sampling", "said"),
    [
        (4, None, "exact", "y must be given"),
        (4, torch.tensor([0, 1]), "exact", "one row, or one for each of the 4 draws, got 2"),
        (2, torch.tensor([0, 3]), "exact", "class numbers 0"),
        (0, torch.tensor([0]), "exact", "n must be positive, got 0"),
        (1, torch.tensor([0]), "other", "sampling must be 'exact' or 'paper'"),
    ],
)
def test_bad_requests_are_refused(n: int, y: Tensor | None, sampling: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        conditional().sample(n, y, sampling=sampling)  # type: ignore[arg-type]


def test_a_program_without_labels_is_refused(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="y must be given: this model is conditional"):
        conditional()(batch[0])


def test_labels_out_of_range_are_refused_at_both_doors(batch: tuple[Tensor, Tensor]) -> None:
    model, q = conditional(), guide()
    x, y = batch
    with pytest.raises(ValueError, match="class numbers 0"):
        pvae.log_likelihood(model, q, x, y + 1, num_particles=2)
    data = load("two_moons", num_train=64, num_test=16)
    points = ConditionalVAE(
        StandardNormal(2), MLPDecoder(2, (2,), labels=LabelEmbedding(LabelSpace("class", 1), 4)), Normal()
    )
    with pytest.raises(ValueError, match=r"class numbers 0 \.\.\. 0"):
        pvae.fit(points.float(), NormalGuide(MLPEncoder((2,), 2)).float(), data, steps=1, batch_size=32)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_stock_svi_trains_every_parameter(objective: type, batch: tuple[Tensor, Tensor]) -> None:
    model, q = conditional(), guide()
    before = {n: p.detach().clone() for m in (model, q) for n, p in m.named_parameters()}
    elbo = objective(num_particles=2, vectorize_particles=True)
    svi = SVI(registered(model, "model"), registered(q, "guide"), pyro.optim.Adam({"lr": 1e-2}), elbo)
    for _ in range(3):
        svi.step(*batch)
    for m in (model, q):
        for name, parameter in m.named_parameters():
            assert not torch.equal(parameter, before[name]), name


def test_training_learns_what_the_label_says() -> None:
    """Two moons with y = moon: a label-aware model beats the same model whose labels are shuffled."""
    torch.set_default_dtype(torch.float32)
    data = load("two_moons", num_train=512, num_test=256)
    assert data.num_classes == 2
    space = LabelSpace("class", 2)
    torch.manual_seed(0)
    model = ConditionalVAE(
        ConditionalFlowPrior(2, LabelEmbedding(space, 8), CouplingFlow(2, 2, 8, 16)),
        MLPDecoder(2, (2,), (32,), "silu", labels=LabelEmbedding(space, 8)),
        Normal("learned", 0.3),
    )
    q = NormalGuide(MLPEncoder((2,), 2, (32,), "silu", labels=LabelEmbedding(space, 8)))
    pvae.fit(model, q, data, epochs=60, batch_size=64, lr=5e-3)
    assert data.test.y is not None
    right = pvae.log_likelihood(model, q, data.test, num_particles=100)
    wrong = pvae.log_likelihood(model, q, data.test.x, 1 - data.test.y, num_particles=100)
    assert right.mean > wrong.mean + 1.0


def test_a_vae_stays_unconditional() -> None:
    assert not getattr(VAE(StandardNormal(Z), MLPDecoder(Z, X_SHAPE), Bernoulli()), "conditional", False)


class _Through(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return z
