r"""Precision and recall of a sample in features (Kynkaanniemi et al. 2019, arXiv:1904.06991v3, eq. 1 and 2),
with density and coverage (Naeem et al. 2020, arXiv:2002.09797v2, eq. 3 and 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .two_sample import _points

__all__ = ["PrecisionRecall", "precision_recall"]

_ROWS = 1024
# By differences: a product of matrices would give a row a distance to itself.
_EXACT = "donot_use_mm_for_euclid_dist"


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of a sample looks real, and how much of what is real it shows.

    Attributes:
        precision: Share of the samples within the neighbourhood of some real datum.
        recall: Share of the real data within the neighbourhood of some sample.
        density: Mean number of neighbourhoods of real data that a sample lies in, over ``neighbours``; may
            exceed one, and is not raised by a single outlier with a wide neighbourhood as precision is.
        coverage: Share of the real data in whose neighbourhood a sample lies.
        neighbours: A datum's neighbourhood reaches to its so many-th nearest neighbour of its own kind.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f}, recall {self.recall:.3f}, density {self.density:.3f}, "
            f"coverage {self.coverage:.3f}"
        )


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    r"""Compare a sample with real data by neighbourhoods.

    .. math:: \mathrm{precision} = \frac{1}{M} \sum_j \Bigl[ \exists i :\, |g_j - r_i| \le \rho_k(r_i) \Bigr]

    with :math:`\rho_k(r_i)` the distance of :math:`r_i` to its k-th nearest other real datum. A sample of the
    data's own distribution does not score one, and what it scores depends on both numbers of data and on the
    dimension: compare at equal numbers, and with what held-out data score.

    Args:
        real: Features of real data, shape ``(N, F)``.
        generated: Features of samples, shape ``(M, F)``.
        neighbours: The k above.

    Raises:
        ValueError: If the features are not finite matrices of one width with more than ``neighbours`` rows,
            or ``neighbours`` is not positive.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be positive, got {neighbours}")
    real, generated = _points(real, generated, least=neighbours + 1)
    around_real, around_generated = _radii(real, neighbours), _radii(generated, neighbours)
    precise = inside = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    for part, reach in zip(generated.split(_ROWS), around_generated.split(_ROWS), strict=True):
        distance = torch.cdist(part, real, compute_mode=_EXACT)
        near = distance <= around_real
        precise += int(near.any(-1).sum())
        inside += int(near.sum())
        covered |= near.any(0)
        recalled |= (distance <= reach.unsqueeze(-1)).any(0)
    return PrecisionRecall(
        precision=precise / len(generated),
        recall=float(recalled.double().mean()),
        density=inside / (neighbours * len(generated)),
        coverage=float(covered.double().mean()),
        neighbours=neighbours,
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th nearest other row; its own distance of zero is the first."""
    return torch.cat(
        [
            torch.cdist(part, points, compute_mode=_EXACT).kthvalue(neighbours + 1).values
            for part in points.split(_ROWS)
        ]
    )
