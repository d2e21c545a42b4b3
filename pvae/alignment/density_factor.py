"""A factor that is a function of another site's log-density."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["DensityFactor"]


class DensityFactor(dist.Unit):
    """What ``pyro.factor`` samples, with a value that waits until somebody asks for it.

    An objective that has the log-density of the other site already hands it to :meth:`of`, and it is computed
    once. Any other reader of ``log_factor`` pays for it again.

    Args:
        site: Name of the other site.
        fn: Its distribution, whose ``batch_shape`` this one has.
        value: Its value.
        function: Maps its log-density to the factor, in nats, both of shape ``batch_shape``.
    """

    def __init__(self, site: str, fn: Any, value: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self.site = site
        self._fn, self._value, self._function = fn, value, function
        super(dist.Unit, self).__init__(fn.batch_shape, torch.Size((0,)))

    def of(self, log_prob: Tensor) -> Tensor:
        """Return the factor where the other site has this log-density, shape ``batch_shape``."""
        factor = self._function(log_prob)
        return factor if factor.shape == self.batch_shape else factor.expand(self.batch_shape)

    @cached_property
    def log_factor(self) -> Tensor:
        """The factor in nats, shape ``batch_shape``."""
        return self.of(self._fn.log_prob(self._value))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> dist.Unit:
        """Return this factor, or in another shape one that has its value already."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return dist.Unit(self.log_factor).expand(batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return the value of the factor's site, which holds nothing."""
        return self._value.new_empty((*sample_shape, *self.batch_shape, 0))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """As :meth:`sample`."""
        return self.sample(sample_shape)
