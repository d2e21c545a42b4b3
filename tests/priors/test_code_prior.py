"""Priors made of codes: each variant against a second implementation, and what every one must keep."""

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import linalg, stats
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pvae.distributions import CodeMixture
from pvae.inference import ELBO
from pvae.priors import CodePrior, CodeStats
from tests.distributions.tracing import host_syncs

pytestmark = pytest.mark.usefixtures("float64")

#: Every variant, with the options that change its parameters.
VARIANTS: dict[str, dict[str, Any]] = {
    "diag": {},
    "full": {},
    "gmm": {"components": 3},
    "gmm-full": {"variant": "gmm", "components": 3, "covariance": "full"},
    "kde": {"num_codes": 400},
    "marginal": {"components": 3},
    "paired": {"num_codes": 400, "bandwidth": 0.3},
}
SINGLE = ("diag", "full")


def options(name: str) -> dict[str, Any]:
    return {"variant": name, **VARIANTS[name]}


def codes(n: int = 300, z_dim: int = 3, seed: int = 0) -> Tensor:
    """Three clusters with correlations, away from zero and of different scales."""
    rng = np.random.default_rng(seed)
    centres = 4 * np.random.default_rng(7).normal(size=(3, z_dim))
    mix = np.tril(np.random.default_rng(8).normal(size=(z_dim, z_dim))) + np.eye(z_dim)
    raw = centres[rng.integers(3, size=n)] + rng.normal(size=(n, z_dim)) @ mix.T
    return torch.from_numpy(raw * np.logspace(-0.5, 0.5, z_dim) + 5)


def statistics(a: Tensor) -> CodeStats:
    stats = CodeStats(a.shape[1], "full")
    stats.update(a, torch.arange(len(a)))
    return stats


def fitted(name: str, a: Tensor | None = None, **extra: Any) -> CodePrior:
    a = codes() if a is None else a
    return CodePrior(a.shape[1], **{**options(name), **extra}).fit_(statistics(a))


def posterior(batch: int, prior: CodePrior) -> dist.TorchDistribution:
    loc = prior.loc + prior.scale * torch.randn(batch, prior.z_dim)
    return dist.Normal(loc, prior.scale * (0.1 + torch.rand(batch, prior.z_dim))).to_event(1)


def textbook_kl(q: Any, mean: np.ndarray, tril: np.ndarray) -> np.ndarray:
    """The closed form with a Cholesky factor by triangular solves, row by row."""
    out = []
    for mu, sigma in zip(q.base_dist.loc.numpy(), q.base_dist.scale.numpy(), strict=True):
        spread = linalg.solve_triangular(tril, np.diag(sigma), lower=True)
        gap = linalg.solve_triangular(tril, mu - mean, lower=True)
        log_det = 2 * np.log(tril.diagonal()).sum() - 2 * np.log(sigma).sum()
        out.append(0.5 * ((spread**2).sum() + gap @ gap - len(mu) + log_det))
    return np.array(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_call_gives_one_distribution_over_z(name: str) -> None:
    prior = fitted(name)
    p = prior()
    assert (p.batch_shape, p.event_shape) == ((), (3,))
    assert not CodePrior.conditional
    assert prior.needs_code == (name == "paired")
    assert list(prior.parameters()) == []
    wide = p.expand(torch.Size([2, 5]))
    z = wide.sample()
    assert z.shape == (2, 5, 3)
    torch.testing.assert_close(wide.log_prob(z), p.log_prob(z))


def test_diag_and_full_are_the_moments_of_the_codes() -> None:
    a = codes()
    diag, full = fitted("diag", a), fitted("full", a)
    z = torch.randn(6, 3) + 5
    x = a.numpy()
    wanted = stats.norm(x.mean(0), x.std(0, ddof=1)).logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(diag().log_prob(z).numpy(), wanted, rtol=1e-10)
    covariance = np.cov(x.T)
    covariance = 0.999 * covariance + (0.001 + 1e-6) * np.diag(covariance.diagonal())
    wanted = stats.multivariate_normal(x.mean(0), covariance).logpdf(z.numpy())
    np.testing.assert_allclose(full().log_prob(z).numpy(), wanted, rtol=1e-9)
    for prior in (diag, full):
        np.testing.assert_allclose(prior.loc.numpy(), x.mean(0))
        np.testing.assert_allclose(prior.scale.numpy(), x.std(0, ddof=1))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", SINGLE)
def test_closed_form_kl(name: str, expanded: bool) -> None:
    prior = fitted(name)
    q = posterior(5, prior)
    p = prior().expand(torch.Size([5])) if expanded else prior()
    kl = kl_divergence(q, p)
    tril = prior.component_scale.diag() if name == "diag" else prior.component_scale_tril
    np.testing.assert_allclose(kl.numpy(), textbook_kl(q, prior.loc.numpy(), tril.numpy()), rtol=1e-10)
    z = q.sample(torch.Size([20_000]))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert ((ratio.mean(0) - kl).abs() < 4 * ratio.std(0) / math.sqrt(20_000)).all()
    assert (kl > 0).all()


def test_unit_moments_give_the_textbook_kl() -> None:
    prior = CodePrior(4).fit_(statistics(torch.randn(50, 4)))
    with torch.no_grad():
        prior.component_loc.zero_()
        prior.component_scale.fill_(1.0)
    mu, log_var = torch.randn(5, 4), torch.randn(5, 4)
    q = dist.Normal(mu, (0.5 * log_var).exp()).to_event(1)
    wanted = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(-1)
    torch.testing.assert_close(kl_divergence(q, prior()), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SINGLE)
def test_kl_vanishes_with_its_gradient_at_the_prior(name: str) -> None:
    prior = fitted(name)
    if name == "full":  # a diagonal posterior reaches a diagonal covariance alone
        with torch.no_grad():
            prior.component_scale_tril.copy_(prior.scale.diag())
    loc, scale = (t.clone().requires_grad_() for t in (prior.loc, prior.scale))
    kl = kl_divergence(dist.Normal(loc, scale).to_event(1), prior())
    gradients = torch.autograd.grad(kl, (loc, scale))
    assert abs(kl.item()) < 1e-10
    assert max(g.abs().max() for g in gradients) < 1e-10


class _Model(nn.Module):
    """The prior, and an observation that says nothing about z."""

    def __init__(self, prior: CodePrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


class _Guide(nn.Module):
    def __init__(self, q: Any) -> None:
        super().__init__()
        self.loc = nn.Parameter(q.base_dist.loc.clone())
        self.scale = q.base_dist.scale

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize(
    ("name", "extra", "closed"),
    [
        ("diag", {}, True),
        ("full", {}, True),
        ("gmm", {}, False),
        ("gmm", {"kl": "variational"}, True),
        ("gmm-full", {"kl": "nearest"}, True),
        ("kde", {"kl": "convex"}, True),
        ("kde", {}, False),
        ("marginal", {}, False),
    ],
)
def test_closed_forms_are_found_inside_a_plate(
    name: str, extra: dict[str, Any], closed: bool, num_particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def counted(q: Any, p: Any) -> Tensor:
        kl = kl_divergence(q, p)
        found.append(kl.shape)
        return kl

    monkeypatch.setattr("pvae.inference.objective.kl_divergence", counted)
    prior, x = fitted(name, **extra), torch.randn(4, 2)
    q = posterior(4, prior)
    model, guide = _Model(prior), _Guide(q)
    objective = ELBO("mean_field", num_particles=num_particles)
    losses = [objective.loss(model, guide, x) for _ in range(4)]
    shape = (num_particles, 4) if num_particles > 1 else (4,)
    assert found == [shape] * 4 * closed
    assert (np.std(losses) < 1e-9) == closed
    if closed:
        wanted = kl_divergence(q, prior()).sum() - dist.Normal(0.0, 1.0).log_prob(x).sum()
        assert losses[0] == pytest.approx(wanted.item(), rel=1e-10)
        pyros = TraceMeanField_ELBO().loss(model, guide, x)
        assert pyros == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.parametrize("name", SINGLE)
def test_sampled_and_closed_objectives_agree_in_mean(name: str) -> None:
    prior, x = fitted(name), torch.randn(3, 2)
    model, guide = _Model(prior), _Guide(posterior(3, prior))
    closed = TraceMeanField_ELBO().loss(model, guide, x)
    for sampled in (
        ELBO("elbo", num_particles=4000),
        Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1),
    ):
        losses = [sampled.loss(model, guide, x) for _ in range(8)]
        assert abs(np.mean(losses) - closed) < 5 * np.std(losses, ddof=1) / math.sqrt(8)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_gmm_is_the_one_of_scikit_learn(covariance: Any) -> None:
    a = codes(600)
    prior = fitted("gmm", a, covariance=covariance)
    # Fitted by hand in the same standardised coordinates; a density changes by the Jacobian.
    x, mean, std = a.numpy(), a.numpy().mean(0), a.numpy().std(0, ddof=1)
    fit = GaussianMixture(3, covariance_type=covariance, n_init=5, reg_covar=1e-3, random_state=1)
    wanted = fit.fit((x - mean) / std).score_samples((x - mean) / std) - np.log(std).sum()
    np.testing.assert_allclose(prior().log_prob(a).mean().item(), wanted.mean(), atol=5e-3)
    assert prior().log_prob(a).mean() > fitted("diag", a)().log_prob(a).mean() + 0.3


def test_gmm_does_not_depend_on_the_units_of_the_codes() -> None:
    a, units = codes(), torch.tensor([10.0, 0.1, 3.0])
    for covariance in ("diag", "full"):
        here = fitted("gmm", a, covariance=covariance)
        there = fitted("gmm", a * units + 2, covariance=covariance)
        z = torch.randn(5, 3) + 5
        gained = here().log_prob(z) - there().log_prob(z * units + 2)
        torch.testing.assert_close(gained, units.log().sum().expand(5), rtol=0, atol=1e-6)


def test_gmm_that_does_not_settle_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.priors.code_fit._EM_STEPS", 1)
    with pytest.warns(
        UserWarning, match="mixture of 3 components has not settled after 1 steps .* nats per code"
    ):
        fitted("gmm")


def test_marginal_is_a_product_of_mixtures() -> None:
    a = codes(800)
    prior = fitted("marginal", a)
    total, z = np.zeros(800), torch.randn(5, 3) + 5
    by_hand = np.zeros(5)
    for j in range(3):
        x = a[:, j].numpy()
        mean, std = x.mean(), x.std(ddof=1)
        fit = GaussianMixture(3, n_init=5, reg_covar=1e-3, random_state=1).fit(((x - mean) / std)[:, None])
        total += fit.score_samples(((x - mean) / std)[:, None]) - np.log(std)
        weights = prior.component_logits[j].softmax(0).numpy()
        normal = stats.norm(prior.component_loc[j].numpy(), prior.component_scale[j].numpy())
        by_hand += np.log(normal.pdf(z[:, j : j + 1].numpy()) @ weights)
    np.testing.assert_allclose(prior().log_prob(z).numpy(), by_hand, rtol=1e-9)
    assert prior().log_prob(a).mean().item() == pytest.approx(total.mean(), abs=5e-3)


@pytest.mark.parametrize("name", ["kde", "paired"])
def test_kernels_are_the_kernel_density_of_scikit_learn(name: str) -> None:
    a = codes()
    prior = fitted(name, a, preserve_moments=False, bandwidth=None)
    mean, std = a.mean(0), a.std(0)
    white, z = ((a - mean) / std).numpy(), torch.randn(8, 3) + 5
    scott = len(a) ** (-1 / (3 + 4))
    oracle = KernelDensity(bandwidth=scott, rtol=0).fit(white)
    wanted = oracle.score_samples(((z - mean) / std).numpy()) - std.log().sum().item()
    np.testing.assert_allclose(prior().log_prob(z).numpy(), wanted, rtol=1e-8)
    np.testing.assert_allclose((prior.component_scale / std).numpy(), scott)


@pytest.mark.parametrize("bandwidth", [None, 0.7, "loo"])
def test_kde_keeps_the_moments_of_the_codes(bandwidth: Any) -> None:
    a = codes()
    p = fitted("kde", a, bandwidth=bandwidth)()
    torch.testing.assert_close(p.mean, a.mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(p.variance, a.var(0), rtol=1 / 200, atol=0)  # divisor n against n - 1
    wider = fitted("kde", a, bandwidth=bandwidth, preserve_moments=False)
    h = wider.component_scale / a.std(0)
    torch.testing.assert_close(wider().variance, a.var(0) * (1 + h.square()), rtol=1 / 200, atol=0)


@pytest.mark.parametrize("preserve", [False, True])
def test_leave_one_out_bandwidth_has_the_best_left_out_likelihood(preserve: bool) -> None:
    a = codes(80, 2)
    prior = fitted("kde", a, bandwidth="loo", preserve_moments=preserve)
    chosen = (prior.component_scale / a.std(0)).mean().item()
    white = ((a - a.mean(0)) / a.std(0)).numpy()

    def left_out(width: float) -> float:
        centres = white * math.sqrt(1 - width**2) if preserve else white
        scores = [
            KernelDensity(bandwidth=width, rtol=0).fit(np.delete(centres, i, 0)).score(white[i : i + 1])
            for i in range(len(white))
        ]
        return float(np.sum(scores))

    best = left_out(chosen)
    assert all(left_out(factor * chosen) <= best + 1e-4 for factor in (0.8, 0.95, 1.05, 1.2))


def test_paired_prior_stands_on_the_code_of_the_datum() -> None:
    a = codes()
    prior = fitted("paired", a)
    p = prior(code=a[:4])
    assert (p.batch_shape, p.event_shape) == ((4,), (3,))
    z = torch.randn(4, 3) + 5
    wanted = stats.norm(a[:4].numpy(), 0.3 * a.std(0).numpy()).logpdf(z.numpy()).sum(-1)
    np.testing.assert_allclose(p.log_prob(z).numpy(), wanted, rtol=1e-10)
    terms = dist.Normal(a, 0.3 * a.std(0)).to_event(1).log_prob(z[:, None])
    torch.testing.assert_close(prior().log_prob(z), terms.logsumexp(1) - math.log(300))


def test_paired_bounds() -> None:
    a = codes(12)
    prior = fitted("paired", a, num_codes=12)
    q = dist.Normal(a + 0.2 * torch.randn(12, 3), 0.2 * prior.scale * (0.5 + torch.rand(12, 3))).to_event(1)
    per_point = kl_divergence(q, prior(code=a))
    n = 20_000
    z = q.sample(torch.Size([n]))
    ratio = q.log_prob(z) - prior().log_prob(z)
    to_mixture, error = ratio.mean(0), ratio.std(0) / math.sqrt(n)
    # Each point needs log N; the aggregates do not.
    assert prior.log_num_components == pytest.approx(math.log(12))
    assert (per_point + prior.log_num_components >= to_mixture - 4 * error).all()
    assert (per_point < to_mixture).any()
    log_aggregate = q.log_prob(z.unsqueeze(-2)).logsumexp(-1) - math.log(12)
    between = (log_aggregate - prior().log_prob(z)).mean()
    assert between <= per_point.mean() + 4 * error.max()


def test_number_of_components() -> None:
    wanted = {"diag": 1, "full": 1, "gmm": 3, "gmm-full": 3, "kde": 300, "paired": 300, "marginal": 27}
    for name, number in wanted.items():
        assert fitted(name).log_num_components == pytest.approx(math.log(number))


def test_fewer_codes_than_there_is_room_for() -> None:
    a = codes(50)
    roomy, exact = fitted("kde", a, num_codes=400), fitted("kde", a, num_codes=50)
    z = torch.randn(9, 3) + 5
    torch.testing.assert_close(roomy().log_prob(z), exact().log_prob(z))
    torch.testing.assert_close(roomy().mean, exact().mean)
    assert fitted("kde", a, num_codes=20).log_num_components == pytest.approx(math.log(20))
    for mode in ("variational", "nearest", "convex"):
        q = posterior(3, roomy)
        bounds = [kl_divergence(q, fitted("kde", a, num_codes=n, kl=mode)()) for n in (400, 50)]
        torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("learn", [False, True])
def test_state_restores_density_and_sampler_bit_for_bit(name: str, learn: bool) -> None:
    prior = fitted(name, learn=learn)
    fresh = CodePrior(3, **{**options(name), "learn": learn})
    fresh.load_state_dict(prior.state_dict())
    z = torch.randn(7, 3) + 5
    assert torch.equal(fresh().log_prob(z), prior().log_prob(z))
    draws = []
    for p in (prior, fresh, copy.deepcopy(prior)):
        torch.manual_seed(5)
        draws.append((p().sample(torch.Size([9])), p.scaled(0.5).sample((9,))))
    for other in draws[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draws[0], other, strict=True))
    nested = nn.Sequential(CodePrior(3, **{**options(name), "learn": learn}))
    nested.load_state_dict(nn.Sequential(prior).state_dict())
    assert torch.equal(nested[0]().log_prob(z), prior().log_prob(z))


@pytest.mark.parametrize("name", VARIANTS)
def test_unfitted_prior_is_refused_at_the_door(name: str) -> None:
    prior = CodePrior(3, **options(name))
    for call in (prior, lambda: prior.scaled(1.0), lambda: prior.responsibilities(torch.zeros(1, 3))):
        with pytest.raises(RuntimeError, match="has no parameters yet: call fit_"):
            call()
    ready = fitted(name)
    ready.load_state_dict(prior.state_dict())
    with pytest.raises(RuntimeError, match="has no parameters yet"):
        ready()
    assert "fitted=False" in repr(prior)


@pytest.mark.parametrize("name", VARIANTS)
def test_learned_parameters_get_gradients_and_scales_stay_positive(name: str) -> None:
    fixed, prior = fitted(name), fitted(name, learn=True)
    z = codes(20, seed=3)
    torch.testing.assert_close(prior().log_prob(z), fixed().log_prob(z), rtol=1e-10, atol=1e-10)
    optimizer = torch.optim.SGD(prior.parameters(), lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        (-prior().log_prob(z).mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prior.parameters())
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
    p = prior()
    assert (p.variance > 0).all()
    assert p.log_prob(z).isfinite().all()
    # What whitening and warm starts read does not move.
    assert torch.equal(prior.loc, fixed.loc)
    assert torch.equal(prior.scale, fixed.scale)


@pytest.mark.filterwarnings("ignore:at scale:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mode", ["within", "global"])
def test_scale_zero_is_a_centre_and_one_the_prior(name: str, mode: Any) -> None:
    prior = fitted(name)
    still = prior.scaled(0.0, mode).sample((50,))
    if mode == "global" or name in SINGLE:
        assert torch.equal(still, prior().mean.expand(50, 3))
    elif name == "marginal":
        assert all((still[:, j : j + 1] == prior.component_loc[j]).any(1).all() for j in range(3))
    else:
        assert (still[:, None] == prior.component_loc).all(-1).any(1).all()
    z = prior.scaled(1, mode).sample((10_000,))
    standard_error = prior().variance.sqrt() / 100
    assert ((z.mean(0) - prior().mean).abs() < 4 * standard_error).all()
    torch.testing.assert_close(z.var(0), prior().variance, rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore:at scale:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_spread_is_proportional_to_the_scale(name: str) -> None:
    prior, draws = fitted(name), {}
    for f in (0.0, 0.5, 1.0, 1.5):
        for mode in ("within", "global"):
            torch.manual_seed(11)
            draws[f, mode] = prior.scaled(f, mode).sample((10_000,))
    for mode in ("within", "global"):
        origin = draws[0.0, mode]
        for f in (0.5, 1.5):
            torch.testing.assert_close(
                draws[f, mode] - origin, f * (draws[1.0, mode] - origin), rtol=1e-9, atol=1e-9
            )
    for f in (0.5, 1.5):
        ratio = draws[f, "global"].std(0) / prior().variance.sqrt()
        torch.testing.assert_close(ratio, torch.full((3,), f), rtol=0.05, atol=0)
    torch.testing.assert_close(draws[1.0, "within"], draws[1.0, "global"], rtol=1e-12, atol=1e-12)


def test_memorised_items_are_warned_of() -> None:
    for name in ("kde", "paired"):
        prior = fitted(name)
        with pytest.warns(UserWarning, match=f"samples of a '{name}' prior are near reconstructions"):
            prior.scaled(0.25)
        prior.scaled(0.25, "global")
        prior.scaled(0.5)
    fitted("gmm").scaled(0.0)


def test_the_subset_is_as_large_as_asked() -> None:
    mixture = fitted("gmm", num_subset=5)()
    assert isinstance(mixture, CodeMixture)
    assert mixture.num_subset == mixture.expand(torch.Size([2])).num_subset == 5


def test_bad_scales_are_refused() -> None:
    prior = fitted("diag")
    for scale in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale must be finite and not negative, got"):
            prior.scaled(scale)
    with pytest.raises(ValueError, match="mode must be 'within' or 'global', got 'local'"):
        prior.scaled(1.0, "local")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_responsibilities_say_where_the_codes_went(name: str) -> None:
    a = codes()
    prior = fitted(name, a)
    shares = prior.responsibilities(a)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:-1]))
    if name in SINGLE:
        assert shares.shape == (300, 1)
    elif name == "marginal":
        assert shares.shape == (300, 3, 3)
    elif name in ("gmm", "gmm-full"):
        weights = prior.component_logits.softmax(0)
        torch.testing.assert_close(shares.mean(0), weights, rtol=0, atol=0.02)
    else:
        assert (
            shares.argmax(-1) == torch.cdist(a, prior.component_loc[:300]).argmin(-1)
        ).float().mean() > 0.5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dead", [1, 3])
@pytest.mark.filterwarnings("ignore:.*hardly vary")
def test_dead_dimensions_do_not_give_nan(name: str, dead: int) -> None:
    a = codes()
    a[:, 3 - dead :] = 2.5
    loo = {"bandwidth": "loo"} if name in ("kde", "paired") else {}
    prior = fitted(name, a, **loo)
    p = prior()
    z = prior.scaled(1.0).sample((20,))
    assert p.log_prob(z).isfinite().all()
    assert p.log_prob(a).isfinite().all()
    q = posterior(4, prior)
    assert (q.log_prob(q.mean) - p.log_prob(q.mean)).isfinite().all()
    # The spread of such a dimension is the floor, in every component.
    floor = statistics(a).scale().floor
    deviation = (z[:, 3 - dead :] - 2.5).abs()
    assert deviation.max() < 6 * floor
    assert p.variance[3 - dead :].sqrt().tolist() == [pytest.approx(floor, rel=1e-3)] * dead


def test_robust_prior_withstands_outliers() -> None:
    a = codes(2000)
    dirty = a.clone()
    dirty[:40] = 1e4
    for name in SINGLE:
        clean, robust = fitted(name, a, robust=True), fitted(name, dirty, robust=True)
        torch.testing.assert_close(robust().variance, clean().variance, rtol=0.15, atol=0)
        assert (fitted(name, dirty)().variance > 100 * clean().variance).all()


def test_scaled_codes_scale_the_prior() -> None:
    a = codes()
    for name in VARIANTS:
        p, q = fitted(name, a)(), fitted(name, 10 * a)()
        torch.testing.assert_close(q.mean, 10 * p.mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(q.variance, 100 * p.variance, rtol=1e-4, atol=0)


def test_single_precision_and_no_host_sync_in_a_step() -> None:
    for name in VARIANTS:
        prior = CodePrior(3, **options(name)).float().fit_(statistics(codes()))
        z = torch.randn(5, 3, dtype=torch.float32)
        with pyro.validation_enabled(False):
            assert host_syncs(lambda prior=prior, z=z: prior().expand(torch.Size([5])).log_prob(z)) == []  # type: ignore[misc]
            assert prior().log_prob(z).dtype == prior.scaled(1.0).sample((2,)).dtype == torch.float32
    with pyro.validation_enabled(False):
        prior, z = fitted("full"), torch.randn(5, 3)
        q = dist.Normal(z, torch.ones_like(z)).to_event(1)
        assert host_syncs(lambda: kl_divergence(q, prior().expand(torch.Size([5])))) == []


def test_mixtures_carry_their_kl() -> None:
    prior = fitted("gmm", kl="variational")()
    assert isinstance(prior, CodeMixture)
    assert prior.kl_mode == "variational"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_dim": 0}, "z_dim must be positive, got 0"),
        ({"components": 0}, "components must be positive, got 0"),
        ({"variant": "flow"}, "variant must be one of diag, full, .*, got 'flow'"),
        ({"variant": "gmm", "covariance": "tied"}, "covariance must be 'diag' or 'full', got 'tied'"),
        ({"covariance": "full"}, "covariance='full' is for variant 'gmm' alone, got 'diag'"),
        ({"variant": "gmm", "kl": "exact"}, "kl must be one of mc, .*, got 'exact'"),
        ({"kl": "convex"}, "kl must be 'mc' unless variant is one of gmm, kde, paired, got 'convex'"),
        ({"bandwidth": 0.5}, "bandwidth must be None unless variant is 'kde' or 'paired', got 0.5"),
        ({"variant": "kde", "bandwidth": -1.0}, "bandwidth must be None, 'loo' or a positive number, got -1"),
        ({"variant": "kde", "bandwidth": "silverman"}, "a positive number, got 'silverman'"),
        ({"variant": "kde", "bandwidth": 1.5}, "bandwidth must be below 1, .* got 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodePrior(**{"z_dim": 2, **arguments})


def test_bad_calls() -> None:
    prior = fitted("diag")
    with pytest.raises(ValueError, match="CodePrior is unconditional: y must be None"):
        prior(torch.zeros(3))
    with pytest.raises(ValueError, match="code must be None unless variant is 'paired'"):
        prior(code=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"code must have shape \(B, 3\), got \(2, 4\)"):
        fitted("paired")(code=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="stats must have z_dim 3, got 2"):
        prior.fit_(CodeStats(2))
    with pytest.raises(ValueError, match="components must be at most the number of codes, 5, got 10"):
        CodePrior(3, "gmm").fit_(statistics(codes(5)))
    thin = CodeStats(3)
    thin.update(codes())
    with pytest.raises(ValueError, match="cov needs statistics gathered with covariance='full'"):
        CodePrior(3, "full").fit_(thin)
