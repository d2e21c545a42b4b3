"""Fully connected networks of two inputs, as in the two-level model of the VampPrior's code (Tomczak &
Welling 2018, arXiv:1705.07120v5, sec. 4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pvae.ops import soft_clamp

from .encoder import LOG_VAR_RANGE
from .leading import check_event, check_size, check_sizes
from .mlp import MLP, hidden_layers

__all__ = ["PairDecoder", "PairEncoder", "PairMLP"]


class PairMLP(nn.Module):
    """One hidden layer for each input, then one for both, and a linear last layer.

    Args:
        a_dim: Size of the first input.
        b_dim: Size of the second input.
        out_dim: Size of the output.
        hidden: Width of each of the three hidden layers.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Gated hidden layers and He initialisation, as in :class:`~pvae.nn.MLP`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.
    """

    def __init__(
        self,
        a_dim: int,
        b_dim: int,
        out_dim: int,
        hidden: int = 300,
        activation: str = "relu",
        gated: bool = True,
    ) -> None:
        super().__init__()
        check_size("a_dim", a_dim), check_size("b_dim", b_dim), check_size("hidden", hidden)
        self.a = hidden_layers(a_dim, (hidden,), activation, gated)
        self.b = hidden_layers(b_dim, (hidden,), activation, gated)
        self.both = MLP(2 * hidden, out_dim, (hidden,), activation, gated)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Map ``a`` ``(*batch, a_dim)`` and ``b`` ``(*batch, b_dim)`` to ``(*batch, out_dim)``.

        Args:
            a: First input.
            b: Second input; leading dimensions broadcast against those of ``a``.
        """
        # The layer for both is applied in two parts, so that the smaller batch is never copied.
        return self.both(self.b(b), self.a(a))


class PairEncoder(nn.Module):
    r"""Location and scale of a latent given data and another latent, :math:`q(z_1 \mid x, z_2)`.

    Args:
        x_shape: Shape of one datum.
        given_dim: Size of the latent that is given.
        z_dim: Size of z.
        hidden: Width of the hidden layers.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Gated hidden layers and He initialisation, as in :class:`~pvae.nn.MLP`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        given_dim: int,
        z_dim: int,
        hidden: int = 300,
        activation: str = "relu",
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.x_shape = check_sizes("x_shape", x_shape)
        self.given_dim = check_size("given_dim", given_dim)
        self.z_dim = check_size("z_dim", z_dim)
        self.net = PairMLP(math.prod(self.x_shape), given_dim, 2 * z_dim, hidden, activation, gated)

    def forward(self, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` ``(*batch, *x_shape)`` and ``given`` ``(*batch, given_dim)`` to ``loc`` and ``scale``.

        Args:
            x: Data.
            given: The other latent; leading dimensions broadcast against those of ``x``.

        Returns:
            Each ``(*batch, z_dim)``; the log-variance lies within :data:`pvae.nn.LOG_VAR_RANGE`.

        Raises:
            ValueError: If an input has another event shape.
        """
        check_event("x", x, self.x_shape)
        check_event("given", given, (self.given_dim,))
        loc, log_var = self.net(x.flatten(x.ndim - len(self.x_shape)), given).chunk(2, dim=-1)
        return loc, torch.exp(0.5 * soft_clamp(log_var, *LOG_VAR_RANGE))


class PairDecoder(nn.Module):
    r"""Parameters of :math:`p(x \mid z_1, z_2)`, without an output activation.

    Args:
        z_dims: Sizes of :math:`z_1` and :math:`z_2`.
        out_shape: Shape of what the likelihood needs, ``likelihood.param_shape(x_shape)``.
        hidden: Width of the hidden layers.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Gated hidden layers and He initialisation, as in :class:`~pvae.nn.MLP`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.
    """

    def __init__(
        self,
        z_dims: Sequence[int],
        out_shape: Sequence[int],
        hidden: int = 300,
        activation: str = "relu",
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.z_dims = check_sizes("z_dims", z_dims, length=2)
        self.out_shape = check_sizes("out_shape", out_shape)
        z_1, z_2 = self.z_dims
        self.net = PairMLP(z_1, z_2, math.prod(self.out_shape), hidden, activation, gated)

    def forward(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        """Map latents ``(*batch, z_dim)``, whose leading dimensions broadcast, to ``(*batch, *out_shape)``.

        Raises:
            ValueError: If a latent has another size.
        """
        check_event("z_1", z_1, self.z_dims[:1])
        check_event("z_2", z_2, self.z_dims[1:])
        return self.net(z_1, z_2).unflatten(-1, self.out_shape)
