"""Negative binomial against SciPy, up to the Poisson limit."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from pvae.distributions import NegativeBinomial
from tests.distributions.tracing import assert_traceable

COUNTS = [0.0, 1.0, 7.0, 60.0, 1000.0]


def scipy_log_prob(r: float, logit: float, x: np.ndarray) -> np.ndarray:
    return stats.nbinom.logpmf(x, r, 1 / (1 + np.exp(logit)))


@pytest.mark.parametrize("r", [1e-3, 0.7, 10.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_equals_scipy(r: float, dtype: torch.dtype) -> None:
    x = torch.tensor(COUNTS, dtype=dtype)
    total_count = torch.tensor(r, dtype=dtype)
    logits = torch.log(20.0 / total_count)
    expected = scipy_log_prob(total_count.item(), logits.item(), x.numpy())
    log_prob = NegativeBinomial(total_count, logits=logits).log_prob(x)
    assert log_prob.dtype == dtype
    tolerance = {torch.float32: 3e-7, torch.float64: 2e-9}[dtype]
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=tolerance, atol=1e-6)


def test_poisson_limit() -> None:
    x = torch.tensor([0.0, 3.0, 20.0, 50.0])
    r = torch.tensor(1e7)
    log_prob = NegativeBinomial(r, logits=torch.log(20.0 / r)).log_prob(x)
    np.testing.assert_allclose(log_prob.numpy(), stats.poisson.logpmf(x.numpy(), 20.0), atol=1e-4)


def test_masses_sum_to_one_and_give_the_mean() -> None:
    d = NegativeBinomial(torch.tensor(2.5).double(), logits=torch.tensor(1.2).double())
    x = torch.arange(3000, dtype=torch.float64)
    masses = d.log_prob(x).exp()
    assert masses.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (masses * x).sum().item() == pytest.approx(d.mean.item(), rel=1e-11)


def test_samples_follow_the_masses() -> None:
    d = NegativeBinomial(torch.tensor(2.5), logits=torch.tensor(0.4))
    x = d.sample(torch.Size([20000])).long().numpy()
    expected = 20000 * d.log_prob(torch.arange(15.0)).exp().double().numpy()
    observed = np.bincount(x, minlength=15)[:15]
    assert (
        stats.chisquare(
            np.append(observed, 20000 - observed.sum()), np.append(expected, 20000 - expected.sum())
        ).pvalue
        > 1e-3
    )


def test_shapes_and_expand() -> None:
    d = NegativeBinomial(torch.tensor(2.0), logits=torch.randn(3))
    wide = d.expand(torch.Size([2, 3]))
    assert isinstance(wide, NegativeBinomial)
    x = wide.sample(torch.Size([4]))
    assert x.shape == (4, 2, 3)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x))


def test_gradients() -> None:
    r = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.0, 2.0, 30.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r, t: NegativeBinomial(r, logits=t).log_prob(x), (r, logits))


def test_devices_without_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.distributions.negative_binomial.has_float64", lambda _: False)
    x = torch.tensor(COUNTS[:3])
    log_prob = NegativeBinomial(torch.tensor(3.0), logits=torch.tensor(0.5)).log_prob(x)
    np.testing.assert_allclose(log_prob.numpy(), scipy_log_prob(3.0, 0.5, x.numpy()), atol=1e-5)


def test_traceable() -> None:
    inputs = [
        (torch.rand(4, 3) + 0.5, torch.randn(4, 3), torch.poisson(torch.full((4, 3), 4.0))) for _ in range(2)
    ]
    for tensor in inputs[0][:2]:
        tensor.requires_grad_()
    assert_traceable(lambda r, t, x: NegativeBinomial(r, logits=t).to_event(1).log_prob(x), *inputs)


def test_deepcopy_and_validation() -> None:
    d = NegativeBinomial(torch.tensor(2.0), logits=torch.tensor(0.3), validate_args=True)
    assert copy.deepcopy(d).log_prob(torch.tensor(3.0)) == d.log_prob(torch.tensor(3.0))
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor(0.5))
