"""Tensor maths against SciPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from pvae.ops import has_float64, log_mean_exp, sample_categorical, soft_clamp
from tests.distributions.tracing import assert_traceable, host_syncs


class TestLogMeanExp:
    @pytest.mark.parametrize("dim", [0, -1, 1, (0, 2)])
    def test_equals_scipy(self, dim: int | tuple[int, ...]) -> None:
        x = 5 * torch.randn(4, 3, 6, dtype=torch.float64)
        count = np.prod([x.shape[d] for d in np.atleast_1d(dim)])
        expected = special.logsumexp(x.numpy(), axis=dim) - np.log(count)
        np.testing.assert_allclose(log_mean_exp(x, dim).numpy(), expected, rtol=0, atol=1e-13)

    def test_weights_too_large_or_small_for_their_exponentials(self) -> None:
        x = torch.tensor([[-9000.0, -9000.0], [9000.0, 9000.0 + math.log(3.0)]], dtype=torch.float64)
        expected = torch.tensor([-9000.0, 9000.0 + math.log(2.0)], dtype=torch.float64)
        torch.testing.assert_close(log_mean_exp(x), expected, rtol=0, atol=1e-11)

    def test_zero_weights(self) -> None:
        x = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]])
        torch.testing.assert_close(log_mean_exp(x), torch.tensor([-math.inf, -math.log(2.0)]))

    def test_one_entry_is_itself(self) -> None:
        x = torch.randn(5, 1)
        assert torch.equal(log_mean_exp(x), x[:, 0])

    def test_keepdim(self) -> None:
        assert log_mean_exp(torch.zeros(4, 3), 0, keepdim=True).shape == (1, 3)

    def test_gradient_is_the_normalised_weight(self) -> None:
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(log_mean_exp(x).sum(), x)
        np.testing.assert_allclose(gradient.numpy(), special.softmax(x.detach().numpy(), -1), atol=1e-14)

    def test_nothing_to_average_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"x must have at least one entry along dim 0, got shape \(0, 3\)"
        ):
            log_mean_exp(torch.zeros(0, 3), 0)


class TestSoftClamp:
    def test_identity_inside(self) -> None:
        x = torch.linspace(-4, 4, 50, dtype=torch.float64)
        distance = 6.0
        error = (soft_clamp(x, -10.0, 10.0) - x).abs().max().item()
        assert 0 < error < 1.1 * math.exp(-distance)

    def test_range_and_order(self) -> None:
        x = torch.linspace(-30, 30, 301, dtype=torch.float64)
        y = soft_clamp(x, -7.0, 3.0)
        assert (y.diff() > 0).all()
        assert -7.0 - math.log1p(math.exp(-10.0)) <= y.min() < -6.99
        assert 2.99 < y.max() <= 3.0

    def test_no_gradient_is_lost_beyond_the_ends(self) -> None:
        x = torch.tensor([-15.0, 15.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(soft_clamp(x, -7.0, 7.0).sum(), x)
        assert (gradient > 1e-4).all()

    def test_gradcheck(self) -> None:
        x = torch.linspace(-12, 12, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: soft_clamp(t, -7.0, 3.0), x, check_forward_ad=True)

    def test_traceable(self) -> None:
        x = torch.randn(5, requires_grad=True)
        assert_traceable(lambda t: soft_clamp(t, -1.0, 2.0), (x,), (torch.randn(5),))


class TestSampleCategorical:
    def test_follows_the_probabilities(self) -> None:
        logits = torch.tensor([0.3, -1.0, 1.2, -3.0], dtype=torch.float64)
        count = np.bincount(sample_categorical(logits, (20000,)).numpy(), minlength=4)
        assert stats.chisquare(count, 20000 * special.softmax(logits.numpy())).pvalue > 1e-3

    def test_impossible_categories_are_never_drawn(self) -> None:
        drawn = sample_categorical(torch.tensor([-math.inf, 0.0, -math.inf]), (1000,))
        assert torch.equal(drawn, torch.ones(1000, dtype=torch.int64))

    @pytest.mark.parametrize("dim", [1, -3])
    def test_any_dimension(self, dim: int) -> None:
        # All mass of (b, :, i, j) on the category (b + i + j) mod 3.
        category = (torch.arange(2)[:, None, None] + torch.arange(4)[:, None] + torch.arange(5)) % 3
        logits = torch.full((2, 3, 4, 5), -1e4).scatter(1, category.unsqueeze(1), 0.0)
        drawn = sample_categorical(logits, (7,), dim=dim)
        assert torch.equal(drawn, category.expand(7, 2, 4, 5))

    def test_no_host_synchronisation(self) -> None:
        assert host_syncs(lambda: sample_categorical(torch.zeros(4, 3), (5,))) == []

    def test_logits_with_gradient(self) -> None:
        assert not sample_categorical(torch.zeros(3, requires_grad=True)).requires_grad


def test_double_precision_by_device() -> None:
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))
    assert not has_float64(torch.device("mps"))
