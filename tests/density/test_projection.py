"""Projections against scikit-learn, and what they promise of signs, units and encoders."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn

from pvae.density import (
    CodeProjection,
    DensityTarget,
    IdentityProjection,
    PCAProjection,
    Projection,
    RandomProjection,
)

from .truths import Floats


@pytest.fixture(scope="module")
def digits() -> Floats:
    images: Floats = load_digits().images / 16
    return images


@pytest.mark.parametrize("as_tensor", [False, True])
def test_pca_is_that_of_scikit_learn(digits: Floats, as_tensor: bool) -> None:
    train, test = digits[:1500], digits[1500:]
    other = PCA(6, svd_solver="full").fit(train.reshape(1500, -1))
    x = torch.from_numpy(train) if as_tensor else train
    fit = PCAProjection(6).fit(x)
    signs = np.sign((fit.components * other.components_.T).sum(0))
    np.testing.assert_allclose(fit.components * signs, other.components_.T, atol=1e-9)
    np.testing.assert_allclose(fit(test) * signs, other.transform(test.reshape(297, -1)), atol=1e-9)
    assert fit.explained == pytest.approx(other.explained_variance_ratio_.sum(), abs=1e-12)
    assert fit(x).dtype == np.float64
    np.testing.assert_allclose(fit(x).mean(0), 0, atol=1e-12)
    # Not whitened: a length in the plane of the components is a length of the data.
    np.testing.assert_allclose(fit.components.T @ fit.components, np.eye(6), atol=1e-12)
    assert (np.abs(fit.components).max(0) == fit.components.max(0)).all()


def test_chunks_and_data_types_change_nothing(digits: Floats) -> None:
    many = np.tile(digits, (6, 1, 1))[:9000]
    levels = torch.from_numpy(np.round(many * 16).astype(np.uint8))
    fit, scaled = PCAProjection(4).fit(levels), PCAProjection(4).fit(many)
    np.testing.assert_allclose(fit.components, scaled.components, atol=1e-10)
    np.testing.assert_allclose(fit(levels), 16 * scaled(many), atol=1e-9)
    np.testing.assert_allclose(fit(levels[5000:5010]), fit(levels)[5000:5010], atol=1e-10)


def test_random_directions_depend_on_the_seed_alone(digits: Floats) -> None:
    fit = RandomProjection(5, seed=3).fit(digits)
    np.testing.assert_array_equal(
        RandomProjection(5, seed=3).fit(2 * digits[:9] + 1).components, fit.components
    )
    assert (RandomProjection(5, seed=4).fit(digits).components != fit.components).any()
    np.testing.assert_allclose(fit.components.T @ fit.components, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(fit(digits), digits.reshape(-1, 64) @ fit.components, atol=1e-12)


def test_identity_flattens(digits: Floats) -> None:
    fit = IdentityProjection().fit(digits)
    np.testing.assert_array_equal(fit(digits), digits.reshape(-1, 64))
    np.testing.assert_array_equal(fit(torch.from_numpy(digits[:3]).float()), digits[:3].reshape(3, 64))


class _Encoder(nn.Module):
    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        loc = self.net(x)
        return (loc, loc.exp()) if self.pair else loc


@pytest.mark.parametrize("pair", [False, True])
def test_codes_are_those_of_evaluation(digits: Floats, pair: bool) -> None:
    encoder = _Encoder(pair).train()
    encoder.net[2].eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    codes = CodeProjection(encoder, batch_size=100).fit(digits)(digits)
    assert [encoder.training, encoder.net[2].training] == [True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    encoder.eval()
    with torch.no_grad():
        wanted = encoder.net(torch.from_numpy(digits).float())
    np.testing.assert_allclose(codes, wanted.numpy(), atol=1e-6)
    assert codes.dtype == np.float64


def test_a_description_names_the_parameters() -> None:
    encoder = _Encoder(False)
    described = CodeProjection(encoder).describe()
    assert described == CodeProjection(encoder, batch_size=7).describe()
    with torch.no_grad():
        encoder.net[1].bias[0] += 1e-6  # type: ignore[index, operator]
    assert CodeProjection(encoder).describe() != described
    assert PCAProjection(3).describe() == {"kind": "pca", "dim": 3} != PCAProjection(4).describe()
    assert repr(RandomProjection(3, 5)) == "RandomProjection(dim=3, seed=5)"


@pytest.mark.parametrize("projection", [PCAProjection(3), RandomProjection(3, 1)])
def test_a_state_is_the_whole_fit(digits: Floats, projection: Projection) -> None:
    fit = projection.fit(digits)
    again = type(projection)(**projection.options).restore(fit.state)
    np.testing.assert_array_equal(again(digits), fit(digits))
    assert getattr(again, "explained", 1) == getattr(fit, "explained", 1)


def test_nothing_of_new_data_enters_the_fit(digits: Floats) -> None:
    target = DensityTarget.fit(digits[:1000], dim=3, estimator="kstar", max_neighbors=100)
    assert isinstance(target.projection, PCAProjection)
    before = target.projection.components.copy()
    target.log_prob(digits[1000:] * 100)
    np.testing.assert_array_equal(target.projection.components, before)
    assert len(target.estimator.points) == 1000  # type: ignore[union-attr]


def test_what_they_refuse(digits: Floats) -> None:
    for projection in (PCAProjection, RandomProjection):
        with pytest.raises(ValueError, match="dim must be positive, got 0"):
            projection(0)
    # Three of the 64 pixels never vary.
    with pytest.raises(ValueError, match="dim must be at most 61, the directions in which x varies, got 62"):
        PCAProjection(62).fit(digits)
    with pytest.raises(ValueError, match="dim must be at most 9, the directions"):
        PCAProjection(10).fit(digits[:10])
    with pytest.raises(ValueError, match="x must hold at least 2 data, got 1"):
        PCAProjection(1).fit(digits[:1])
    with pytest.raises(ValueError, match="dim must be at most 64, the size of a datum, got 65"):
        RandomProjection(65).fit(digits)
    with pytest.raises(ValueError, match="x must have 64 numbers in a datum, as those fitted, got 56"):
        PCAProjection(2).fit(digits)(digits[:, :, :7])
    with pytest.raises(RuntimeError, match="PCAProjection must be fitted before it is called"):
        PCAProjection(2)(digits)
    broken = np.tile(digits, (3, 1, 1))
    broken[4500, 2, 2] = np.nan
    for fresh in (PCAProjection(2), IdentityProjection()):
        with pytest.raises(ValueError, match="x must be finite, got nan or inf, first in datum 4500"):
            fresh.fit(broken)(broken)
    with pytest.raises(TypeError, match=r"x must be a tensor or an array such as data\.train\.x, got list"):
        IdentityProjection()([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have shape \(N, \*x_shape\) with N at least 1, got \(5,\)"):
        IdentityProjection()(np.zeros(5))
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        CodeProjection(_Encoder(False), 0)
    with pytest.raises(ValueError, match=r"encoder must give codes of shape \(B, d\), got \(1797, 8, 8\)"):
        CodeProjection(nn.Identity())(digits)
