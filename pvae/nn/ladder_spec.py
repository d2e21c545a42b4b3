"""The shapes of a ladder of latents, which its two networks share."""

import itertools
from dataclasses import dataclass
from functools import cached_property

from .leading import check_size, check_sizes

__all__ = ["LadderSpec"]


@dataclass(frozen=True)
class LadderSpec:
    r"""How many latents there are, on which planes, and how wide the networks around them.

    Latents :math:`z_L, \ldots, z_1` are planes of numbers, ``(z_channels, side, side)``; :math:`z_L` is the
    topmost and lies on the coarsest plane. "Layer" counts them from the top: layer 0 is :math:`z_L`.

    Args:
        x_shape: Shape ``(C, H, H)`` of one image.
        scales: Pairs ``(side, number of latents)`` from fine to coarse. Every side divides the one before,
            and the first divides H.
        channels: Channels of the feature planes.
        z_channels: Channels of a latent; by default those of x.
        bottleneck: Channels inside a residual block, as a share of ``channels``.
        centre: What both networks subtract from images, of data and of pseudoinputs.
        spread: What they divide by then. With the defaults, [0, 1] becomes [-1, 1].

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive, an image is not square, a side does not divide the one before,
            the bottleneck leaves no channel, or ``spread`` is not positive.

    Example:
        >>> spec = LadderSpec((1, 28, 28), scales=((14, 2), (7, 2)))
        >>> spec.names, spec.z_dim
        (('z_4', 'z_3', 'z_2', 'z_1'), 490)
    """

    x_shape: tuple[int, ...]
    scales: tuple[tuple[int, ...], ...] = ((14, 2), (7, 2))
    channels: int = 32
    z_channels: int | None = None
    bottleneck: float = 1.0
    centre: float = 0.5
    spread: float = 0.5

    def __post_init__(self) -> None:
        x_shape = check_sizes("x_shape", self.x_shape, length=3)
        if x_shape[1] != x_shape[2]:
            raise ValueError(f"x_shape must be that of a square image, got {x_shape}")
        if not self.scales:
            raise ValueError("scales must hold at least one pair (side, number of latents), got none")
        scales = tuple(check_sizes("a scale", scale, length=2) for scale in self.scales)
        sides = [x_shape[1], *(side for side, _ in scales)]
        for i, (above, side) in enumerate(itertools.pairwise(sides)):
            if above % side or (i and above == side):
                raise ValueError(
                    f"scales must have sides that divide {sides[0]} and one another, from fine to coarse, "
                    f"got {side} after {above}"
                )
        check_size("channels", self.channels)
        if self.z_channels is not None:
            check_size("z_channels", self.z_channels)
        if not self.bottleneck > 0 or self.hidden < 1:
            raise ValueError(
                f"bottleneck must leave at least one of {self.channels} channels, got {self.bottleneck}"
            )
        if not self.spread > 0:
            raise ValueError(f"spread must be positive, got {self.spread}")
        # Lists, such as a recipe has, would make two equal ladders differ.
        object.__setattr__(self, "x_shape", x_shape)
        object.__setattr__(self, "scales", scales)

    @property
    def num_latents(self) -> int:
        """Number of latents L."""
        return sum(number for _, number in self.scales)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sites of the latents from the top, ``z_L`` to ``z_1``."""
        return tuple(f"z_{number}" for number in range(self.num_latents, 0, -1))

    @cached_property
    def scale_of(self) -> tuple[int, ...]:
        """Position in ``scales`` of each layer, from the top."""
        return tuple(i for i in reversed(range(len(self.scales))) for _ in range(self.scales[i][1]))

    @property
    def z_width(self) -> int:
        """Channels of a latent."""
        return self.x_shape[0] if self.z_channels is None else self.z_channels

    @property
    def z_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape ``(z_channels, side, side)`` of each latent, from the top."""
        sides = [self.scales[i][0] for i in self.scale_of]
        return {name: (self.z_width, side, side) for name, side in zip(self.names, sides, strict=True)}

    @property
    def z_dim(self) -> int:
        """Number of latent numbers of a datum, all latents together."""
        return sum(width * height * side for width, height, side in self.z_shapes.values())

    @property
    def hidden(self) -> int:
        """Channels inside a residual block."""
        return int(self.channels * self.bottleneck)
