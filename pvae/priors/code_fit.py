"""Fitting distributions to autoencoder codes: mixtures by scikit-learn, kernel densities by their bandwidth.

Everything is fitted in coordinates of zero mean and unit scale, so that no setting depends on the units of
the codes, and mapped back. Dimensions that hardly vary are left out of a fit: every component has the mean
and the floor there.
"""

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from .code_stats import CodeScale, CodeStats

__all__ = ["fit_gmm", "fit_kde", "fit_marginal", "fit_normal"]

# Least variance of a component, relative to that of the codes.
_REG_COVAR = 1e-3
_RESTARTS = 4
_EM_STEPS = 500
# Codes whose left-out likelihood chooses a bandwidth.
_LEFT_OUT = 2000


def fit_normal(stats: CodeStats, covariance: Literal["diag", "full"], robust: bool) -> dict[str, Tensor]:
    """Return ``loc`` ``(z_dim,)`` and ``scale`` ``(z_dim,)`` or ``scale_tril`` ``(z_dim, z_dim)``."""
    base = stats.scale(robust)
    if covariance == "diag":
        return {"loc": base.loc, "scale": base.scale}
    return {"loc": base.loc, "scale_tril": stats.factor(robust=robust).scale_tril}


def fit_gmm(
    stats: CodeStats, components: int, covariance: Literal["diag", "full"], robust: bool, seed: int
) -> dict[str, Tensor]:
    """Fit a mixture by expectation maximisation.

    Returns:
        ``logits`` ``(K,)``, ``loc`` ``(K, z_dim)`` and ``scale`` ``(K, z_dim)`` or ``scale_tril``
        ``(K, z_dim, z_dim)``.
    """
    base = stats.scale(robust)
    live = _live(base)
    weights, means, covariances = _em(_white(stats, base)[:, live], components, covariance, seed)
    loc = torch.zeros(components, stats.z_dim, dtype=torch.float64)
    loc[:, live] = means
    parts = {"logits": weights.log(), "loc": base.loc + base.scale * loc}
    if covariance == "diag":
        scale = torch.ones_like(loc)
        scale[:, live] = covariances.sqrt()
        return {**parts, "scale": base.scale * scale}
    matrix = torch.eye(stats.z_dim, dtype=torch.float64).repeat(components, 1, 1)
    matrix[:, live.unsqueeze(1), live] = covariances
    return {**parts, "scale_tril": base.scale.unsqueeze(1) * torch.linalg.cholesky(matrix)}


def fit_marginal(stats: CodeStats, components: int, robust: bool, seed: int) -> dict[str, Tensor]:
    """Fit a one-dimensional mixture to each dimension; ``logits``, ``loc``, ``scale``, all ``(z_dim, K)``."""
    base = stats.scale(robust)
    white = _white(stats, base)
    logits = torch.full((stats.z_dim, components), -math.log(components), dtype=torch.float64)
    loc, scale = torch.zeros_like(logits), torch.ones_like(logits)
    for j in _live(base).tolist():
        weights, means, variances = _em(white[:, j : j + 1], components, "diag", seed)
        logits[j], loc[j], scale[j] = weights.log(), means[:, 0], variances[:, 0].sqrt()
    return {
        "logits": logits,
        "loc": base.loc.unsqueeze(1) + base.scale.unsqueeze(1) * loc,
        "scale": base.scale.unsqueeze(1) * scale,
    }


def fit_kde(
    stats: CodeStats,
    num_codes: int,
    bandwidth: float | Literal["loo"] | None,
    preserve_moments: bool,
    robust: bool,
) -> dict[str, Tensor]:
    r"""Put a normal on each of ``num_codes`` codes kept, with one bandwidth per dimension.

    ``preserve_moments`` shrinks the centres towards the mean by :math:`\sqrt{1 - (h_j / s_j)^2}`, without
    which the variance is :math:`s_j^2 + h_j^2`.

    Returns:
        ``logits`` ``(num_codes,)``, ``-inf`` where there are fewer codes, ``loc`` ``(num_codes, z_dim)`` and
        the bandwidth ``scale`` ``(z_dim,)``.
    """
    base = stats.scale(robust)
    white = _white(stats, base)[:num_codes]
    if bandwidth is None:
        factor = len(white) ** (-1 / (stats.z_dim + 4))
    elif bandwidth == "loo":
        factor = _left_out_bandwidth(white[:, ~base.dead], preserve_moments)
    else:
        factor = bandwidth
    width = torch.where(base.dead, 1.0, factor)
    shrink = (1 - width.square()).clamp(min=0).sqrt() if preserve_moments else torch.ones_like(width)
    loc = base.loc.repeat(num_codes, 1)
    loc[: len(white)] += base.scale * shrink * white
    logits = torch.full((num_codes,), -math.inf, dtype=torch.float64)
    logits[: len(white)] = -math.log(len(white))
    return {"logits": logits, "loc": loc, "scale": width * base.scale}


def _white(stats: CodeStats, base: CodeScale) -> Tensor:
    """The codes kept, in coordinates of zero mean and unit scale, ``(num_kept, z_dim)``."""
    return (stats.codes - base.loc) / base.scale


def _live(base: CodeScale) -> Tensor:
    """Numbers of the dimensions that vary."""
    return (~base.dead).nonzero().squeeze(1)


def _em(
    codes: Tensor, components: int, covariance: Literal["diag", "full"], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and covariances by scikit-learn, from the best of several k-means starts."""
    if len(codes) < components:
        raise ValueError(f"components must be at most the number of codes, {len(codes)}, got {components}")
    dim = codes.shape[1]
    if dim == 0:
        shape = (components, 0) if covariance == "diag" else (components, 0, 0)
        empty = codes.new_zeros(shape)
        return codes.new_full((components,), 1 / components), codes.new_zeros(components, 0), empty
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    fit = GaussianMixture(
        components,
        covariance_type=covariance,
        reg_covar=_REG_COVAR * max(float(codes.var(0).mean()), torch.finfo(torch.float32).eps),
        init_params="kmeans",  # itself started by k-means++
        n_init=_RESTARTS,
        max_iter=_EM_STEPS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # Said below in our words; k-means also warns where there are fewer different codes than components.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(codes.numpy())
    if not fit.converged_:
        warnings.warn(
            f"the mixture of {components} components has not settled after {_EM_STEPS} steps of expectation "
            f"maximisation (log-likelihood {fit.lower_bound_:.3f} nats per code)",
            stacklevel=2,
        )
    # A component that lost all its codes has weight 0 up to rounding.
    weights = torch.from_numpy(fit.weights_).clamp(min=torch.finfo(torch.float64).tiny)
    return weights / weights.sum(), torch.from_numpy(fit.means_), torch.from_numpy(fit.covariances_)


def _left_out_bandwidth(white: Tensor, preserve_moments: bool) -> float:
    r"""Multiple of the scale that maximises the likelihood of codes under the kernels of all the others."""
    from scipy.optimize import minimize_scalar

    n, dim = white.shape
    if dim == 0 or n < 2:
        return 0.5
    points = white[:_LEFT_OUT]
    product, squares = points @ white.mT, white.square().sum(1)
    own = torch.arange(len(points))

    def loss(log_width: float) -> float:
        width = math.exp(log_width)
        shrink = math.sqrt(max(0.0, 1 - width**2)) if preserve_moments else 1.0
        distance = squares[: len(points), None] - 2 * shrink * product + shrink**2 * squares
        exponent = distance.mul_(-0.5 / width**2)
        exponent[own, own] = -math.inf
        return dim * log_width - float(torch.logsumexp(exponent, 1).mean())

    largest = 0.999 if preserve_moments else 2.0
    found = minimize_scalar(loss, bounds=(math.log(1e-3), math.log(largest)), method="bounded")
    return math.exp(float(found.x))
