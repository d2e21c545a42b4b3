"""Code mixture against SciPy, its KL bounds against each other, Monte Carlo and the formulas written out."""

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.distributions import CodeMixture, KLMode
from pvae.inference import ELBO
from tests.distributions.tracing import assert_traceable, host_syncs

CLOSED: tuple[KLMode, ...] = ("variational", "nearest", "convex")


def parameters(
    components: int, z_dim: int, spread: float = 2.0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Logits, means ``spread`` wide, scales from 0.3 to 1.3."""
    return {
        "logits": torch.randn(components, dtype=dtype),
        "loc": spread * torch.randn(components, z_dim, dtype=dtype),
        "scale": 0.3 + torch.rand(components, z_dim, dtype=dtype),
    }


def full(parts: dict[str, Any]) -> dict[str, Any]:
    """The same with correlations inside the components."""
    parts = dict(parts)
    scale = parts.pop("scale")
    lower = 0.4 * torch.randn(*scale.shape, scale.shape[-1], dtype=scale.dtype).tril(-1)
    return {**parts, "scale_tril": lower + torch.diag_embed(scale)}


def covariances(parts: dict[str, Any]) -> np.ndarray:
    if "scale" in parts:
        return torch.diag_embed(parts["scale"].square()).numpy()
    tril: Tensor = parts["scale_tril"]
    return (tril @ tril.mT).numpy()


def oracle(z: Tensor, parts: dict[str, Any]) -> np.ndarray:
    """Log-density by SciPy, component by component."""
    log_weights = special.log_softmax(parts["logits"].numpy())
    terms = [
        w + stats.multivariate_normal(m, c).logpdf(z.numpy())
        for w, m, c in zip(log_weights, parts["loc"].numpy(), covariances(parts), strict=True)
    ]
    return special.logsumexp(terms, axis=0)


def posterior(batch: int, z_dim: int) -> dist.TorchDistribution:
    loc = torch.randn(batch, z_dim, dtype=torch.float64)
    return dist.Normal(loc, 0.2 + torch.rand(batch, z_dim, dtype=torch.float64)).to_event(1)


def kl_to_normal(q: Any, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """KL from each row of a diagonal normal to one normal, by inverse and determinant."""
    loc, scale = q.base_dist.loc.numpy(), q.base_dist.scale.numpy()
    precision = np.linalg.inv(covariance)
    gap = loc - mean
    quadratic = np.einsum("bi,ij,bj->b", gap, precision, gap)
    log_det = np.linalg.slogdet(covariance)[1] - 2 * np.log(scale).sum(-1)
    return 0.5 * ((scale**2 * precision.diagonal()).sum(-1) + quadratic - loc.shape[-1] + log_det)


def monte_carlo_kl(q: Any, p: CodeMixture, num_samples: int = 40_000) -> tuple[Tensor, Tensor]:
    """KL by draws from q, and its standard error, each ``(B,)``."""
    z = q.sample((num_samples,))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    return log_ratio.mean(0), log_ratio.std(0) / math.sqrt(num_samples)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_log_prob_is_the_mixture_by_hand(make: Any, shape: tuple[int, ...]) -> None:
    parts = make(parameters(7, 3))
    z = 3 * torch.randn(*shape, 3, dtype=torch.float64)
    log_prob = CodeMixture(**parts).log_prob(z)
    assert log_prob.shape == shape
    np.testing.assert_allclose(log_prob.numpy(), oracle(z, parts), rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_integrates_to_one_on_a_grid(make: Any) -> None:
    axis = torch.linspace(-14, 14, 701, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = CodeMixture(**make(parameters(5, 2))).log_prob(grid).exp()
    assert (density.sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_blocks_change_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make(parameters(5, 3))
    z, q = torch.randn(4, 9, 3, dtype=torch.float64), posterior(11, 3)
    whole = [CodeMixture(**parts).log_prob(z), CodeMixture(**parts).responsibilities(z)]
    whole += [kl_divergence(q, CodeMixture(**parts, kl_mode=mode)) for mode in CLOSED]
    draws = CodeMixture(**parts)
    torch.manual_seed(3)
    sample = draws.sample(torch.Size([20]))
    monkeypatch.setattr("pvae.distributions.code_mixture._BUDGET", 31)  # at most 6 rows of five components
    parted = [CodeMixture(**parts).log_prob(z), CodeMixture(**parts).responsibilities(z)]
    parted += [kl_divergence(q, CodeMixture(**parts, kl_mode=mode)) for mode in CLOSED]
    for a, b in zip(whole, parted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.manual_seed(3)
    torch.testing.assert_close(draws.sample(torch.Size([20])), sample, rtol=1e-12, atol=1e-12)


class _LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that any operator made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_ten_thousand_components_stay_within_memory() -> None:
    mixture = CodeMixture(**parameters(10_000, 4, dtype=torch.float32))
    with torch.no_grad(), _LargestTensor() as memory:
        z = mixture.sample(torch.Size([4096]))
        assert mixture.log_prob(z).isfinite().all()
    # The whole table of log-densities in double precision would be 328 MB.
    assert memory.largest < 40e6


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_single_precision(make: Any) -> None:
    parts = make(parameters(50, 8, spread=5.0))
    z = CodeMixture(**parts).sample(torch.Size([200]))
    single = CodeMixture(**{k: v.float() for k, v in parts.items()})
    log_prob = single.log_prob(z.float())
    assert log_prob.dtype == torch.float32
    np.testing.assert_allclose(log_prob.double().numpy(), oracle(z, parts), atol=1e-3)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_devices_without_double_precision(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.distributions.code_mixture.has_float64", lambda _: False)
    monkeypatch.setattr("pvae.distributions.code_mixture._exponents", None)
    parts = make(parameters(5, 3))
    mixture = CodeMixture(**parts)
    z = mixture.sample(torch.Size([30]))
    np.testing.assert_allclose(mixture.log_prob(z).numpy(), oracle(z, parts), atol=1e-9)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_responsibilities_are_bayes_rule(make: Any) -> None:
    parts = make(parameters(4, 2))
    z = torch.randn(6, 2, dtype=torch.float64)
    weights = special.softmax(parts["logits"].numpy())
    joint = np.stack(
        [
            w * stats.multivariate_normal(m, c).pdf(z.numpy())
            for w, m, c in zip(weights, parts["loc"].numpy(), covariances(parts), strict=True)
        ],
        -1,
    )
    wanted = joint / joint.sum(-1, keepdims=True)
    np.testing.assert_allclose(CodeMixture(**parts).responsibilities(z).numpy(), wanted, atol=1e-12)


def test_expand_keeps_the_class_and_all_of_it() -> None:
    mixture = CodeMixture(**full(parameters(4, 3)), kl_mode="subset", num_subset=7)
    wide = mixture.expand(torch.Size([5, 2]))
    assert type(wide) is CodeMixture
    assert (wide.batch_shape, wide.event_shape, wide.kl_mode, wide.num_subset) == ((5, 2), (3,), "subset", 7)
    assert wide.sample(torch.Size([6])).shape == (6, 5, 2, 3)
    assert wide.mean.shape == wide.variance.shape == (5, 2, 3)
    z = torch.randn(6, 5, 2, 3, dtype=torch.float64)
    assert torch.equal(wide.log_prob(z), mixture.log_prob(z))
    assert wide.log_prob(z[0, 0, 0]).shape == (5, 2)


def test_components_without_weight_are_never_met() -> None:
    parts = parameters(4, 2)
    parts["logits"] = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf], dtype=torch.float64)
    mixture = CodeMixture(**parts)
    centre, _ = mixture.sample_parts(torch.Size([2000]))
    assert torch.equal(centre, parts["loc"][1].expand(2000, 2))
    z = torch.randn(5, 2, dtype=torch.float64)
    normal = dist.Normal(parts["loc"][1], parts["scale"][1]).to_event(1)
    torch.testing.assert_close(mixture.log_prob(z), normal.log_prob(z))
    for mode in CLOSED:
        q = posterior(3, 2)
        torch.testing.assert_close(
            kl_divergence(q, CodeMixture(**parts, kl_mode=mode)), kl_divergence(q, normal)
        )


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
@pytest.mark.parametrize("mode", CLOSED)
def test_one_component_is_the_closed_form(make: Any, mode: Any) -> None:
    parts, q = make(parameters(1, 4)), posterior(6, 4)
    wanted = kl_to_normal(q, parts["loc"][0].numpy(), covariances(parts)[0])
    np.testing.assert_allclose(
        kl_divergence(q, CodeMixture(**parts, kl_mode=mode)).numpy(), wanted, rtol=1e-10
    )


@pytest.mark.parametrize("mode", CLOSED)
def test_identical_components_are_one(mode: Any) -> None:
    parts, q = parameters(1, 3), posterior(6, 3)
    same = {k: v.expand(5, *v.shape[1:]) for k, v in parts.items()}
    one = kl_divergence(q, dist.Normal(parts["loc"][0], parts["scale"][0]).to_event(1))
    got = kl_divergence(q, CodeMixture(**same, kl_mode=mode))
    # The nearest of equal components has but its own weight.
    torch.testing.assert_close(got, one + (math.log(5) if mode == "nearest" else 0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
@pytest.mark.parametrize("spread", [0.3, 4.0], ids=["close", "separated"])
def test_bounds_are_in_order(make: Any, spread: float) -> None:
    parts, q = make(parameters(7, 5, spread)), posterior(7, 5)
    if spread == 4.0:  # each posterior at its component
        q = dist.Normal(parts["loc"] + 0.1, q.base_dist.scale).to_event(1)
    kl, error = monte_carlo_kl(q, CodeMixture(**parts))
    bounds = {mode: kl_divergence(q, CodeMixture(**parts, kl_mode=mode)) for mode in CLOSED}
    assert (kl - 4 * error <= bounds["variational"]).all()
    assert (bounds["variational"] <= bounds["nearest"] + 1e-12).all()
    assert (bounds["variational"] <= bounds["convex"] + 1e-12).all()
    if spread == 4.0:  # one component is all there is, and the convex bound is useless
        assert (bounds["variational"] - kl).abs().median() < 0.5
        assert (bounds["convex"] > 3 * kl).all()


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_each_bound_is_its_formula(make: Any) -> None:
    parts, q = make(parameters(5, 3)), posterior(6, 3)
    pairs = zip(parts["loc"].numpy(), covariances(parts), strict=True)
    kl = np.stack([kl_to_normal(q, m, c) for m, c in pairs], -1)
    log_weights = special.log_softmax(parts["logits"].numpy())
    wanted = {
        "variational": -special.logsumexp(log_weights - kl, axis=-1),
        "nearest": (kl - log_weights).min(-1),
        "convex": (np.exp(log_weights) * kl).sum(-1),
    }
    for mode, bound in wanted.items():
        got = kl_divergence(q, CodeMixture(**parts, kl_mode=mode))  # type: ignore[arg-type]
        np.testing.assert_allclose(got.numpy(), bound, rtol=1e-10)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_subset_bound_falls_to_the_divergence(make: Any) -> None:
    parts, q = make(parameters(7, 5, spread=0.7)), posterior(1, 5)
    parts["logits"] = torch.zeros(7, dtype=torch.float64)
    kl, error = monte_carlo_kl(q, CodeMixture(**parts), 100_000)
    means, errors = [], []
    for num_subset in (1, 4, 32):
        p = CodeMixture(**parts, kl_mode="subset", num_subset=num_subset)
        draws = kl_divergence(q.expand(torch.Size([30_000])), p.expand(torch.Size([30_000])))
        assert draws.shape == (30_000,)
        means.append(draws.mean())
        errors.append(draws.std() / math.sqrt(30_000))
    margin = 4 * (max(errors) + error)
    assert means[0] > means[1] + margin > means[2] + margin
    assert means[2] > kl - margin
    assert means[2] < kl + 0.2
    # One draw from the weights has the convex bound as its mean.
    convex = kl_divergence(q, CodeMixture(**parts, kl_mode="convex"))
    assert (means[0] - convex).abs() < 4 * errors[0]


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_convex_bound_is_the_divergence_from_the_geometric_mean(make: Any) -> None:
    parts, q = make(parameters(6, 4)), posterior(9, 4)
    weights = special.softmax(parts["logits"].numpy())
    precisions = np.linalg.inv(covariances(parts))
    precision = np.einsum("k,kij->ij", weights, precisions)
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.einsum("k,kij,kj->i", weights, precisions, parts["loc"].numpy())
    bound = kl_divergence(q, CodeMixture(**parts, kl_mode="convex")).numpy()
    constant = bound - kl_to_normal(q, mean, covariance)
    np.testing.assert_allclose(constant, constant[0], rtol=0, atol=1e-10)
    assert constant[0] > 0.1


def test_convex_bound_with_equal_kernels_is_one_narrow_normal() -> None:
    h, q, parts = 0.4, posterior(5, 3), parameters(6, 3)
    parts["scale"] = torch.full_like(parts["scale"], h)
    weights = parts["logits"].softmax(0)
    mean = weights @ parts["loc"]
    constant = (weights @ (parts["loc"] - mean).square()).sum() / (2 * h**2)
    wanted = kl_divergence(q, dist.Normal(mean, h).to_event(1)) + constant
    got = kl_divergence(q, CodeMixture(**parts, kl_mode="convex"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", CLOSED)
def test_divergence_vanishes_with_its_gradient_where_q_is_p(mode: Any) -> None:
    parts = parameters(1, 4)
    loc = parts["loc"][0].clone().requires_grad_()
    scale = parts["scale"][0].clone().requires_grad_()
    p = CodeMixture(**parts, kl_mode=mode)
    kl = kl_divergence(dist.Normal(loc, scale).to_event(1), p)
    kl.backward()
    assert abs(kl.item()) < 1e-10
    assert loc.grad is not None
    assert scale.grad is not None
    assert max(loc.grad.abs().max(), scale.grad.abs().max()) < 1e-10
    assert (kl_divergence(posterior(50, 4), p) > 0).all()


def test_what_has_no_closed_form_is_left_to_the_objective() -> None:
    parts, q = parameters(3, 2), posterior(4, 2)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, CodeMixture(**parts))
    laplace = dist.Laplace(torch.zeros(4, 2), torch.ones(4, 2)).to_event(1)
    matrix = dist.Normal(torch.zeros(4, 5, 2), torch.ones(4, 5, 2)).to_event(2)
    for other in (laplace, matrix):
        with pytest.raises(NotImplementedError):
            kl_divergence(other, CodeMixture(**parts, kl_mode="variational"))


class _Model(nn.Module):
    """The prior alone, with an observation that is the same whatever z is."""

    def __init__(self, prior: CodeMixture) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


class _Guide(nn.Module):
    def __init__(self, q: dist.TorchDistribution) -> None:
        super().__init__()
        self.q = q

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.q)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(("mode", "found"), [("mc", 0), ("variational", 1), ("convex", 1)])
def test_a_plate_does_not_hide_the_divergence(
    mode: Any, found: int, num_particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(q: Any, p: Any) -> Tensor:
        kl = kl_divergence(q, p)
        calls.append(type(p))
        return kl

    monkeypatch.setattr("pvae.inference.objective.kl_divergence", counted)
    parts, x, q = parameters(5, 3), torch.randn(4, 2, dtype=torch.float64), posterior(4, 3)
    model, guide = _Model(CodeMixture(**parts, kl_mode=mode)), _Guide(q)
    objective = ELBO("mean_field", num_particles=num_particles)
    losses = [objective.loss(model, guide, x) for _ in range(5)]
    assert calls == [CodeMixture] * found * 5
    assert (np.std(losses) < 1e-12) == bool(found)
    if found:
        kl = kl_divergence(q, CodeMixture(**parts, kl_mode=mode)).sum()
        constant = -dist.Normal(0.0, 1.0).log_prob(x).sum()
        assert losses[0] == pytest.approx((kl + constant).item(), abs=1e-9)


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_gradients(make: Any) -> None:
    parts = make(parameters(3, 2))
    names, leaves = list(parts), [t.requires_grad_() for t in parts.values()]
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def build(*tensors: Tensor, **options: Any) -> CodeMixture:
        return CodeMixture(**dict(zip(names, tensors, strict=True)), **options)

    with pyro.validation_enabled(False):
        assert torch.autograd.gradcheck(lambda z, *p: build(*p).log_prob(z), (z, *leaves))
        for mode in CLOSED:
            assert torch.autograd.gradcheck(
                lambda z, *p, mode=mode: kl_divergence(
                    dist.Normal(z, torch.full_like(z, 0.5)).to_event(1), build(*p, kl_mode=mode)
                ),
                (z, *leaves),
            )


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_traceable_without_host_syncs(make: Any) -> None:
    sets = [make(parameters(3, 2, dtype=torch.float32)) for _ in range(2)]
    names = list(sets[0])
    inputs = [(torch.randn(5, 2), *parts.values()) for parts in sets]
    for tensor in inputs[0]:
        tensor.requires_grad_()

    def build(tensors: tuple[Tensor, ...], **options: Any) -> CodeMixture:
        return CodeMixture(**dict(zip(names, tensors, strict=True)), **options).expand(torch.Size([5]))

    assert_traceable(lambda z, *p: build(p).log_prob(z), *inputs)
    for mode in CLOSED:
        assert_traceable(
            lambda z, *p, mode=mode: kl_divergence(
                dist.Normal(z, z.new_ones(())).to_event(1), build(p, kl_mode=mode)
            ),
            *inputs,
        )
    mixture = build(inputs[1][1:], kl_mode="subset")
    q = dist.Normal(torch.zeros(5, 2), torch.ones(5, 2)).to_event(1)
    assert host_syncs(lambda: (mixture.sample(torch.Size([3])), kl_divergence(q, mixture))) == []


@pytest.mark.parametrize("make", [dict, full], ids=["diag", "full"])
def test_samples_have_the_stated_moments_and_weights(make: Any) -> None:
    parts = make(parameters(3, 2))
    mixture = CodeMixture(**parts)
    z = mixture.sample(torch.Size([40_000]))
    standard_error = mixture.variance.sqrt() / 200
    assert ((z.mean(0) - mixture.mean).abs() < 4 * standard_error).all()
    torch.testing.assert_close(z.var(0), mixture.variance, rtol=0.05, atol=0)
    centre, deviation = mixture.sample_parts(torch.Size([40_000]))
    component = torch.cdist(centre, parts["loc"]).argmin(1)
    counts = np.bincount(component.numpy(), minlength=3)
    weights = special.softmax(parts["logits"].numpy())
    assert stats.chisquare(counts, 40_000 * weights).pvalue > 1e-3
    for k, covariance in enumerate(covariances(parts)):
        np.testing.assert_allclose(np.cov(deviation[component == k].numpy().T), covariance, atol=0.1)


def test_deepcopy_and_repr() -> None:
    mixture = CodeMixture(**parameters(3, 2))
    z = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(mixture).log_prob(z), mixture.log_prob(z))
    assert "scale_tril" not in repr(mixture)


def test_validation() -> None:
    parts = parameters(3, 2)
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="scale"):
            CodeMixture(parts["logits"], parts["loc"], -parts["scale"])
        with pytest.raises(ValueError, match="scale_tril"):
            CodeMixture(parts["logits"], parts["loc"], scale_tril=torch.ones(3, 2, 2).double())
        with pytest.raises(ValueError, match="support"):
            CodeMixture(**parts).log_prob(torch.full((2,), math.nan, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of scale and scale_tril must be given, got neither"),
        ({"scale": torch.ones(3, 2), "scale_tril": torch.ones(3, 2, 2)}, "must be given, got both"),
        ({"scale": torch.ones(3)}, r"shapes \(K,\), \(K, z_dim\) and \(K, z_dim\), got .* and \(3,\)"),
        ({"scale_tril": torch.ones(3, 2)}, r"and \(K, z_dim, z_dim\), got .* and \(3, 2\)"),
        ({"scale": torch.ones(3, 2), "kl_mode": "exact"}, "kl_mode must be one of mc, .*, got 'exact'"),
        ({"scale": torch.ones(3, 2), "num_subset": 0}, "num_subset must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeMixture(torch.zeros(3), torch.zeros(3, 2), **arguments)
