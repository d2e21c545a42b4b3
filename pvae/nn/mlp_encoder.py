"""Fully connected encoder."""

import math
from collections.abc import Sequence

from torch import Tensor

from .encoder import Encoder
from .gated import he_normal_
from .labels import LabelEmbedding
from .leading import check_event, check_sizes
from .mlp import hidden_layers, through

__all__ = ["MLPEncoder"]


class MLPEncoder(Encoder):
    """Encoder of flattened data by a fully connected network.

    Args:
        x_shape: Shape of one datum, any number of dimensions.
        z_dim: Size of z.
        hidden: Widths of the hidden layers; with none the features are x itself.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Gated hidden layers and He initialisation, as in :class:`~pvae.nn.MLP`.
        labels: Embedding of labels that the first layer sees beside x; ``None`` for x alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        z_dim: int,
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        gated: bool = False,
        labels: LabelEmbedding | None = None,
    ) -> None:
        in_dim = math.prod(check_sizes("x_shape", x_shape)) + (0 if labels is None else labels.dim)
        super().__init__(x_shape, z_dim, [in_dim, *check_sizes("hidden", hidden)][-1], labels)
        self.hidden = hidden_layers(in_dim, hidden, activation, gated)
        if gated:
            he_normal_(self.head)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(*batch, *x_shape)`` and labels to features ``(*batch, h_dim)``.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``, or labels are missing.
        """
        check_event("x", x, self.x_shape)
        return through(self.hidden, x.flatten(x.ndim - len(self.x_shape)), self.context(y))
