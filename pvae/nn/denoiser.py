r"""Denoisers of a diffusion over small images: a residual MLP, and a U-Net at one resolution (after Dhariwal
and Nichol 2021, arXiv:2105.05233).
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .leading import check_event, check_size, check_sizes, flatten_leading

__all__ = ["MLPDenoiser", "UNetDenoiser"]

_Layer = TypeVar("_Layer", bound=nn.Module)

_FREQUENCIES = 16
_MOST_GROUPS = 16


class MLPDenoiser(nn.Module):
    r"""Residual MLP over the flattened y, its layers scaled and shifted as the noise level says.

    It starts at zero: with v-prediction, as the optimal denoiser of standard normal data.

    Args:
        u_shape: Shape of one datum, any number of dimensions.
        hidden: Width.
        blocks: Residual blocks of two layers each.
        dropout: Probability that a unit in a block is dropped in training.
        gamma_range: Noise levels that the time features resolve; see :class:`_NoiseLevel`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, ``dropout`` is no probability below one, or ``gamma_range``
            does not increase.

    Example:
        >>> MLPDenoiser((1, 7, 7))(torch.randn(50, 128, 1, 7, 7), torch.zeros(50, 1)).shape
        torch.Size([50, 128, 1, 7, 7])
    """

    def __init__(
        self,
        u_shape: Sequence[int],
        hidden: int = 192,
        blocks: int = 2,
        dropout: float = 0.0,
        gamma_range: tuple[float, float] = (-10.0, 10.0),
    ) -> None:
        super().__init__()
        self.u_shape = check_sizes("u_shape", u_shape)
        size = math.prod(self.u_shape)
        check_size("hidden", hidden), check_size("blocks", blocks)
        self.level = _NoiseLevel(hidden, gamma_range)
        self.first = nn.Linear(size, hidden)
        self.blocks = nn.ModuleList(_LinearBlock(hidden, _probability(dropout)) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.out = _zeroed(nn.Linear(hidden, size))

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        r"""Predict from a noisy datum.

        Args:
            y: Shape ``(*batch, *u_shape)``.
            gamma: Minus the logarithm of the signal-to-noise ratio; its shape broadcasts against ``batch``,
                and what is computed of it alone is computed once.

        Returns:
            The prediction (of the noise, or of v), shape ``(*batch, *u_shape)``.

        Raises:
            ValueError: If y has another event shape.
        """
        check_event("y", y, self.u_shape)
        level = self.level(gamma)
        h = self.first(y.flatten(-len(self.u_shape)))
        for block in self.blocks:
            h = block(h, level)
        return self.out(F.silu(self.norm(h))).unflatten(-1, self.u_shape)


class UNetDenoiser(nn.Module):
    r"""U-Net at one resolution: residual blocks, self-attention in the middle, the way back with skips.

    ``channels=16, blocks=2`` is the denoiser of DVP-VAE on MNIST, ``channels=32, blocks=3`` that on OMNIGLOT
    (``dropout=0.05``) and CIFAR10, but for the time features, which there hardly told the time.

    Args:
        u_shape: ``(C, height, width)`` of one datum.
        channels: Width.
        blocks: Residual blocks on the way down, and as many on the way up.
        dropout: Probability that a unit in a block is dropped in training.
        gamma_range: Noise levels that the time features resolve; see :class:`_NoiseLevel`.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, ``u_shape`` has not three entries, ``dropout`` is no
            probability below one, or ``gamma_range`` does not increase.

    Example:
        >>> UNetDenoiser((1, 7, 7))(torch.randn(50, 8, 1, 7, 7), torch.zeros(50, 1)).shape
        torch.Size([50, 8, 1, 7, 7])
    """

    def __init__(
        self,
        u_shape: Sequence[int],
        channels: int = 16,
        blocks: int = 2,
        dropout: float = 0.0,
        gamma_range: tuple[float, float] = (-10.0, 10.0),
    ) -> None:
        super().__init__()
        self.u_shape = check_sizes("u_shape", u_shape, 3)
        check_size("channels", channels), check_size("blocks", blocks)
        level_dim, dropout = 4 * channels, _probability(dropout)
        self.level = _NoiseLevel(level_dim, gamma_range)
        self.first = nn.Conv2d(self.u_shape[0], channels, 3, padding=1)
        self.down = nn.ModuleList(_ConvBlock(channels, channels, level_dim, dropout) for _ in range(blocks))
        self.middle = _ConvBlock(channels, channels, level_dim, dropout)
        self.attention = _Attention(channels)
        self.up = nn.ModuleList(_ConvBlock(2 * channels, channels, level_dim, dropout) for _ in range(blocks))
        self.norm = _group_norm(channels)
        self.out = _zeroed(nn.Conv2d(channels, self.u_shape[0], 3, padding=1))

    def forward(self, y: Tensor, gamma: Tensor) -> Tensor:
        r"""Predict from a noisy datum.

        Args:
            y: Shape ``(*batch, C, height, width)``.
            gamma: Minus the logarithm of the signal-to-noise ratio; its shape broadcasts against ``batch``.

        Returns:
            The prediction (of the noise, or of v), shape of y.

        Raises:
            ValueError: If y has another event shape.
        """
        check_event("y", y, self.u_shape)
        flat, batch = flatten_leading(y, 3)
        level = self.level(gamma)
        level = level.expand(*batch, level.shape[-1]).reshape(len(flat), level.shape[-1])
        h = self.first(flat)
        skips = []
        for block in self.down:
            h = block(h, level)
            skips.append(h)
        h = self.attention(self.middle(h, level))
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), level)
        return self.out(F.silu(self.norm(h))).reshape(y.shape)


class _NoiseLevel(nn.Module):
    r"""Embedding of :math:`\gamma` by :math:`[\tau, \sin \pi n \tau, \cos \pi n \tau]`, :math:`n = 1..16`.

    :math:`\tau` runs from 0 to 1 over ``gamma_range`` and on beyond it. A function of :math:`\gamma` and not
    of the time, so that the denoiser stays right where the ends of the schedule are learned.
    """

    frequencies: Tensor

    def __init__(self, dim: int, gamma_range: tuple[float, float]) -> None:
        super().__init__()
        if not gamma_range[0] < gamma_range[1]:
            raise ValueError(f"gamma_range must increase, got {gamma_range}")
        self.gamma_range = gamma_range
        frequencies = math.pi * torch.arange(1, _FREQUENCIES + 1)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(2 * _FREQUENCIES + 1, dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, gamma: Tensor) -> Tensor:
        """Embed ``(*batch)`` as ``(*batch, dim)``, activated."""
        low, high = self.gamma_range
        tau = ((gamma - low) / (high - low)).unsqueeze(-1)
        angle = tau * self.frequencies
        features = torch.cat([tau, angle.sin(), angle.cos()], -1)
        return F.silu(self.second(F.silu(self.first(features))))


class _LinearBlock(nn.Module):
    """Two layers beside a skip connection; starts as the identity."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.level = nn.Linear(dim, 2 * dim)
        self.first = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.second = _zeroed(nn.Linear(dim, dim))

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level).chunk(2, -1)
        inside = self.first(F.silu(self.norm(h) * (1 + scale) + shift))
        return h + self.second(self.dropout(F.silu(inside)))


class _ConvBlock(nn.Module):
    """Two convolutions beside a skip connection, their noise level between them; starts as the skip."""

    def __init__(self, in_channels: int, channels: int, level_dim: int, dropout: float) -> None:
        super().__init__()
        self.first_norm = _group_norm(in_channels)
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.level = nn.Linear(level_dim, 2 * channels)
        self.second_norm = _group_norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.second = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[..., None, None].chunk(2, 1)
        inside = self.first(F.silu(self.first_norm(h)))
        inside = F.silu(self.second_norm(inside) * (1 + scale) + shift)
        return self.skip(h) + self.second(self.dropout(inside))


class _Attention(nn.Module):
    """Self-attention with one head over the positions, beside a skip connection; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(h)).flatten(2).mT.chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return h + self.out(mixed.mT.reshape(h.shape))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(_MOST_GROUPS, channels), channels)


def _zeroed(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _probability(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    return dropout
