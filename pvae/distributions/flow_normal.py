r"""Normal distribution seen through an invertible map (Rezende & Mohamed 2015, arXiv:1505.05770v6, eq. 5)."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ComposeTransform

__all__ = ["FlowNormal"]


class FlowNormal(TorchDistribution):
    r"""The z whose image :math:`u = f(z)` is normal with a diagonal covariance.

    .. math:: \log p(z) = \sum_j \log \mathcal N(f_j(z) \mid \mu_j, \sigma_j^2)
              + \log \left| \det \frac{\partial f}{\partial z} \right|

    So :math:`z = f^{-1}(\mu + \sigma \epsilon)`. This is ``TransformedDistribution`` with the inverse of f,
    whose density costs two passes through f or more. Here image and log-determinant come from one pass
    where f can tell both at once: by ``call_and_ladj``, as :class:`AffineCoupling` and zuko's transforms can,
    alone or composed.

    Neither mean nor variance of z is known in closed form.

    Args:
        loc: :math:`\mu`, shape ``(*batch, z_dim)``.
        scale: :math:`\sigma`, positive, broadcast against ``loc``.
        flow: :math:`f`, a bijection of vectors of size ``z_dim``. A batch shape that it announces
            (``inverse_shape``) is broadcast against that of ``loc``.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Raises:
        ValueError: If ``loc`` and ``scale`` have no last dimension, or ``flow`` is no bijection of vectors.

    Example:
        >>> from torch.distributions import AffineTransform, ComposeTransform
        >>> half = ComposeTransform([AffineTransform(0.0, 0.5, event_dim=1)])
        >>> FlowNormal(torch.zeros(2), torch.ones(2), half).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, flow: Transform, validate_args: bool | None = None
    ) -> None:
        shape = torch.broadcast_shapes(loc.shape, scale.shape)
        if not shape:
            raise ValueError("loc must have shape (*batch, z_dim), got ()")
        if not flow.bijective or flow.domain.event_dim > 1 or flow.codomain.event_dim > 1:
            raise ValueError(f"flow must be a bijection of vectors, got {flow}")
        shape = flow.inverse_shape(shape)
        base = Normal(loc, scale, validate_args=False)
        self.flow = flow
        self.base_dist = (base if base.batch_shape == shape else base.expand(shape)).to_event(1)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    @property
    def loc(self) -> Tensor:
        """Mean of u, shape ``(*batch_shape, z_dim)``."""
        return self.base_dist.base_dist.loc

    @property
    def scale(self) -> Tensor:
        """Standard deviation of u, shape ``(*batch_shape, z_dim)``."""
        return self.base_dist.base_dist.scale

    @property
    def transforms(self) -> list[Transform]:
        """What makes z of a draw of ``base_dist``: the inverse of the flow."""
        return [self.flow.inv]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "FlowNormal":
        """Return the same distribution for a wider batch of independent z."""
        new = self._get_checked_instance(FlowNormal, _instance)
        new.flow = self.flow
        new.base_dist = self.base_dist.expand(torch.Size(batch_shape))
        super(FlowNormal, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z, shape ``(*sample_shape, *batch_shape, z_dim)``."""
        return self.flow.inv(self.base_dist.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of z in nats.

        Args:
            value: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        u, log_det = _call_and_ladj(self.flow, value)
        return self.base_dist.log_prob(u) + sum_rightmost(log_det, 1 - self.flow.domain.event_dim)


def _call_and_ladj(flow: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Image of ``x`` and log-determinant, the latter without the event dimensions of ``flow``'s domain."""
    if isinstance(flow, ComposeTransform):
        event_dim = flow.domain.event_dim
        log_det = x.new_zeros(()) if flow.parts else torch.zeros_like(x)
        for part in flow.parts:
            x, term = _call_and_ladj(part, x)
            log_det = log_det + sum_rightmost(term, event_dim - part.domain.event_dim)
            event_dim += part.codomain.event_dim - part.domain.event_dim
        return x, log_det
    both = getattr(type(flow), "call_and_ladj", None)
    # Once zuko is imported, torch's own base class has a `call_and_ladj` too, which is what follows below
    # without the fresh view.
    if both is not None and both is not getattr(Transform, "call_and_ladj", None):
        return both(flow, x)
    # A view is another object: a cache keyed by the identity of x cannot answer with a value from before an
    # optimiser step, and still serves the log-determinant of this very call.
    x = x.view_as(x)
    y = flow(x)
    return y, flow.log_abs_det_jacobian(x, y)
