"""Parity with DADApy: with stored values that it gave, always, and with itself where it is installed."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from scipy.special import gammaln

from pvae.density import KStar, PAk

from .make_dadapy_reference import CASES, MAX_NEIGHBORS, PATH, Arrays, Floats, draw, reference
from .truths import mixture

# DADApy stops its search for the maximum early, by more where k* is small: the largest gap of log-densities
# where k* > 3, and in all.
GAPS = {
    "mixture": (2e-4, 2e-4),
    "normal_5": (1e-3, 1e-3),
    "normal_10": (2e-3, 6e-3),
    "digits": (1e-3, 1.5e-3),
}
# What may be told apart by its likelihood in double precision.
APART = 2e-5


@pytest.fixture(scope="module")
def stored() -> Arrays:
    with np.load(PATH) as file:
        return dict(file)


def case_of(name: str, stored: Arrays) -> tuple[Floats, Floats, Arrays]:
    """Data and new points of a case, and what DADApy found."""
    found = {
        key.removeprefix(f"{name}_"): value for key, value in stored.items() if key.startswith(f"{name}_")
    }
    if name == "digits":
        return found["u"].astype(np.float64), found["new"].astype(np.float64), found
    return *draw(name), found


def check_data(u: Floats, other: Arrays, many: float, every: float) -> None:
    """Compare with our estimates at the data; the last two bound gaps where k* > 3, and in all."""
    fit = PAk(max_neighbors=MAX_NEIGHBORS).fit(u)
    plain = KStar(max_neighbors=MAX_NEIGHBORS).fit(u)
    assert fit.intrinsic_dim == pytest.approx(float(other["intrinsic_dim"]), abs=1e-6)
    np.testing.assert_array_equal(fit.k_star, other["k_star"])
    np.testing.assert_allclose(fit.standard_error, other["standard_error"], rtol=1e-10)
    np.testing.assert_allclose(plain.log_density, other["plain"], rtol=0, atol=1e-9)
    gap = np.abs(fit.log_density - other["log_density"])
    assert gap[fit.k_star >= 10].max() < 1e-4
    assert gap[fit.k_star > 3].max() < many
    assert gap.max() < every


def check_new(u: Floats, new: Floats, other: Arrays, every: float) -> None:
    """Compare with our estimates at new points; the last bounds all gaps."""
    scored = PAk(max_neighbors=MAX_NEIGHBORS).fit(u).score(new)
    plain = KStar(max_neighbors=MAX_NEIGHBORS).fit(u).score(new)
    # The error tells k*.
    np.testing.assert_array_equal(np.rint(plain.standard_error**-2), other["new_k_star"])
    np.testing.assert_allclose(scored.standard_error, other["new_standard_error"], rtol=1e-10)
    np.testing.assert_allclose(plain.log_density, other["new_plain"], rtol=0, atol=1e-9)
    gap = np.abs(scored.log_density - other["new_log_density"])
    assert gap[other["new_k_star"] >= 10].max() < 1e-4
    assert gap.max() < every


def highest(log_density: float, radii: Floats, dim: float, size: int) -> float:
    """PAk's log-likelihood where its slope is the best one for a given log-density at the point.

    Args:
        log_density: Nats.
        radii: Distances to the k* nearest others, shape ``(k,)``.
        dim: D of the volumes.
        size: Number of data, N.
    """
    count = len(radii)
    rank = np.arange(1, count + 1)
    unit = np.exp(dim / 2 * np.log(np.pi) - gammaln(dim / 2 + 1))
    expected = unit * np.diff(radii**dim, prepend=0) * size * np.exp(log_density)
    slope = brentq(lambda a: rank.sum() - rank @ (expected * np.exp(a * rank)), -20, 20, xtol=1e-14)
    at_point = np.log(size) + log_density
    return float(count * at_point + slope * rank.sum() - (expected * np.exp(slope * rank)).sum())


@pytest.mark.parametrize("case", [case for case in CASES if case != "digits"])
def test_the_data_are_those_of_the_reference(case: str, stored: Arrays) -> None:
    u, new, other = case_of(case, stored)
    assert "dadapy 0.3.4" in stored["versions"].tolist()
    np.testing.assert_allclose(np.arange(len(u)) @ u, other["check"], rtol=1e-10)
    assert (len(u), len(new)) == (len(other["k_star"]), len(other["new_k_star"]))


@pytest.mark.parametrize("case", CASES)
def test_dadapy_gave_the_same(case: str, stored: Arrays) -> None:
    u, _, other = case_of(case, stored)
    check_data(u, other, *GAPS[case])


@pytest.mark.parametrize("case", CASES)
def test_dadapy_gave_the_same_at_new_points(case: str, stored: Arrays) -> None:
    u, new, other = case_of(case, stored)
    check_new(u, new, other, GAPS[case][1])


@pytest.mark.parametrize("case", CASES)
def test_where_they_differ_our_likelihood_is_the_higher(case: str, stored: Arrays) -> None:
    u, new, other = case_of(case, stored)
    fit = PAk(max_neighbors=MAX_NEIGHBORS).fit(u)
    ours = np.concatenate([fit.log_density, fit.score(new).log_density])
    theirs, counts = (np.concatenate([other[key], other[f"new_{key}"]]) for key in ("log_density", "k_star"))
    both = np.concatenate([u, new])
    apart = np.flatnonzero(np.abs(ours - theirs) > APART)
    assert len(apart) > 0
    for i in apart:
        radii = np.sort(cdist(both[i : i + 1], u)[0])
        # Without the point itself.
        at = radii[radii > 0][: counts[i]], float(other["intrinsic_dim"]), len(u)
        assert highest(ours[i], *at) > highest(theirs[i], *at)
        # It is the maximum of a concave function: lower on both sides.
        assert highest(ours[i], *at) > max(highest(ours[i] + step, *at) for step in (-1e-5, 1e-5))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dim", "tolerance"), [(2, 2e-4), (10, 0.05)])
def test_dadapy_gives_the_same(dim: int, tolerance: float) -> None:
    pytest.importorskip("dadapy", reason="dadapy needs numpy<2 and jax==0.4.30, so is no extra of ours")
    rng = np.random.default_rng(0)
    u, new = (mixture().draw(rng, n) if dim == 2 else rng.standard_normal((n, dim)) for n in (5000, 200))
    other = reference(u, new)
    check_data(u, other, tolerance, 0.05)
    check_new(u, new, other, 0.05)
