"""X-VAE: affine equivalence, stage separation, the latent scale; and the autoencoder that comes first."""

import copy
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import Normal as gaussian  # beside the likelihood

import pvae
from pvae.data import from_tensors, load
from pvae.guides import NormalGuide, PointGuide
from pvae.inference import ELBO, Trainer, registered
from pvae.likelihoods import Bernoulli, Normal
from pvae.models import VAE, XVAE, Autoencoder
from pvae.nn import MLPDecoder, MLPEncoder, WhitenedDecoder, WhitenedEncoder
from pvae.priors import CodePrior, CodeStats, StandardNormal

X_SHAPE, Z = (1, 2, 3), 4
VARIANTS = ("diag", "full", "gmm", "kde", "marginal", "paired")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _double(float64: None) -> None:
    torch.manual_seed(0)


def codes(n: int = 300) -> Tensor:
    """Codes of two clusters, correlated, with scales far from one."""
    mixing = torch.randn(Z, Z)
    centre = torch.where(torch.rand(n, 1) < 0.5, -2.0, 2.0)
    return 3.0 + (torch.randn(n, Z) + centre) @ mixing


def stats(covariance: str = "full") -> CodeStats:
    gathered = CodeStats(Z, covariance=covariance)  # type: ignore[arg-type]
    gathered.update(codes())
    return gathered


def prior(variant: str) -> CodePrior:
    return CodePrior(Z, variant, components=3, num_codes=50).fit_(stats())  # type: ignore[arg-type]


def x_vae(variant: str = "diag") -> XVAE:
    encoder = MLPEncoder(X_SHAPE, Z, (8,))
    return XVAE(prior(variant), MLPDecoder(Z, X_SHAPE, (8,)), Normal(value=0.5), encoder)


def guide() -> NormalGuide:
    return NormalGuide(MLPEncoder(X_SHAPE, Z, (8,)))


@every_variant
def test_every_variant_trains_and_is_scored(variant: str) -> None:
    model, q, x = x_vae(variant), guide(), torch.rand(5, *X_SHAPE)
    for objective in (ELBO("elbo"), ELBO("mean_field"), ELBO("iwae", num_particles=3)):
        terms = objective.terms(model, q, x)
        assert terms.bound.shape == (5,)
        assert terms.bound.isfinite().all()
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (5,)
    assert pvae.log_likelihood(model, q, x, num_particles=50).log_prob.isfinite().all()


def test_a_paired_prior_is_the_code_in_training_and_the_mixture_in_evaluation() -> None:
    model, x = x_vae("paired"), torch.rand(5, *X_SHAPE)
    fn = poutine.trace(model).get_trace(x).nodes["z"]["fn"]
    torch.testing.assert_close(fn.mean, model.code(x))
    model.eval()
    fn = poutine.trace(model).get_trace(x).nodes["z"]["fn"]
    z = torch.randn(5, Z)
    torch.testing.assert_close(fn.log_prob(z), model.prior().log_prob(z))


def test_the_paired_bound_lacks_the_logarithm_of_the_number_of_codes() -> None:
    """KL(q || p_i) + log N >= KL(q || p), with q near its code, where log N is just what is lacking."""
    model, x = x_vae("paired"), 40 * torch.rand(6, *X_SHAPE)
    assert model.code_encoder is not None
    gathered = CodeStats(Z, covariance="full")
    gathered.update(model.code(x))
    model.prior = CodePrior(Z, "paired", num_codes=6, bandwidth=0.1).fit_(gathered)
    q = NormalGuide(_Near(model))
    paired = ELBO("mean_field").terms(model, q, x).ratios[0]
    model.eval()
    sampled = ELBO("elbo", num_particles=4000).terms(model, q, x).ratios[0]
    mixture, error = sampled.mean(0), sampled.std(0) / 4000**0.5
    slack = paired + model.prior.log_num_components - mixture
    assert (slack > -4 * error).all()
    assert slack.min() < 0.5
    assert (paired < mixture - 1).all()


def test_a_single_gaussian_is_absorbed_by_affine_layers() -> None:
    """ELBO(N(0, I), networks) = ELBO(N(m, s^2), networks after the map), datum by datum and draw by draw."""
    p = prior("diag")
    encoder, decoder = MLPEncoder(X_SHAPE, Z, (8,)), MLPDecoder(Z, X_SHAPE, (8,))
    q = NormalGuide(copy.deepcopy(encoder))
    standard = VAE(StandardNormal(Z), copy.deepcopy(decoder), Normal(value=0.5))
    with torch.no_grad():
        head, first = encoder.head, decoder.input_layer
        head.weight[:Z] *= p.scale.unsqueeze(-1)
        head.bias[:Z] = p.loc + p.scale * head.bias[:Z]
        first.bias.sub_(first.weight @ (p.loc / p.scale))
        first.weight /= p.scale
    moved, x = _Scaled(encoder, p.scale), torch.rand(7, *X_SHAPE)
    bounds = []
    for model, net in (
        (standard, q),
        (XVAE(p, decoder, Normal(value=0.5)), NormalGuide(moved)),
    ):
        torch.manual_seed(3)
        bounds.append(ELBO().terms(model, net, x).bound)
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-10, atol=1e-10)


def test_whitened_diag_is_the_standard_vae_step_for_step() -> None:
    torch.set_default_dtype(torch.float32)
    data = load("digits", binarize="none", dequantize=True)
    p = CodePrior(Z).fit_(stats())
    encoder, decoder = MLPEncoder((1, 8, 8), Z, (16,)), MLPDecoder(Z, (1, 8, 8), (16,))
    pairs = {
        "standard": (
            VAE(StandardNormal(Z), copy.deepcopy(decoder), Normal("batch", 0.3)),
            NormalGuide(copy.deepcopy(encoder)),
        ),
        "whitened": (
            XVAE(p, WhitenedDecoder(decoder), Normal("batch", 0.3)),
            NormalGuide(WhitenedEncoder(encoder)),
        ),
    }
    white, back = pairs["whitened"][1].encoder, pairs["whitened"][0].decoder
    assert isinstance(white, WhitenedEncoder)
    assert isinstance(back, WhitenedDecoder)
    white.set_(p.loc, p.scale)
    back.set_(p.loc, p.scale)
    losses = {}
    for name, (model, q) in pairs.items():
        run = pvae.fit(model, q, data, steps=50, batch_size=64, log_every=1, seed=4)
        losses[name] = [row["loss"] for row in run.history]
    assert len(losses["standard"]) == 50
    assert losses["whitened"] == pytest.approx(losses["standard"], rel=2e-4, abs=2e-3)
    assert losses["standard"][-1] < losses["standard"][0] - 1


def test_the_autoencoder_stays_as_it_was() -> None:
    torch.set_default_dtype(torch.float32)
    data = load("digits", binarize="dynamic")
    encoder = MLPEncoder((1, 8, 8), Z, (8,))
    model = XVAE(prior("paired").float(), MLPDecoder(Z, (1, 8, 8), (8,)), Bernoulli(), encoder)
    assert model.code_encoder is not None
    before = copy.deepcopy(model.code_encoder.state_dict())
    assert before.keys() == encoder.state_dict().keys()
    q = NormalGuide(MLPEncoder((1, 8, 8), Z, (8,)))
    pvae.fit(model, q, data, steps=20, batch_size=64)
    for name, tensor in model.code_encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(tensor, encoder.state_dict()[name]), name
    svi = SVI(registered(model, "model"), registered(q, "guide"), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(data.train[:8].x)
    assert not [name for name in pyro.get_param_store() if "code_encoder" in name or "prior" in name]


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_stock_svi_trains_every_parameter(objective: type) -> None:
    model, q, x = x_vae("gmm"), guide(), torch.rand(5, *X_SHAPE)
    trained = [(n, p) for m in (model, q) for n, p in m.named_parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in trained}
    svi = SVI(registered(model, "model"), registered(q, "guide"), pyro.optim.Adam({"lr": 1e-2}), objective())
    for _ in range(3):
        svi.step(x)
    assert trained
    assert [n for n, p in trained if torch.equal(p, before[n])] == []


@every_variant
def test_scale_zero_decodes_the_centre_and_scale_one_is_the_model(variant: str) -> None:
    model = x_vae(variant)
    still = model.sample(40, mean=True, scale=0.0, scale_mode="global")
    centre = model.decode(model.prior().mean).mean
    torch.testing.assert_close(still, centre.expand(40, *X_SHAPE))
    drawn = []
    for scale in (1.0, 0.5):
        torch.manual_seed(1)
        drawn.append(model.sample(40, mean=True, scale=scale))
    torch.manual_seed(1)
    torch.testing.assert_close(drawn[0], model.sample(40, mean=True))
    assert not torch.allclose(drawn[0], drawn[1])


def test_bad_scales_are_refused() -> None:
    model = x_vae()
    bad = ((-1.0, "within", "scale must be finite"), (1.0, "other", "'within' or 'global'"))
    for scale, mode, said in bad:
        with pytest.raises(ValueError, match=said):
            model.sample(2, scale=scale, scale_mode=mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be positive"):
        model.sample(0)


def test_a_paired_prior_needs_its_encoder() -> None:
    with pytest.raises(ValueError, match="code_encoder must be given"):
        XVAE(prior("paired"), MLPDecoder(Z, X_SHAPE), Normal())
    with pytest.raises(ValueError, match="no encoder of codes"):
        XVAE(prior("diag"), MLPDecoder(Z, X_SHAPE), Normal()).code(torch.rand(1, *X_SHAPE))


@every_variant
def test_a_state_dict_restores_density_and_sampler(variant: str) -> None:
    model = x_vae(variant)
    fresh = XVAE(
        CodePrior(Z, variant, components=3, num_codes=50),  # type: ignore[arg-type]
        MLPDecoder(Z, X_SHAPE, (8,)),
        Normal(value=0.5),
        MLPEncoder(X_SHAPE, Z, (8,)),
    )
    fresh.load_state_dict(model.state_dict())
    z, x = torch.randn(6, Z), torch.rand(3, *X_SHAPE)
    assert torch.equal(fresh.prior().log_prob(z), model.prior().log_prob(z))
    assert torch.equal(fresh.code(x), model.code(x))
    drawn = []
    for one in (model, fresh):
        torch.manual_seed(2)
        drawn.append(one.sample(5, scale=0.7))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["elbo", "mean_field"])
def test_beta_doubles_the_kl_part(kind: Any) -> None:
    model, q, x = x_vae("diag"), guide(), torch.rand(5, *X_SHAPE)
    p = model.prior
    loc, scale = q.encoder(x)
    torch.manual_seed(0)
    z = loc + scale * torch.normal(torch.zeros(5, Z), torch.ones(5, Z))
    reconstruction = -gaussian(model.decoder(z), 0.5).log_prob(x).sum() / 5
    if kind == "elbo":
        kl = (gaussian(loc, scale).log_prob(z) - gaussian(p.loc, p.scale).log_prob(z)).sum() / 5
    else:
        square = (scale.square() + (loc - p.loc).square()) / (2 * p.scale.square())
        kl = ((p.scale / scale).log() + square - 0.5).sum() / 5
    stock = {"elbo": Trace_ELBO(), "mean_field": TraceMeanField_ELBO()}[kind]
    for beta in (0.0, 1.0, 2.0):
        wanted = (reconstruction + beta * kl).item()
        torch.manual_seed(0)
        assert ELBO(kind).terms(model, q, x, beta=beta).loss.item() == pytest.approx(wanted, rel=1e-10)
        # Pyro's own way: the same scale around z in both programs.
        programs = [
            poutine.scale(poutine.block(program, hide=["x"]), scale=beta or 0.5) for program in (model, q)
        ]
        torch.manual_seed(0)
        assert stock.loss(*programs, x) == pytest.approx((beta or 0.5) * 5 * kl.item(), rel=1e-10)


def test_only_whitened_networks_do_not_feel_the_scale_of_the_codes() -> None:
    """Codes ten times as large are the same autoencoder: whitened, it is the same VAE, raw it is not."""
    a, x = codes(), torch.rand(5, *X_SHAPE)
    encoder, decoder = MLPEncoder(X_SHAPE, Z, (8,)), MLPDecoder(Z, X_SHAPE, (8,))
    bounds: dict[str, list[Tensor]] = {"whitened": [], "raw": []}
    for factor in (1.0, 10.0):
        gathered = CodeStats(Z)
        gathered.update(factor * a)
        p = CodePrior(Z).fit_(gathered)
        white, back = WhitenedEncoder(encoder), WhitenedDecoder(decoder)
        white.set_(p.loc, p.scale)
        back.set_(p.loc, p.scale)
        for name, net, head in (("whitened", white, back), ("raw", encoder, decoder)):
            torch.manual_seed(1)
            model = XVAE(p, head, Normal(value=0.5))
            bounds[name].append(ELBO().terms(model, NormalGuide(net), x).bound)
    torch.testing.assert_close(*bounds["whitened"], rtol=1e-10, atol=1e-10)
    assert ((bounds["raw"][0] - bounds["raw"][1]).abs() > 1).all()


def test_an_autoencoder_trains_on_the_reconstruction_alone() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.rand(64, *X_SHAPE)
    encoder, decoder = MLPEncoder(X_SHAPE, Z, (16,)), MLPDecoder(Z, X_SHAPE, (16,))
    model, point = Autoencoder(decoder, Normal()), PointGuide(encoder)
    terms = ELBO().terms(model, point, x)
    error = (decoder(encoder(x)[0]) - x).square().sum((1, 2, 3))
    expected = -0.5 * error - 3 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(terms.bound, expected)
    trainer = Trainer(model, point, total_steps=300, lr=1e-2, window=300)
    data = from_tensors(x)
    with trainer.generator():
        for epoch in range(300):
            for batch in data.train.batches(64, seed=0, epoch=epoch, drop_last=True):
                trainer.step(batch)
    assert (decoder(encoder(x)[0]) - x).square().sum((1, 2, 3)).mean() < 0.5 * error.mean()


def test_a_code_penalty_is_the_squared_code() -> None:
    x, encoder, decoder = torch.rand(6, *X_SHAPE), MLPEncoder(X_SHAPE, Z), MLPDecoder(Z, X_SHAPE)
    losses = [
        ELBO().terms(Autoencoder(decoder, Normal(), weight), PointGuide(encoder), x).bound
        for weight in (0.25, 0.75)
    ]
    code = encoder(x)[0].square().sum(-1)
    normalisers = 0.5 * Z * torch.log(torch.tensor(0.75 / 0.25))
    torch.testing.assert_close(losses[0] - losses[1], 0.5 * code - normalisers)
    with pytest.raises(ValueError, match="code_l2 must not be negative"):
        Autoencoder(decoder, Normal(), -1.0)


def test_noise_on_the_code_is_for_training_alone() -> None:
    x, point = torch.rand(6, *X_SHAPE), PointGuide(MLPEncoder(X_SHAPE, Z), noise=0.5)
    code = point.encoder(x)[0]
    assert not torch.allclose(point(x), code)
    torch.testing.assert_close(point.eval()(x), code)
    with pytest.raises(ValueError, match="noise must not be negative"):
        PointGuide(point.encoder, noise=-0.1)


def test_an_autoencoder_has_no_likelihood() -> None:
    x = torch.rand(6, *X_SHAPE)
    model, point = Autoencoder(MLPDecoder(Z, X_SHAPE), Normal()), PointGuide(MLPEncoder(X_SHAPE, Z))
    with pytest.raises(ValueError, match="surrogate density, which cannot enter a likelihood"):
        pvae.log_likelihood(model, point, x, num_particles=3)


class _Scaled(MLPEncoder):
    """An encoder whose scales alone are multiplied."""

    def __init__(self, encoder: MLPEncoder, factor: Tensor) -> None:
        super().__init__(encoder.x_shape, encoder.z_dim, (8,))
        self.load_state_dict(encoder.state_dict())
        self.factor = factor

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = super().heads(h)
        return loc, self.factor * scale


class _Near(nn.Module):
    """A posterior narrower than the kernel around the code of x."""

    def __init__(self, model: XVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.model.code(x)
        return code, (0.9 * self.model.prior(code=code).stddev).expand_as(code)
