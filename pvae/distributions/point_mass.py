"""A point in place of a distribution over z: what a deterministic encoder says."""

import pyro.distributions as dist

__all__ = ["PointMass"]


class PointMass(dist.Delta):
    """A point mass that an objective may use and a likelihood may not.

    It has no density: as the proposal of an importance-weighted likelihood it would turn log p(x | z) into
    log p(x). Declaring itself a surrogate, it is refused there.

    Args:
        v: The point, shape ``(*batch, z_dim)`` with ``event_dim=1``.
        log_density: As in :class:`pyro.distributions.Delta`.
        event_dim: Number of dimensions of one point.
    """

    training_density = "surrogate"
