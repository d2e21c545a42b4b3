"""Fully connected decoder."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

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
    ) -> None:
        super().__init__()
        self.z_dim = check_size("z_dim", z_dim)
        self.out_shape = check_sizes("out_shape", out_shape)
        self.mlp = MLP(self.z_dim, math.prod(self.out_shape), hidden, activation, gated)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``z`` ``(*batch, z_dim)`` to ``(*batch, *out_shape)``.

        Raises:
            ValueError: If the last dimension of ``z`` is not ``z_dim``.
        """
        check_event("z", z, (self.z_dim,))
        return self.mlp(z).unflatten(-1, self.out_shape)
