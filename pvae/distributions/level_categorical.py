"""Categorical distribution over the levels 0, 1, ..., K - 1 of a grey value."""

from collections.abc import Sequence

import torch
from pyro.distributions import Categorical
from torch import Tensor

from pvae.ops import sample_categorical

__all__ = ["LevelCategorical"]


class LevelCategorical(Categorical):
    r"""Pyro's ``Categorical`` with the level as a number.

    .. math:: p(x = k) = \mathrm{softmax}(l)_k, \qquad \mathrm E\, x = \sum_k k \, p(x = k)

    Draws are floating-point levels, as x is, and mean and variance are those of the level; the parent
    returns ``int64`` and NaN. Drawing does not synchronise with the host. Arguments are the parent's.
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw levels as floats, shape ``(*sample_shape, *batch_shape)``."""
        return sample_categorical(self.logits, sample_shape).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean level, shape ``batch_shape``."""
        return self.probs @ self._levels

    @property
    def variance(self) -> Tensor:
        """Variance of the level, shape ``batch_shape``."""
        return (self.probs * (self._levels - self.mean.unsqueeze(-1)).square()).sum(-1)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
