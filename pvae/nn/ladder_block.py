"""Residual block of the ladder's networks (DVP-VAE, arXiv:2412.01373v1, the authors' code)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activation import activation_layer
from .leading import flatten_leading

__all__ = ["LOG_VARIANCES", "LadderBlock", "over_images", "scales_of"]

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
    """Apply a map of images with one batch dimension to ``x`` ``(*batch, C, H, W)``, for any ``batch``."""
    flat, batch = flatten_leading(x, event_dim=3)
    out = net(flat)
    return out.reshape(*batch, *out.shape[1:])


def scales_of(log_var: Tensor) -> Tensor:
    """Standard deviations of log-variances clamped to :data:`LOG_VARIANCES`, shape of ``log_var``."""
    return torch.exp(0.5 * log_var.clamp(*LOG_VARIANCES))
