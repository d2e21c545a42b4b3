"""Categorical likelihood of integer levels."""

from collections.abc import Sequence

from pyro.distributions import TorchDistribution
from torch import Tensor

from pvae.distributions import LevelCategorical

from .base import Likelihood, is_count, repeated

__all__ = ["Categorical"]


class Categorical(Likelihood):
    r"""Independent levels with a free probability for each.

    .. math:: p(x \mid z) = \prod_i \mathrm{softmax}(l_i)_{x_i}, \qquad x_i \in \{0, \dots, levels - 1\}

    The decoder outputs logits, shape ``(levels * C, ...)`` for x of shape ``(C, ...)``, the level running
    slowest. The levels in x are floats.

    Args:
        levels: Number of levels, at least 2.

    Raises:
        ValueError: If there are fewer than two levels.
    """

    values = frozenset({"binary", "count"})

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = levels

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape ``(levels * C, ...)`` for x of shape ``(C, ...)``."""
        return repeated(x_shape, self.levels)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return p(x | z) for logits ``params``, shape ``(*batch, levels * C, ...)``."""
        logits, dim = self._unstacked(params, self.levels)
        return LevelCategorical(logits=logits.movedim(dim, -1)).to_event(self._event_dim(params))

    def _supports(self, x: Tensor) -> Tensor:
        return is_count(x) & (x < self.levels)

    def _refusal(self, value: float) -> str:
        return (
            f"Categorical needs x in {{0, ..., {self.levels - 1}}}, got values such as {value:.3g}: load the "
            "data with scale='count' and set levels to the number of grey levels"
        )
