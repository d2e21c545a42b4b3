r"""Frechet distance of generated and real data in features (Heusel et al. 2017, arXiv:1706.08500v6, eq. 6),
and two neighbour distances that tell copies from new data.
"""

import torch
from torch import Tensor

from pvae.ops import has_float64

from .interval import Interval, bootstrap_intervals
from .two_sample import gaussian_w2

__all__ = ["frechet_distance", "frechet_interval", "mean_pairwise_distance", "nearest_distance"]

_ROWS = 1024
# By differences: a product of matrices would give a row a distance to itself.
_EXACT = "donot_use_mm_for_euclid_dist"


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the features' moments; zero if these agree.

    It grows as samples shrink: compare only values with the same numbers of data on both sides. In the
    features of a classifier trained here its name is ``frechet_proxy``; FID is the value in the features of
    one particular Inception network.

    Args:
        features_a: Shape ``(N, F)``, at least two rows; F may exceed N.
        features_b: Shape ``(M, F)``, at least two rows.

    Raises:
        ValueError: If they are not matrices of one width with two rows or more.
    """
    return gaussian_w2(features_a, features_b)


def frechet_interval(
    features_a: Tensor,
    features_b: Tensor,
    num_bootstrap: int = 200,
    seed: int = 0,
    *,
    level: float = 0.95,
) -> Interval:
    """Bootstrap :func:`frechet_distance` over both samples (see :func:`bootstrap_intervals`).

    Args:
        features_a: Shape ``(N, F)``.
        features_b: Shape ``(M, F)``.
        num_bootstrap: Number of resamples; with 0 both ends are NaN.
        seed: Seed of the resamples.
        level: Coverage aimed at.

    Raises:
        ValueError: As :func:`frechet_distance`.
    """

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        first, second = features_a[i.to(features_a.device)], features_b[j.to(features_b.device)]
        return torch.tensor(frechet_distance(first, second), dtype=torch.float64)

    sizes = len(features_a), len(features_b)
    return bootstrap_intervals(
        statistic, *sizes, num_bootstrap=num_bootstrap, level=level, seed=seed, least=0.0
    )[0]


def nearest_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Distance of each row to its nearest row of ``reference``.

    Generated data much nearer to the training data than held-out data are were memorised.

    Args:
        features: Shape ``(N, F)``.
        reference: Shape ``(M, F)``, at least one row.

    Returns:
        Euclidean distances, shape ``(N,)``, double precision, on the CPU.

    Raises:
        ValueError: If they are not matrices of one width, or ``reference`` is empty.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "features and reference must have shapes (N, F) and (M, F), "
            f"got {tuple(features.shape)} and {tuple(reference.shape)}"
        )
    if len(reference) == 0:
        raise ValueError("reference must have at least one row, got none")
    reference = _wide(reference)
    rows = [
        torch.cdist(part, reference, compute_mode=_EXACT).amin(-1) for part in _wide(features).split(_ROWS)
    ]
    return torch.cat(rows).cpu()


def mean_pairwise_distance(features: Tensor, y: Tensor | None = None) -> float:
    """Mean distance of two different rows: how diverse a sample is.

    Args:
        features: Shape ``(N, F)``, at least two rows.
        y: Labels, first dimension ``N``: pairs with equal labels only, all pairs counting alike.

    Returns:
        The mean Euclidean distance; NaN if no two labels are equal.

    Raises:
        ValueError: If ``features`` is not a matrix with two rows or more, or ``y`` has other rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape (N, F) with N at least 2, got {tuple(features.shape)}")
    if y is not None and len(y) != len(features):
        raise ValueError(f"y must have one row for each of the {len(features)} features, got {len(y)}")
    groups = [features]
    if y is not None:
        number = torch.unique(y.reshape(len(y), -1), dim=0, return_inverse=True)[1].to(features.device)
        groups = [features[number == i] for i in range(int(number.max()) + 1)]
    total, pairs = 0.0, 0
    for group in map(_wide, groups):
        # A row's distance to itself adds nothing to the sum, and is no pair.
        total += sum(
            float(torch.cdist(part, group, compute_mode=_EXACT).sum()) for part in group.split(_ROWS)
        )
        pairs += len(group) * (len(group) - 1)
    return total / pairs if pairs else float("nan")


def _wide(features: Tensor) -> Tensor:
    """The features in double precision, where the device has it."""
    device = features.device if has_float64(features.device) else torch.device("cpu")
    return features.detach().to(device, torch.float64)
