"""Fully connected network."""

from collections.abc import Sequence

from torch import Tensor, nn

from .activation import activation_layer
from .gated import GatedLinear, he_normal_
from .leading import check_event, check_size, check_sizes

__all__ = ["MLP", "hidden_layers"]


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

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, in_dim)`` to ``(*batch, out_dim)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``in_dim``.
        """
        check_event("x", x, (self.in_dim,))
        return self.out(self.hidden(x))


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
