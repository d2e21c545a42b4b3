"""Tensor maths against SciPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import fft, special, stats

from pvae.ops import (
    dct_matrix,
    gram_tril,
    has_float64,
    inverse_tril,
    jacobian_columns,
    jacobian_rows,
    log_mean_exp,
    pull_back,
    push_forward,
    sample_categorical,
    soft_clamp,
)
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


class TestJacobians:
    """Products and full Jacobians against autograd's, which go by another road."""

    def f(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``(*batch, 2, 3)`` to ``(*batch, 4)``, datum by datum."""
        weight = torch.linspace(-1, 1, 24, dtype=x.dtype).reshape(6, 4)
        return (x.flatten(-2) @ weight).sin() + x.square().sum((-2, -1)).unsqueeze(-1)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.autograd.functional.jacobian(self.f, row) for row in x])

    @pytest.mark.parametrize("n", [1, 3])
    def test_push_forward(self, n: int) -> None:
        x, v = torch.randn(5, 2, 3).double(), torch.randn(n, 5, 2, 3).double()
        value, images = push_forward(self.f, x, v)
        torch.testing.assert_close(value, self.f(x))
        wanted = torch.einsum("bkij,nbij->nbk", self.rows(x), v)
        torch.testing.assert_close(images, wanted, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("n", [1, 3])
    def test_pull_back(self, n: int) -> None:
        x, w = torch.randn(5, 2, 3).double(), torch.randn(n, 5, 4).double()
        value, products = pull_back(self.f, x, w)
        torch.testing.assert_close(value, self.f(x))
        wanted = torch.einsum("bkij,nbk->nbij", self.rows(x), w)
        torch.testing.assert_close(products, wanted, rtol=1e-10, atol=1e-12)

    def test_full_jacobians_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(5, 2, 3).double()
        for most in (2048, 10, 1):
            monkeypatch.setattr("pvae.ops._PASS_ROWS", most)
            value, rows = jacobian_rows(self.f, x, 4)
            torch.testing.assert_close(value, self.f(x))
            torch.testing.assert_close(rows, self.rows(x), rtol=1e-10, atol=1e-12)
            value, columns = jacobian_columns(lambda z: self.f(z.unflatten(-1, (2, 3))), x.flatten(1))
            torch.testing.assert_close(value, self.f(x))
            torch.testing.assert_close(columns, self.rows(x).flatten(2), rtol=1e-10, atol=1e-12)

    def test_gradients_reach_what_the_function_closes_over(self) -> None:
        a = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
        x = torch.randn(4, 2).double()
        # d/dx tanh(a x) = a (1 - tanh^2(a x)), and its derivative with respect to a.
        t = torch.tanh(a.detach() * x)
        wanted = ((1 - t.square()) * (1 - 2 * a.detach() * x * t)).sum(0)
        for diagonal in (
            push_forward(lambda x: torch.tanh(a * x), x, torch.ones(1, 4, 2).double())[1][0],
            jacobian_rows(lambda x: torch.tanh(a * x), x, 2)[1].diagonal(dim1=-2, dim2=-1),
            jacobian_columns(lambda x: torch.tanh(a * x), x)[1].diagonal(dim1=-2, dim2=-1),
        ):
            (gradient,) = torch.autograd.grad(diagonal.sum(), a)
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)

    def test_probes_of_a_map_encoder_give_the_gradient_of_the_hessians_log_determinant(self) -> None:
        # tr(J dG) = d 1/2 log det(I + G^T G / s^2) for J = (I + G^T G / s^2)^-1 G^T / s^2.
        g = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        precision = torch.eye(3).double() + g.T @ g / 0.09
        (wanted,) = torch.autograd.grad(0.5 * torch.logdet(precision), g, retain_graph=True)
        j = torch.linalg.solve(precision, g.T).detach() / 0.09
        u = torch.eye(3).double().unsqueeze(1)
        _, images = push_forward(lambda z: z @ g.T, torch.zeros(1, 3).double(), u)
        _, held = pull_back(lambda x: x @ j.T, torch.zeros(1, 6).double(), u)
        (ours,) = torch.autograd.grad((held * images).sum(), g)
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


class TestTriangles:
    def test_gram_tril(self) -> None:
        a = torch.randn(5, 3, 7, dtype=torch.float64)
        factor = gram_tril(a)
        torch.testing.assert_close(factor, torch.linalg.cholesky(a @ a.mT), rtol=1e-9, atol=1e-12)
        a.requires_grad_()
        assert torch.autograd.gradcheck(gram_tril, a)

    def test_gram_tril_keeps_digits_that_the_product_loses(self) -> None:
        a = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-5]])
        assert gram_tril(a)[1, 1].item() == pytest.approx(1e-5, rel=0.05)

    def test_inverse_tril(self) -> None:
        a = torch.randn(5, 3, 7, dtype=torch.float64)
        h = a @ a.mT
        wanted = torch.linalg.cholesky(torch.linalg.inv(h))
        torch.testing.assert_close(inverse_tril(h), wanted, rtol=1e-8, atol=1e-10)
        assert torch.autograd.gradcheck(lambda t: inverse_tril(t + t.mT), (h / 2).requires_grad_())

    def test_what_is_not_positive_definite_has_no_inverse_factor(self) -> None:
        h = torch.stack([torch.eye(2), -torch.eye(2)])
        factor = inverse_tril(h)
        assert torch.equal(factor[0], torch.eye(2))
        assert factor[1].tril().isnan().any()

    def test_no_host_synchronisation(self) -> None:
        assert host_syncs(lambda: (gram_tril(torch.eye(3)), inverse_tril(torch.eye(3)))) == []


class TestDCTMatrix:
    @pytest.mark.parametrize("n", [1, 2, 5, 8, 28, 32, 86])
    def test_orthonormal(self, n: int) -> None:
        matrix = dct_matrix(n, torch.float64)
        identity = torch.eye(n, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.mT, identity, rtol=0, atol=3e-15)

    @pytest.mark.parametrize("n", [1, 2, 5, 8, 28, 32, 86])
    def test_equals_scipy(self, n: int) -> None:
        expected = fft.dct(np.eye(n), axis=0, norm="ortho")
        np.testing.assert_allclose(dct_matrix(n, torch.float64).numpy(), expected, rtol=0, atol=2e-15)

    def test_images_equal_scipy(self) -> None:
        x = torch.randn(3, 28, 20, dtype=torch.float64)
        ours = dct_matrix(28, x.dtype) @ x @ dct_matrix(20, x.dtype).mT
        expected = fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-14)
        energy = x.square().sum((-2, -1))
        torch.testing.assert_close(ours.square().sum((-2, -1)), energy, rtol=1e-14, atol=0)

    def test_ones(self) -> None:
        matrix = dct_matrix(28, torch.float64)
        coefficients = matrix @ torch.ones(28, 28, dtype=torch.float64) @ matrix.mT
        expected = torch.zeros(28, 28, dtype=torch.float64)
        expected[0, 0] = 28.0
        torch.testing.assert_close(coefficients, expected, rtol=0, atol=2e-14)

    def test_type(self) -> None:
        assert dct_matrix(3).dtype == torch.get_default_dtype()
        assert torch.equal(dct_matrix(7, torch.float32), dct_matrix(7, torch.float64).float())

    def test_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="n must be positive, got 0"):
            dct_matrix(0)
