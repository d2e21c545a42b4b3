"""Similarities of codes: invariances, NumPy's and scikit-learn's own, and unrelated codes."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from pvae.evaluation import linear_cka, linear_r2, pearson


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotated_codes_are_one_representation() -> None:
    a = normal(100, 5) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    rotation = torch.linalg.qr(normal(5, 5, seed=1)).Q
    assert linear_cka(a, 7 * a @ rotation + 3) == pytest.approx(1, abs=1e-12)
    assert linear_r2(a, 7 * a @ rotation + 3) == pytest.approx(1, abs=1e-12)
    # Any invertible map keeps the fit; only rotations keep the alignment of kernels.
    squeezed = a @ normal(5, 5, seed=2)
    assert linear_r2(a, squeezed) == pytest.approx(1, abs=1e-12)
    assert linear_cka(a, squeezed) < 0.99
    torch.testing.assert_close(pearson(a, -2 * a + 1), -torch.ones(5, dtype=torch.float64))
    assert pearson(a, 7 * a @ rotation).abs().max() < 1


def test_they_equal_numpy_and_scikit_learn() -> None:
    a, b = normal(60, 4), normal(60, 3, seed=1)
    b = b + a[:, :3] * 0.5
    expected = [np.corrcoef(a[:, j].numpy(), b[:, j].numpy())[0, 1] for j in range(3)]
    np.testing.assert_allclose(pearson(a[:, :3], b).numpy(), expected, rtol=1e-12)
    plain = [
        LinearRegression().fit(a.numpy(), b[:, j].numpy()).score(a.numpy(), b[:, j].numpy()) for j in range(3)
    ]
    adjusted = 1 - (1 - np.mean(plain)) * 59 / (60 - 4 - 1)
    assert linear_r2(a, b) == pytest.approx(adjusted, rel=1e-10)
    # The dual form of Kornblith et al.: inner products of centred Gram matrices.
    centre = np.eye(60) - 1 / 60
    first, second = (centre @ (z @ z.T).numpy() @ centre for z in (a, b))
    dual = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    assert linear_cka(a, b) == pytest.approx(dual, rel=1e-10)


def test_unrelated_codes_have_no_fit_on_average() -> None:
    values = torch.tensor(
        [linear_r2(normal(40, 10, seed=2 * i), normal(40, 3, seed=2 * i + 1)) for i in range(200)]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200)


def test_constant_codes_are_no_error() -> None:
    a, still = normal(30, 2), torch.full((30, 2), 0.1, dtype=torch.float64)
    assert pearson(a, still).tolist() == [0, 0]
    assert linear_cka(a, still) == 0
    assert math.isnan(linear_r2(a, still))
    half = torch.stack([still[:, 0], a[:, 1]], -1)
    assert linear_r2(half, a[:, 1:]) == pytest.approx(1, abs=1e-12)


def test_bad_codes_are_named() -> None:
    with pytest.raises(ValueError, match="the same width, got 2 and 3"):
        pearson(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"shapes \(N, d\) and \(N, e\), got \(5, 2\) and \(4, 2\)"):
        linear_cka(torch.zeros(5, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="a must have more than 5 rows, got 5"):
        linear_r2(torch.zeros(5, 4), torch.zeros(5, 4))
