"""Make ``dadapy_reference.npz``, what DADApy finds on the data that ``test_dadapy.py`` draws again.

DADApy needs NumPy 1 and a pinned JAX, so this runs in an environment of its own and imports nothing of ours::

    python3.11 -m venv env && env/bin/pip install dadapy==0.3.4
    env/bin/python tests/density/make_dadapy_reference.py

The file names the versions that it was made with: Python 3.11.7, NumPy 1.26.4, SciPy 1.17.1, scikit-learn
1.9.1. Draws are from ``numpy.random.default_rng`` (PCG64) with the seeds in :func:`draw`. Digits are stored
with the result, in single precision, as their principal components depend on the machine.

DADApy's own interpolation is no reference for new points: that of PAk raises (0.3.4 passes an argument
twice), and that of k*-NN reads the distances as if the first were that to the point itself. So a new point is
given to DADApy's fit as one more row of distances to the data, among whose neighbours it is not.
"""

import importlib
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CASES", "MAX_NEIGHBORS", "PATH", "draw", "reference"]

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

PATH = Path(__file__).with_name("dadapy_reference.npz")
CASES = ("mixture", "normal_5", "normal_10", "digits")
MAX_NEIGHBORS = 100

_SIZE, _NEW = 2000, 200
_DIGITS = 1700


def draw(case: str) -> tuple[Floats, Floats]:
    """Draw data and new points, ``(N, d)`` and ``(M, d)``, for any case but digits."""
    total = _SIZE + _NEW
    if case == "mixture":
        # Eight equal isotropic normals of standard deviation 0.5 in the plane.
        centres = np.clip(4 * np.random.default_rng(0).standard_normal((8, 2)), -5, 5)
        rng = np.random.default_rng(1)
        u = centres[rng.integers(8, size=total)] + 0.5 * rng.standard_normal((total, 2))
    else:
        dim = int(case.removeprefix("normal_"))
        u = np.random.default_rng(dim).standard_normal((total, dim))
    return u[:_SIZE], u[_SIZE:]


def reference(u: Floats, new: Floats) -> Arrays:
    """Return DADApy's PAk and k*-NN: of each datum, and of each new point (names that begin with ``new_``).

    Raises:
        ValueError: If two distances from one point are equal: DADApy adds noise to them.
    """
    data = importlib.import_module("dadapy").Data
    fit = data(coordinates=u, maxk=MAX_NEIGHBORS, n_jobs=1)
    fit.compute_distances(maxk=MAX_NEIGHBORS)
    fit.compute_id_2NN()
    # Column 0 stands for the point itself: distance 0, and an index that nothing reads.
    gap = np.sqrt(np.square(new[:, None] - u).sum(-1))
    index = np.argsort(gap, axis=1)[:, :MAX_NEIGHBORS]
    radii = np.pad(np.take_along_axis(gap, index, 1), ((0, 0), (1, 0)))
    radii = np.concatenate([fit.distances, radii])
    if not (np.diff(radii) > 0).all():
        raise ValueError("u must have different distances from each point, got equal ones")
    index = np.concatenate([fit.dist_indices, np.pad(index, ((0, 0), (1, 0)))])
    both = data(distances=(radii, index), maxk=MAX_NEIGHBORS, n_jobs=1)
    both.intrinsic_dim = fit.intrinsic_dim
    found: Arrays = {"intrinsic_dim": np.array(fit.intrinsic_dim)}
    for name, one in (("", fit), ("new_", both)):
        # The number of data is that of rows to DADApy.
        rows, shift = slice(len(u) if name else 0, None), np.log(one.N / len(u))
        log_density, error = one.compute_density_PAk()
        found[name + "k_star"] = one.kstar[rows].astype(np.int16)
        found[name + "log_density"] = log_density[rows] + shift
        found[name + "standard_error"] = error[rows]
        found[name + "plain"] = one.compute_density_kstarNN()[0][rows] + shift
    return found


def main() -> None:
    """Write the file beside this one."""
    stored: dict[str, Any] = {
        "versions": np.array(
            [f"python {sys.version.split()[0]}"]
            + [f"{name} {version(name)}" for name in ("dadapy", "numpy", "scipy", "scikit-learn")]
        )
    }
    for case in CASES:
        if case == "digits":
            u, new = _digits()
            stored |= {"digits_u": u.astype(np.float32), "digits_new": new.astype(np.float32)}
        else:
            u, new = draw(case)
            # Tells another generator from another density.
            stored[f"{case}_check"] = np.arange(len(u)) @ u
        stored |= {f"{case}_{name}": value for name, value in reference(u, new).items()}
    np.savez_compressed(PATH, **stored)


def _digits() -> tuple[Floats, Floats]:
    """Scikit-learn's digits in 10 principal components of the first 1,700, numbers of single precision."""
    from sklearn.datasets import load_digits

    x = load_digits().data
    x = x - x[:_DIGITS].mean(0)
    components = np.linalg.svd(x[:_DIGITS], full_matrices=False)[2][:10]
    u = (x @ components.T).astype(np.float32).astype(np.float64)
    return u[:_DIGITS], u[_DIGITS:]


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
