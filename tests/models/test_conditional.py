"""The conditional VAE: its sites, its bound under a flow that is the identity, its two ways to sample."""

import copy
import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae.data import from_tensors, load
from pvae.guides import FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.inference import ELBO, registered
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import ConvDecoder, ConvEncoder, LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
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


def test_a_gaussian_given_y_is_absorbed_by_encoder_and_decoder(batch: tuple[Tensor, Tensor]) -> None:
    """N(mu(y), sigma(y)) weighs z as N(0, I) weighs (z - mu(y)) / sigma(y) (cvae_nf, sec. 6)."""
    x, y = batch
    prior, decoder = ConditionalFlowPrior(Z, labels()), MLPDecoder(Z, X_SHAPE, (8,), labels=labels())
    nn.init.normal_(prior.heads.out.weight, std=0.5)
    base = prior.base(y)
    assert (base.mean[0] - base.mean[1]).abs().max() > 0.01

    class Shifted(nn.Module):
        z_dim, out_shape = Z, X_SHAPE

        def forward(self, white: Tensor, y: Tensor) -> Tensor:
            return decoder(base.mean + base.stddev * white, y)

    loc, scale = torch.randn(5, Z), 0.2 + torch.rand(5, Z)
    models = (
        ConditionalVAE(prior, decoder, Normal(value=0.5)),
        ConditionalVAE(StandardNormal(Z), Shifted(), Normal(value=0.5)),
    )
    posteriors = ((loc, scale), ((loc - base.mean) / base.stddev, scale / base.stddev))
    weights = []
    for model, moments in zip(models, posteriors, strict=True):
        torch.manual_seed(2)
        terms = ELBO(num_particles=3).terms(model, NormalGuide(_Constant(*moments)), x, y)
        weights.append(terms.log_x - terms.ratios[0])
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)


def test_both_entropies_estimate_the_kl_to_a_flow_prior(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model, loc, scale = conditional(), torch.randn(5, Z), 0.2 + torch.rand(5, Z)
    estimates = {}
    for entropy in ("sampled", "analytic"):
        q = NormalGuide(_Constant(loc, scale), entropy)
        with torch.no_grad():
            estimates[entropy] = ELBO(num_particles=20_000).terms(model, q, x, y).ratios[0]
    means = [kl.mean(0) for kl in estimates.values()]
    error = sum(kl.var(0) / len(kl) for kl in estimates.values()) ** 0.5
    assert ((means[0] - means[1]).abs() < 4 * error).all()
    assert (torch.stack(means) > 0).all()
    # The analytic one for a single draw, term by term, the determinant from autograd.
    q = NormalGuide(_Constant(loc, scale), "analytic")
    torch.manual_seed(3)
    kl = ELBO().terms(model, q, x, y).ratios[0]
    torch.manual_seed(3)
    z = torch.normal(torch.zeros(5, Z), torch.ones(5, Z)) * scale + loc
    prior: Any = model.prior
    base = prior.base(y)
    for i in range(5):
        flow = prior.flow.condition(prior.labels(y[i]))
        u, mu, sigma = flow(z[i]), base.mean[i], base.stddev[i]
        quadratic = (u - mu).square() / (2 * sigma.square())
        jacobian = torch.autograd.functional.jacobian(flow, z[i])
        wanted = (sigma.log() - scale[i].log() - 0.5 + quadratic).sum() - jacobian.det().abs().log()
        torch.testing.assert_close(kl[i], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_observed_site_has_the_density_of_the_residuals(num_particles: int) -> None:
    x, y = torch.rand(4, *X_SHAPE), torch.tensor([0, 1, 2, 1])
    for mode in ("batch", "fixed"):
        model = ConditionalVAE(flow_prior(), MLPDecoder(Z, X_SHAPE, (8,), labels=labels()), Normal(mode))
        with pyro.plate("particles", num_particles, dim=-2):
            trace = poutine.trace(model).get_trace(x, y)
        trace.compute_log_prob()
        errors = (x - model.decoder(trace.nodes["z"]["value"], y)).detach().numpy()
        variance = (errors**2).mean() if mode == "batch" else 1.0
        nll = 0.5 * (errors**2).sum() / variance + 0.5 * errors.size * math.log(2 * math.pi * variance)
        assert errors.shape == (num_particles, 4, *X_SHAPE)
        assert -trace.nodes["x"]["log_prob_sum"].item() == pytest.approx(nll, rel=1e-12)


@pytest.mark.parametrize("space", [CLASSES, LabelSpace("attributes", 3)], ids=["class", "attributes"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_particles_of_a_batch_are_those_of_each_datum(space: LabelSpace, batch_size: int) -> None:
    """Three particles of a batch, convolutions and all, against every datum and particle by itself."""
    shape = (1, 4, 4)
    prior = ConditionalFlowPrior(Z, LabelEmbedding(space, 6), CouplingFlow(Z, 2, 6, 8))
    model = ConditionalVAE(
        prior, ConvDecoder(Z, shape, (4,), 8, labels=LabelEmbedding(space, 6)), Normal(value=0.5)
    )
    q = NormalGuide(ConvEncoder(shape, Z, (4,), 8, labels=LabelEmbedding(space, 6)))
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.rand(batch_size, *shape)
    y = torch.tensor([2, 0]) if space is CLASSES else torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    y = y[:batch_size]
    with pyro.plate("particles", 3, dim=-2):
        z = poutine.trace(q).get_trace(x, y).nodes["z"]["value"]
        trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x, y)
    trace.compute_log_prob()
    assert z.shape == (3, batch_size, Z)
    for k in range(3):
        for i in range(batch_size):
            one = poutine.condition(model, data={"z": z[k, i : i + 1]})
            alone = poutine.trace(one).get_trace(x[i : i + 1], y[i : i + 1])
            alone.compute_log_prob()
            for site in ("z", "x"):
                torch.testing.assert_close(
                    trace.nodes[site]["log_prob"][k, i], alone.nodes[site]["log_prob"][0]
                )


def test_a_used_model_is_copied_and_its_state_restored(batch: tuple[Tensor, Tensor]) -> None:
    def bound(model: nn.Module, q: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return ELBO().terms(model, q, *batch).bound

    model, q = conditional(), guide()
    before = bound(model, q)
    before.sum().backward()
    twin, other = copy.deepcopy((model, q)), (conditional(), guide())
    assert not torch.allclose(bound(*other), before)
    for fresh, used in zip(other, (model, q), strict=True):
        fresh.load_state_dict(used.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert (bound(model, q) - before).abs().min() > 1e-6
    for copied in (twin, other):
        assert torch.equal(bound(*copied), before)


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


@pytest.mark.parametrize(
    ("space", "y", "said"),
    [
        (CLASSES, torch.zeros(4, 1, dtype=torch.int64), r"y must have shape \(B,\), got \(4, 1\)"),
        (CLASSES, torch.tensor(1), r"y must have shape \(B,\), got \(\)"),
        (LabelSpace("attributes", 3), torch.zeros(3), r"y must have shape \(B, 3\), got \(3,\)"),
    ],
)
def test_labels_of_another_shape_are_refused(space: LabelSpace, y: Tensor, said: str) -> None:
    decoder = MLPDecoder(Z, X_SHAPE, labels=LabelEmbedding(space, 4))
    with pytest.raises(ValueError, match=said):
        ConditionalVAE(StandardNormal(Z), decoder, Normal()).sample(4, y)


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
    """Two moons with y = moon: draws lie on the moon asked for, unless labels were shuffled in training."""
    torch.set_default_dtype(torch.float32)
    data = load("two_moons", num_train=512, num_test=256)
    assert data.num_classes == 2
    train, test = data.train, data.test
    assert train.y is not None
    assert test.y is not None
    shuffled = from_tensors(train.x, y=train.y[torch.randperm(512)], name="shuffled")
    shares, gains = [], []
    for source in (data, shuffled):
        torch.manual_seed(0)
        model, q = moons_program()
        pvae.fit(model, q, source, steps=160, batch_size=128, lr=1e-2, progress=False)
        with torch.no_grad():
            right, wrong = (
                ELBO("iwae", 50).terms(model, q, test.x, y).bound.mean() for y in (test.y, 1 - test.y)
            )
        gains.append((right - wrong).item())
        y = torch.arange(400) % 2
        nearest = torch.cdist(model.sample(400, y, mean=True), train.x).argmin(1)
        shares.append((train.y[nearest] == y).double().mean().item())
    assert gains[0] > 1
    assert abs(gains[1]) < 0.5
    assert shares[0] > 0.9
    # Chance: half, give or take four standard errors, and what 512 labels say by chance.
    assert abs(shares[1] - 0.5) < 0.15


def moons_program() -> tuple[ConditionalVAE, NormalGuide]:
    space = LabelSpace("class", 2)
    model = ConditionalVAE(
        ConditionalFlowPrior(2, LabelEmbedding(space, 8), CouplingFlow(2, 2, 8, 16)),
        MLPDecoder(2, (2,), (32,), "silu", labels=LabelEmbedding(space, 8)),
        Normal("learned", 0.3),
    )
    return model, NormalGuide(MLPEncoder((2,), 2, (32,), "silu", labels=LabelEmbedding(space, 8)))


def test_a_vae_stays_unconditional() -> None:
    assert not getattr(VAE(StandardNormal(Z), MLPDecoder(Z, X_SHAPE), Bernoulli()), "conditional", False)


class _Through(nn.Module):
    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return z


class _Constant(nn.Module):
    """An encoder that says the same whatever x is."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc, self.scale = loc, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale
