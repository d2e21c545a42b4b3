"""Parity with DADApy on the same data, where it is installed: it needs NumPy 1 and a pinned JAX."""

import numpy as np
import pytest

from pvae.density import KStar, PAk

from .truths import mixture


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dim", "tolerance"), [(2, 2e-4), (10, 0.05)])
def test_dadapy_gives_the_same(dim: int, tolerance: float) -> None:
    dadapy = pytest.importorskip(
        "dadapy", reason="dadapy needs numpy<2 and jax==0.4.30, so is no extra of ours"
    )
    rng = np.random.default_rng(0)
    u = mixture().draw(rng, 5000) if dim == 2 else rng.standard_normal((5000, dim))
    other = dadapy.Data(coordinates=u, maxk=100)
    other.compute_distances(maxk=100)
    other.compute_id_2NN()
    other.compute_density_PAk()
    fit = PAk(max_neighbors=100).fit(u)
    assert fit.intrinsic_dim == pytest.approx(float(other.intrinsic_dim), abs=1e-6)
    np.testing.assert_array_equal(fit.k_star, other.kstar)
    np.testing.assert_allclose(fit.standard_error, other.log_den_err, rtol=1e-10)
    # It stops its search for the maximum early: by more where k* is small.
    many = fit.k_star > 3
    np.testing.assert_allclose(fit.log_density[many], other.log_den[many], atol=tolerance)
    other.compute_density_kstarNN()
    np.testing.assert_allclose(KStar(max_neighbors=100).fit(u).log_density, other.log_den, atol=1e-9)
