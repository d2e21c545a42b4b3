"""Residual block of the ladder's networks (Kuzina & Tomczak 2024, arXiv:2412.01373v1, and its code)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activation import activation_layer
from .leading import flatten_leading

__all__ = ["LOG_VARIANCES", "LadderBlock", "over_images", "pointwise", "scales_of"]

#: Range that the ladder's log-variances are clamped to, of priors and posteriors alike.
LOG_VARIANCES = (-10.0, 1.0)


class LadderBlock(nn.Module):
    r"""Bottleneck of 1x1, 3x3, 3x3 and 1x1 convolutions with activations between them, beside a skip.

    .. math:: \mathrm{block}(x) = \mathrm{skip}(x) + c_4(a(c_3(a(c_2(a(c_1(x)))))))

    The skip is the identity, or a 1x1 convolution where the number of channels changes.

    Args:
        in_channels: Channels of the input.
        hidden: Channels inside.
        out_channels: Channels of the output.
        activate_input: Whether the input, too, passes an activation before the first convolution (on the
            way up), or not (on the way down).
        gain: Factor on the last convolution's weights at the start; 0 sets its bias to zero too, so that the
            block starts as its skip.
        activation: One of relu, tanh, silu, elu, gelu, softplus.

    Raises:
        ValueError: If ``activation`` is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        activate_input: bool = False,
        gain: float = 1.0,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        last = nn.Conv2d(hidden, out_channels, 1)
        with torch.no_grad():
            last.weight *= gain
            if gain == 0:
                last.bias.zero_()  # type: ignore[union-attr]
        self.net = nn.Sequential(
            *([activation_layer(activation)] if activate_input else []),
            nn.Conv2d(in_channels, hidden, 1),
            activation_layer(activation),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            activation_layer(activation),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            activation_layer(activation),
            last,
        )
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(n, in_channels, H, W)`` to ``(n, out_channels, H, W)``."""
        return self.skip(x) + self.net(x)


def over_images(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a map of images with one batch dimension to ``x`` ``(*batch, C, H, W)``, for any ``batch``.

    On a CPU channels are put side by side in memory: 1x1 convolutions of few channels then take a third of
    the time. What comes out keeps that order, so that hardly anything is moved after the first map.
    """
    flat, batch = flatten_leading(x, event_dim=3)
    if flat.is_cpu:
        flat = flat.contiguous(memory_format=torch.channels_last)
    out = net(flat)
    return out.reshape(*batch, *out.shape[1:])


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to ``x`` ``(*batch, C, H, W)``, for any ``batch``, as a product of matrices.

    For one to three channels, those of a latent, that takes a quarter of a convolution's time on a CPU.
    """
    return F.linear(x.movedim(-3, -1), conv.weight.flatten(1), conv.bias).movedim(-1, -3)


def scales_of(log_var: Tensor) -> Tensor:
    """Standard deviations of log-variances clamped to :data:`LOG_VARIANCES`, shape of ``log_var``."""
    return torch.exp(0.5 * log_var.clamp(*LOG_VARIANCES))
