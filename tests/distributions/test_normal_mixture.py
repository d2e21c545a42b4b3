"""Mixture of normals against SciPy, in double precision and in the hard cases of single precision."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from pvae.distributions import NormalMixture
from pvae.distributions.normal_mixture import _exponents, _exponents_in_blocks
from tests.distributions.tracing import assert_traceable, host_syncs


def parameters(
    components: int, z_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, locations within 5 of zero, scales from 0.02 to 1."""
    loc = 10 * torch.rand(components, z_dim, dtype=dtype) - 5
    scale = torch.empty(components, z_dim, dtype=dtype).uniform_(math.log(0.02), 0.0).exp()
    return torch.randn(components, dtype=dtype), loc, scale


def oracle(z: Tensor, logits: Tensor, loc: Tensor, scale: Tensor) -> np.ndarray:
    """Log-density in double precision by SciPy."""
    z_, logits_, loc_, scale_ = (t.detach().double().numpy() for t in (z, logits, loc, scale))
    terms = stats.norm.logpdf(z_[..., None, :], loc_, scale_).sum(-1) + special.log_softmax(logits_)
    return special.logsumexp(terms, axis=-1)


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (0,)])
def test_log_prob_equals_scipy(shape: tuple[int, ...]) -> None:
    parts = parameters(7, 3)
    z = 3 * torch.randn(*shape, 3, dtype=torch.float64)
    # PyTorch's check of the support fails on a batch of none.
    log_prob = NormalMixture(*parts, validate_args=None if z.numel() else False).log_prob(z)
    assert log_prob.shape == shape
    np.testing.assert_allclose(log_prob.numpy(), oracle(z, *parts), rtol=1e-12, atol=1e-9)


def test_one_component_is_a_normal() -> None:
    loc, scale = torch.randn(1, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64) + 0.1
    z = torch.randn(5, 4, dtype=torch.float64)
    expected = dist.Normal(loc[0], scale[0]).to_event(1).log_prob(z)
    torch.testing.assert_close(NormalMixture(torch.zeros(1).double(), loc, scale).log_prob(z), expected)


@pytest.mark.parametrize("exponents", [_exponents, _exponents_in_blocks])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_single_precision_is_within_a_ten_thousandth_of_a_nat(
    exponents: Callable[..., Tensor], offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pvae.distributions.normal_mixture._exponents", exponents)
    logits, loc, scale = parameters(500, 40, torch.float32)
    loc = loc + offset
    mixture = NormalMixture(logits, loc, scale)
    z = mixture.sample(torch.Size([300]))
    error = np.abs(mixture.log_prob(z).double().numpy() - oracle(z, logits, loc, scale))
    assert error.max() < 1e-4
    # Far from every component log-densities reach 1e5 nats, of which single precision resolves 1e-2.
    z = offset + 10 * torch.rand(300, 40) - 5
    expected = oracle(z, logits, loc, scale)
    assert (np.abs(mixture.log_prob(z).double().numpy() / expected - 1)).max() < 1e-6


def test_both_forms_agree_beyond_one_block() -> None:
    _, loc, scale = parameters(5, 3)
    z = torch.randn(300, 3, dtype=torch.float64)
    torch.testing.assert_close(
        _exponents(z, loc, scale), _exponents_in_blocks(z, loc, scale), rtol=1e-11, atol=1e-9
    )


def test_devices_without_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.distributions.normal_mixture.has_float64", lambda _: False)
    monkeypatch.setattr("pvae.distributions.normal_mixture._exponents", None)
    parts = parameters(5, 3)
    z = torch.randn(2, 150, 3, dtype=torch.float64)
    np.testing.assert_allclose(NormalMixture(*parts).log_prob(z).numpy(), oracle(z, *parts), atol=1e-9)


def test_integrates_to_one() -> None:
    logits, loc, scale = parameters(6, 1)
    grid = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = NormalMixture(logits, loc, scale).log_prob(grid.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-10)


def test_samples_follow_the_density() -> None:
    logits, loc, scale = parameters(4, 2)
    z = NormalMixture(logits, loc, scale).sample(torch.Size([4000])).numpy()
    weights = special.softmax(logits.numpy())
    for d in range(2):

        def cdf(t: np.ndarray, d: int = d) -> np.ndarray:
            return stats.norm.cdf(t[:, None], loc[:, d].numpy(), scale[:, d].numpy()) @ weights

        assert stats.kstest(z[:, d], cdf).pvalue > 1e-3
    # The coordinates are dependent through the component.
    nearest = np.abs((z[:, None] - loc.numpy()) / scale.numpy()).sum(-1).argmin(-1)
    expected = NormalMixture(logits, loc, scale)
    assert stats.chisquare(np.bincount(nearest, minlength=4), 4000 * weights).pvalue > 1e-3
    np.testing.assert_allclose(expected.mean.numpy(), z.mean(0), atol=5 * z.std(0).max() / math.sqrt(4000))
    np.testing.assert_allclose(expected.variance.numpy(), z.var(0), rtol=0.15)


def test_moments() -> None:
    logits, loc, scale = parameters(4, 1)
    mixture = NormalMixture(logits, loc, scale)
    grid = torch.linspace(-14, 14, 400001, dtype=torch.float64)
    density = mixture.log_prob(grid.unsqueeze(-1)).exp()
    mean = torch.trapezoid(density * grid, grid)
    variance = torch.trapezoid(density * (grid - mean).square(), grid)
    torch.testing.assert_close(mixture.mean, mean.reshape(1), rtol=0, atol=1e-8)
    torch.testing.assert_close(mixture.variance, variance.reshape(1), rtol=0, atol=1e-8)


def test_shapes() -> None:
    mixture = NormalMixture(*parameters(4, 3))
    assert (mixture.batch_shape, mixture.event_shape) == ((), (3,))
    wide = mixture.expand(torch.Size([5, 2]))
    assert isinstance(wide, NormalMixture)
    assert (wide.batch_shape, wide.event_shape) == ((5, 2), (3,))
    assert wide.sample().shape == wide.mean.shape == wide.variance.shape == (5, 2, 3)
    assert wide.sample(torch.Size([7])).shape == (7, 5, 2, 3)
    z = torch.randn(7, 5, 2, 3, dtype=torch.float64)
    assert torch.equal(wide.log_prob(z), mixture.log_prob(z))
    assert wide.log_prob(z[0, 0, 0]).shape == (5, 2)
    assert not mixture.has_rsample


def test_gradients() -> None:
    parts = [t.requires_grad_() for t in parameters(3, 2)]
    z = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *p: NormalMixture(*p).log_prob(z), (z, *parts))


def test_gradients_of_both_forms_agree() -> None:
    parts = [t.requires_grad_() for t in parameters(6, 3)[1:]]
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    pairs = (torch.autograd.grad(f(z, *parts).sum(), (z, *parts)) for f in (_exponents, _exponents_in_blocks))
    for ours, other in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    parts = parameters(3, 2, dtype)
    mixture = NormalMixture(*(t.requires_grad_() for t in parts))  # type: ignore[arg-type]
    log_prob = mixture.log_prob(mixture.sample(torch.Size([4])))
    assert log_prob.dtype == dtype
    assert all(g.dtype == dtype for g in torch.autograd.grad(log_prob.sum(), parts))


@pytest.mark.parametrize("blocks", [False, True])
def test_traceable(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr("pvae.distributions.normal_mixture.has_float64", lambda _: False)
    inputs = [(torch.randn(5, 2), *parameters(3, 2, torch.float32)) for _ in range(2)]
    for tensor in inputs[0]:
        tensor.requires_grad_()
    assert_traceable(lambda z, *p: NormalMixture(*p).expand(torch.Size([5])).log_prob(z), *inputs)
    with pyro.validation_enabled(False):
        mixture = NormalMixture(*inputs[0][1:])
        assert host_syncs(lambda: mixture.sample(torch.Size([3]))) == []


def test_as_a_site_in_a_plate() -> None:
    mixture = NormalMixture(*parameters(3, 2))

    def model() -> Tensor:
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("z", mixture)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (4, 5, 2)
    assert trace.nodes["z"]["log_prob"].shape == (4, 5)


def test_deepcopy() -> None:
    mixture = NormalMixture(*parameters(3, 2))
    z = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(mixture).log_prob(z), mixture.log_prob(z))


def test_validation() -> None:
    logits, loc, scale = parameters(3, 2)
    with pyro.validation_enabled(True):
        with pytest.raises(ValueError, match="scale"):
            NormalMixture(logits, loc, -scale)
        with pytest.raises(ValueError, match="support"):
            NormalMixture(logits, loc, scale).log_prob(torch.full((2,), math.nan, dtype=torch.float64))


@pytest.mark.parametrize("shapes", [((2,), (3, 2), (3, 2)), ((3, 1), (3, 2), (3, 2)), ((3,), (3, 2), (3, 1))])
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"logits, loc and scale must have shapes \(K,\), \(K, z_dim\)"):
        NormalMixture(*map(torch.ones, shapes))  # type: ignore[arg-type]
