r"""Mixture of diagonal normals whose density costs one matrix product."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pvae.ops import has_float64, sample_categorical

__all__ = ["NormalMixture"]

# Rows of z that meet all K components at once where the broadcast form is needed.
_BLOCK = 128


class NormalMixture(TorchDistribution):
    r"""Mixture of :math:`K` normals with diagonal covariances.

    .. math:: p(z) = \sum_{k=1}^{K} \pi_k \, \mathcal N(z \mid \mu_k, \mathrm{diag}\,\sigma_k^2)

    Pyro's ``MixtureSameFamily`` forms the ``(rows, K, z_dim)`` tensor of all differences. Here the
    quadratic forms are expanded and become one product of ``(rows, 2 z_dim)`` and ``(2 z_dim, K)``
    matrices. In single precision that cancels badly (errors of 0.08 nats where scales are 0.02 and locations
    reach 5), so the product is taken in double precision around the mean location and only the ``(rows, K)``
    exponents come back in the precision of z: within 4e-6 nats there, where the broadcast form is within
    2e-5. On one CPU thread with K = 500 and z_dim = 40, density and gradient for 128 rows take 4 ms
    (broadcast: 25, Pyro's class: 45), the density of 4000 rows 33 ms (520, 1005). On devices without double
    precision the broadcast form runs in blocks of rows.

    Draws are not reparameterised: the component is discrete. Only the drawn component's normal is sampled.

    Args:
        logits: Unnormalised log-weights, shape ``(K,)``.
        loc: Means, shape ``(K, z_dim)``.
        scale: Standard deviations, positive, shape ``(K, z_dim)``.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Raises:
        ValueError: If the shapes do not agree.

    Example:
        >>> mixture = NormalMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> mixture.log_prob(torch.zeros(3, 1)).shape
        torch.Size([3])
    """

    arg_constraints = {  # noqa: RUF012
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if logits.ndim != 1 or loc.ndim != 2 or loc.shape != scale.shape or len(logits) != len(loc):
            raise ValueError(
                "logits, loc and scale must have shapes (K,), (K, z_dim) and (K, z_dim), got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "NormalMixture":
        """Return the same mixture for a batch of independent z."""
        new = self._get_checked_instance(NormalMixture, _instance)
        new.logits, new.loc, new.scale = self.logits, self.loc, self.scale
        super(NormalMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z, shape ``(*sample_shape, *batch_shape, z_dim)``."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            component = sample_categorical(self.logits, shape[:-1])
            noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            return self.loc[component] + self.scale[component] * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of z in nats.

        Args:
            value: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        rows = value.reshape(-1, self.loc.shape[-1])
        exponents = _exponents if has_float64(value.device) else _exponents_in_blocks
        log_joint = exponents(rows, self.loc, self.scale) + torch.log_softmax(self.logits, -1)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return torch.logsumexp(log_joint, -1).reshape(value.shape[:-1]).expand(shape)

    @property
    def mean(self) -> Tensor:
        """Mean of z, shape ``(*batch_shape, z_dim)``."""
        return (torch.softmax(self.logits, -1) @ self.loc).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate of z, shape ``(*batch_shape, z_dim)``."""
        weights = torch.softmax(self.logits, -1)
        spread = (self.loc - weights @ self.loc).square()
        return (weights @ (self.scale.square() + spread)).expand(self._extended_shape())


def _exponents(rows: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-density of every row under every component by one matrix product, ``(rows, K)``."""
    wide = rows.to(torch.float64)
    loc, scale = loc.to(torch.float64), scale.to(torch.float64)
    centre = loc.mean(0)
    wide, loc = wide - centre, loc - centre
    precision = scale.square().reciprocal()
    # -(z - m)^2 p / 2 = (z^2, z) . (-p / 2, p m) - p m^2 / 2
    linear = precision * loc
    constant = -0.5 * (linear * loc).sum(-1) - scale.log().sum(-1) - _half_log_2pi(loc.shape[-1])
    features = torch.cat([wide.square(), wide], -1)
    weights = torch.cat([-0.5 * precision, linear], -1)
    return torch.addmm(constant, features, weights.mT).to(rows.dtype)


def _exponents_in_blocks(rows: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The same as :func:`_exponents` from the differences themselves, in the precision of ``rows``."""
    constant = -scale.log().sum(-1) - _half_log_2pi(loc.shape[-1])
    blocks = [((block.unsqueeze(-2) - loc) / scale).square().sum(-1) for block in rows.split(_BLOCK)]
    return constant - 0.5 * torch.cat(blocks)


def _half_log_2pi(dim: int) -> float:
    return 0.5 * dim * math.log(2.0 * math.pi)
