"""Convolutional encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .activation import activation_layer
from .encoder import Encoder
from .labels import LabelEmbedding
from .leading import check_event, check_sizes, flatten_leading

__all__ = ["ConvEncoder", "group_norm", "halved"]


class ConvEncoder(Encoder):
    """Encoder of images by strided 3x3 convolutions with group normalisation.

    Every convolution halves the height and the width, rounding up, so that any image size works: 28x28
    becomes 14x14, then 7x7; 86x86 becomes 43x43, then 22x22.

    Args:
        x_shape: Shape ``(C, H, W)`` of one image.
        z_dim: Size of z.
        channels: Channels of the convolutions, each at least 2.
        h_dim: Size of the features, an activated linear map of the last feature planes.
        activation: One of relu, tanh, silu, elu, gelu, softplus.
        labels: Embedding of labels, which a linear map turns into one more plane of the image
            (arXiv:2511.08946, the author's code); ``None`` for x alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If ``x_shape`` is no image shape, a size is not positive, ``channels`` holds a 1, or
            ``activation`` is unknown.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        z_dim: int,
        channels: Sequence[int] = (32, 64),
        h_dim: int = 256,
        activation: str = "silu",
        labels: LabelEmbedding | None = None,
    ) -> None:
        super().__init__(check_sizes("x_shape", x_shape, length=3), z_dim, h_dim, labels)
        planes, *size = self.x_shape
        self.plane = None if labels is None else nn.Linear(labels.dim, size[0] * size[1])
        planes += self.plane is not None
        layers: list[nn.Module] = []
        for width in check_sizes("channels", channels):
            layers += [
                nn.Conv2d(planes, width, kernel_size=3, stride=2, padding=1),
                group_norm(width),
                activation_layer(activation),
            ]
            planes, size = width, [halved(s) for s in size]
        self.conv = nn.Sequential(*layers)
        self.project = nn.Sequential(
            nn.Flatten(), nn.Linear(planes * size[0] * size[1], self.h_dim), activation_layer(activation)
        )

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(*batch, C, H, W)`` and labels to features ``(*batch, h_dim)``.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``, or labels are missing.
        """
        check_event("x", x, self.x_shape)
        context = self.context(y)
        if context is not None and self.plane is not None:
            plane = self.plane(context).unflatten(-1, (1, *self.x_shape[1:]))
            batch = torch.broadcast_shapes(x.shape[:-3], plane.shape[:-3])
            x = torch.cat([t.expand(*batch, *t.shape[-3:]) for t in (x, plane)], dim=-3)
        flat, batch = flatten_leading(x, event_dim=3)
        return self.project(self.conv(flat)).reshape(*batch, self.h_dim)


def halved(size: int) -> int:
    """Size after a 3x3 convolution with stride 2 and padding 1."""
    return (size + 1) // 2


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation in up to 8 groups of at least two channels.

    A group of one channel would be a single number on a 1x1 plane, and normalise to zero there.

    Raises:
        ValueError: If ``channels`` is 1.
    """
    if channels < 2:
        raise ValueError(f"channels must hold sizes of at least 2, got {channels}")
    groups = max(g for g in range(1, 9) if channels % g == 0 and channels // g >= 2)
    return nn.GroupNorm(groups, channels)
