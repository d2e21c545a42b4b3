"""Fully connected decoder."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .gated import GatedLinear
from .labels import LabelEmbedding, embedded
from .leading import check_event, check_size, check_sizes
from .mlp import MLP

__all__ = ["MLPDecoder"]


class MLPDecoder(nn.Module):
    """Decoder by a fully connected network, without an output activation.

    Args:
        z_dim: Size of z.
        out_shape: Shape of what the likelihood needs, ``likelihood.param_shape(x_shape)``.
        hidden: Widths of the hidden layers; empty for a linear decoder.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Gated hidden layers and He initialisation, as in :class:`~pvae.nn.MLP`.
        labels: Embedding of labels that the first layer sees beside z; ``None`` for z alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.
    """

    def __init__(
        self,
        z_dim: int,
        out_shape: Sequence[int],
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        gated: bool = False,
        labels: LabelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.z_dim = check_size("z_dim", z_dim)
        self.out_shape = check_sizes("out_shape", out_shape)
        self.labels = labels
        in_dim = self.z_dim + (0 if labels is None else labels.dim)
        self.mlp = MLP(in_dim, math.prod(self.out_shape), hidden, activation, gated)

    @property
    def input_layer(self) -> nn.Linear:
        """The linear layer that reads z, in its first ``z_dim`` columns."""
        layer = self.mlp.hidden[0] if len(self.mlp.hidden) else self.mlp.out
        if isinstance(layer, GatedLinear):
            layer = layer.linear
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``z`` ``(*batch, z_dim)``, and the labels if it sees them, to ``(*batch, *out_shape)``.

        Raises:
            ValueError: If the last dimension of ``z`` is not ``z_dim``, or labels are missing.
        """
        check_event("z", z, (self.z_dim,))
        if self.labels is None:
            return self.mlp(z).unflatten(-1, self.out_shape)
        return self.mlp(z, embedded(self.labels, y, "MLPDecoder")).unflatten(-1, self.out_shape)
