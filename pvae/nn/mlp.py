"""Fully connected network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activation import activation_layer
from .gated import GatedLinear, he_normal_
from .leading import check_event, check_size, check_sizes

__all__ = ["MLP", "affine", "hidden_layers", "through"]


class MLP(nn.Module):
    r"""Fully connected network with a linear last layer.

    Args:
        in_dim: Size of the input.
        out_dim: Size of the output.
        hidden: Widths of the hidden layers; empty for a linear map.
        activation: One of relu, tanh, silu, elu, gelu, softplus. Not used if ``gated``.
        gated: Hidden layers are :math:`(W x) \odot \sigma(V x)` with no other activation, and every weight
            starts at N(0, 2 / fan_in), the last layer's too, as in the VampPrior's code.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, or ``activation`` is unknown.

    Example:
        >>> MLP(784, 40, hidden=(300, 300), gated=True)(torch.rand(50, 128, 784)).shape
        torch.Size([50, 128, 40])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim = check_size("in_dim", in_dim)
        self.out_dim = check_size("out_dim", out_dim)
        self.hidden = hidden_layers(self.in_dim, hidden, activation, gated)
        self.out = nn.Linear([self.in_dim, *hidden][-1], self.out_dim)
        if gated:
            he_normal_(self.out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(*batch, in_dim)`` to ``(*batch, out_dim)``.

        Args:
            x: Input, or its first part.
            context: The rest of the input, whose leading dimensions broadcast against those of ``x``.

        Raises:
            ValueError: If the last dimension of ``x``, with that of ``context``, is not ``in_dim``.
        """
        check_event("x", x, (self.in_dim - (0 if context is None else context.shape[-1]),))
        if not len(self.hidden):
            return affine(self.out, x, context)
        return self.out(through(self.hidden, x, context))


def hidden_layers(in_dim: int, hidden: Sequence[int], activation: str, gated: bool) -> nn.Sequential:
    """Return the hidden layers alone, each one activated; arguments as in :class:`MLP`."""
    layers: list[nn.Module] = []
    for width in check_sizes("hidden", hidden):
        if gated:
            layers.append(GatedLinear(in_dim, width))
        else:
            layers += [nn.Linear(in_dim, width), activation_layer(activation)]
        in_dim = width
    return nn.Sequential(*layers)


def through(layers: nn.Sequential, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Send ``x`` through hidden layers whose first one sees ``context`` beside it.

    The same as concatenation, whose copy of the context for each particle is not made: the first layer's
    product is taken in two parts, and the part of the context is small.

    Args:
        layers: What :func:`hidden_layers` returned for ``in_dim + context_dim`` inputs, or layers like it.
        x: Shape ``(*batch, in_dim)``.
        context: Shape ``(*batch, context_dim)``; leading dimensions broadcast against those of ``x``.

    Returns:
        Shape ``(*batch, out_dim)``.
    """
    if context is None:
        return layers(x)
    if not len(layers):
        batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        return torch.cat([t.expand(*batch, t.shape[-1]) for t in (x, context)], dim=-1)
    first, rest = layers[0], layers[1:]
    if isinstance(first, GatedLinear):
        return rest(first.gate(affine(first.linear, x, context)))
    assert isinstance(first, nn.Linear)
    return rest(affine(first, x, context))


def affine(linear: nn.Linear, x: Tensor, context: Tensor | None) -> Tensor:
    """Apply ``linear`` to ``x`` and ``context`` side by side, without putting them there."""
    if context is None:
        return linear(x)
    weight, in_dim = linear.weight, x.shape[-1]
    return F.linear(x, weight[:, :in_dim]) + F.linear(context, weight[:, in_dim:], linear.bias)
