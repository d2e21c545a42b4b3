"""How wide a distribution is, whether or not it says so itself."""

from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["variance_of"]


def variance_of(p: TorchDistribution, num_draws: int) -> Tensor:
    """Variance of each coordinate: in closed form where there is a finite one, else of draws.

    Args:
        p: The distribution, with one event dimension.
        num_draws: Draws in all, shared by the batch, where it takes any; each gets at least two.

    Returns:
        Shape ``(*batch_shape, *event_shape)``.
    """
    try:
        variance = p.variance
    except NotImplementedError:
        variance = None
    if variance is None or not bool(variance.isfinite().all()):
        variance = p.sample((max(2, num_draws // max(1, p.batch_shape.numel())),)).var(0)
    return variance
