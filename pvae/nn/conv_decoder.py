"""Convolutional decoder."""

from collections.abc import Sequence

from torch import Tensor, nn

from .activation import activation_layer
from .conv_encoder import group_norm, halved
from .labels import LabelEmbedding, embedded
from .leading import check_event, check_size, check_sizes, flatten_leading
from .mlp import through

__all__ = ["ConvDecoder"]


class ConvDecoder(nn.Module):
    """Decoder to images: the mirror of :class:`~pvae.nn.ConvEncoder`, without an output activation.

    Transposed 3x3 convolutions with stride 2 go back through the exact sizes that halving ``(H, W)`` gives:
    22x22, 43x43, 86x86. (They cost 0.6 times what nearest-neighbour upsampling before a 3x3
    convolution does.) A last 3x3 convolution smooths what the stride leaves uneven.

    Args:
        z_dim: Size of z.
        out_shape: Shape ``(C_out, H, W)`` of what the likelihood needs, ``likelihood.param_shape(x_shape)``.
        channels: Channels from the smallest planes to the largest, each at least 2.
        h_dim: Width of the first, fully connected layer.
        activation: One of relu, tanh, silu, elu, gelu, softplus.
        labels: Embedding of labels that the first layer sees beside z; ``None`` for z alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If ``out_shape`` is no image shape, a size is not positive, ``channels`` is empty or holds
            a 1, or ``activation`` is unknown.
    """

    def __init__(
        self,
        z_dim: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        h_dim: int = 256,
        activation: str = "silu",
        labels: LabelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.z_dim = check_size("z_dim", z_dim)
        self.out_shape = check_sizes("out_shape", out_shape, length=3)
        widths = check_sizes("channels", channels)
        if not widths:
            raise ValueError("channels must hold at least one size, got ()")
        sizes = [self.out_shape[1:]]  # from the largest planes to the smallest
        for _ in widths:
            sizes.append((halved(sizes[-1][0]), halved(sizes[-1][1])))
        self._first = (widths[0], *sizes.pop())
        planes, height, width = self._first
        self.labels = labels
        in_dim = self.z_dim + (0 if labels is None else labels.dim)
        self.expand = nn.Sequential(
            nn.Linear(in_dim, check_size("h_dim", h_dim)),
            activation_layer(activation),
            nn.Linear(h_dim, planes * height * width),
        )
        layers: list[nn.Module] = [group_norm(planes), activation_layer(activation)]
        for out in (*widths[1:], widths[-1]):
            # From n to 2 n - 1 by itself; one more row where the size to reach is even.
            target = sizes.pop()
            padding = (1 - target[0] % 2, 1 - target[1] % 2)
            layers += [
                nn.ConvTranspose2d(planes, out, 3, stride=2, padding=1, output_padding=padding),
                group_norm(out),
                activation_layer(activation),
            ]
            planes = out
        self.conv = nn.Sequential(*layers, nn.Conv2d(planes, self.out_shape[0], 3, padding=1))

    @property
    def input_layer(self) -> nn.Linear:
        """The linear layer that reads z, in its first ``z_dim`` columns."""
        layer = self.expand[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``z`` ``(*batch, z_dim)``, and the labels if it sees them, to ``(*batch, C_out, H, W)``.

        Raises:
            ValueError: If the last dimension of ``z`` is not ``z_dim``, or labels are missing.
        """
        check_event("z", z, (self.z_dim,))
        context = None if self.labels is None else embedded(self.labels, y, "ConvDecoder")
        flat, batch = flatten_leading(through(self.expand, z, context), event_dim=1)
        planes = flat.unflatten(-1, self._first)
        return self.conv(planes).reshape(*batch, *self.out_shape)
