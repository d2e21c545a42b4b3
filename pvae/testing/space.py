"""A distribution's values as vectors: of real numbers for a continuous one, listed for a finite one."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to, constraints

__all__ = ["Unconstrained", "finite_values", "has_moving_support", "is_discrete"]

_MOST_VALUES = 2**16
# Beyond it exponentials of an unconstrained number over- or underflow in double precision.
_EDGE = 600.0


class Unconstrained:
    r"""The density of ``u`` where a distribution's value is ``x = T(u)``, with ``u`` a real vector.

    .. math:: p(u) = p(T(u)) \, |\det \partial T / \partial u|

    Args:
        distribution: Continuous, with a support that :func:`torch.distributions.biject_to` knows.

    Raises:
        ValueError: If it does not.
    """

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        self.distribution = distribution
        self.batch_shape = distribution.batch_shape
        support = _scalar(distribution.support)
        self._linear = support is constraints.real or support is constraints.real_vector
        try:
            self._to_value = None if self._linear else biject_to(distribution.support)
        except NotImplementedError as error:
            raise ValueError(
                f"the support of {type(distribution).__name__} must be known to torch's biject_to, or values "
                f"must list it, got {distribution.support}"
            ) from error
        shape = distribution.event_shape
        self._u_shape = shape if self._to_value is None else self._to_value.inverse_shape(shape)
        self.dim = math.prod(self._u_shape)

    def flat(self, value: Tensor) -> Tensor:
        """Map values ``(*sample, *batch, *event_shape)`` to ``u``, shape ``(*sample, *batch, dim)``."""
        u = value if self._to_value is None else self._to_value.inv(value)
        return u.reshape(*u.shape[: u.ndim - len(self._u_shape)], self.dim)

    def value(self, u: Tensor) -> Tensor:
        """Map ``u``, shape ``(*sample, *batch, dim)``, to values."""
        shaped = u.reshape(u.shape[:-1] + self._u_shape)
        return shaped if self._to_value is None else self._to_value(shaped)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density of ``u``, shape ``(*sample, *batch)``."""
        if self._to_value is None:
            return self.distribution.log_prob(self.value(u))
        outside = (u.abs() > _EDGE).any(-1)
        u = u.clamp(-_EDGE, _EDGE)
        shaped = u.reshape(u.shape[:-1] + self._u_shape)
        value = self._to_value(shaped)
        log_det = self._to_value.log_abs_det_jacobian(shaped, value)
        log_det = sum_rightmost(log_det, log_det.ndim - (u.ndim - 1))
        return (self.distribution.log_prob(value) + log_det).masked_fill(outside, -math.inf)

    def score(self, u: Tensor) -> Tensor:
        """Gradient of the log-density, same shape as ``u``."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            (score,) = torch.autograd.grad(self.log_prob(u).sum(), u)
        return score


def is_discrete(distribution: dist.TorchDistribution) -> bool:
    """Whether the support is a countable set."""
    return bool(getattr(distribution.support, "is_discrete", False))


def has_moving_support(distribution: dist.TorchDistribution) -> bool:
    """Whether the bounds of the support are tensors, hence parameters, as a uniform distribution's are."""
    support = _scalar(distribution.support)
    return any(isinstance(getattr(support, f"{side}_bound", None), Tensor) for side in ("lower", "upper"))


def finite_values(distribution: dist.TorchDistribution, samples: Tensor) -> Tensor:
    """List the values of a discrete distribution, shape ``(num_values, *event_shape)``.

    An unbounded count is listed to twice the largest sample and 100 more, where the mass left is nil.

    Raises:
        ValueError: If the support is not known or has more than 65,536 values.
    """
    shape = distribution.event_shape
    support = _scalar(distribution.support)
    dtype = samples.dtype
    if isinstance(support, type(constraints.one_hot)):
        return torch.eye(shape[-1], dtype=dtype)
    lowest, highest = _range(support, samples)
    numel = math.prod(shape)
    if lowest is None or highest is None or (highest - lowest + 1) ** numel > _MOST_VALUES:
        raise ValueError(
            f"values must list the support of {type(distribution).__name__}, shape (num_values, "
            f"*event_shape): {support} with event_shape {tuple(shape)} is unknown or has too many values"
        )
    levels = torch.arange(lowest, highest + 1, dtype=dtype)
    return torch.cartesian_prod(*[levels] * numel).reshape(-1, *shape) if numel else levels


def _range(support: Any, samples: Tensor) -> tuple[int | None, int | None]:
    if support is constraints.boolean:
        return 0, 1
    lowest, highest = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if not support.is_discrete or lowest is None:
        return None, None
    top = 2 * samples.max() + 100 if highest is None else torch.as_tensor(highest).max()
    return int(torch.as_tensor(lowest).min()), int(top)


def _scalar(support: Any) -> Any:
    """Strip what only counts event dimensions."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
