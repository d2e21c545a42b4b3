r"""Inference network of a ladder of latents (Kuzina & Tomczak 2024, arXiv:2412.01373v1, and its code)."""

import math
from typing import Literal

from torch import Tensor, nn

from .ladder_block import LadderBlock, over_images, scales_of
from .ladder_spec import LadderSpec
from .leading import check_event, check_size

__all__ = ["BottomUp"]


class BottomUp(nn.Module):
    r"""From an image to one map of features for each scale, and from a map to the posterior of a latent.

    .. math:: q(z_l \mid z_{>l}, u, x) = \mathcal N(\mu, \sigma^2), \qquad
              (\mu, \log \sigma^2) = Q_l\left((h_l + e_s(x)) / \sqrt 2\right)

    with the features :math:`e_s` that all latents of a scale share, and the state :math:`h_l` of the way down
    (:class:`pvae.nn.TopDown`), through which alone u and the latents above are seen.

    Args:
        spec: Shapes of the ladder.
        blocks: Residual blocks of each scale.
        stem: ``"full"``: a 1x1 convolution, and the first scale's blocks on the full image, as in the
            authors' code. ``"conv4"``: a 4x4 convolution with stride 2, after which those blocks cost a
            quarter.

    Raises:
        TypeError: If ``blocks`` is not an int.
        ValueError: If ``blocks`` is not positive, ``stem`` is another word, or half the image's height is no
            whole number of sides of the first scale where the stem halves it.
    """

    def __init__(
        self,
        spec: LadderSpec,
        blocks: int = 1,
        stem: Literal["conv4", "full"] = "conv4",
    ) -> None:
        super().__init__()
        if stem not in ("conv4", "full"):
            raise ValueError(f"stem must be 'conv4' or 'full', got {stem!r}")
        check_size("blocks", blocks)
        self.spec = spec
        planes, side = spec.x_shape[0], spec.x_shape[1]
        if stem == "conv4":
            finest = spec.scales[0][0]
            if side % (2 * finest):
                raise ValueError(
                    f"stem 'conv4' halves {side}, which must then be a multiple of the finest side {finest}: "
                    "use stem 'full'"
                )
            self.stem: nn.Module = nn.Conv2d(planes, spec.channels, 4, stride=2, padding=1)
            side //= 2
        else:
            self.stem = nn.Conv2d(planes, spec.channels, 1)
        up: list[nn.Module] = []
        for target, _ in spec.scales:
            layers: list[nn.Module] = [
                LadderBlock(spec.channels, spec.hidden, spec.channels, activate_input=True)
                for _ in range(blocks)
            ]
            if side != target:
                layers.append(nn.AvgPool2d(side // target))
            up.append(nn.Sequential(*layers))
            side = target
        self.up = nn.ModuleList(up)
        # They start as their 1x1 skips, so that posteriors start as linear functions of the features.
        self.posteriors = nn.ModuleList(
            LadderBlock(spec.channels, spec.hidden, 2 * spec.z_width, gain=0.0) for _ in spec.names
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.spec.x_shape

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``x`` ``(*batch, C, H, H)`` to features ``(*batch, channels, side, side)``, fine to coarse.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``.
        """
        check_event("x", x, self.spec.x_shape)
        e = over_images(self.stem, (x - self.spec.centre) / self.spec.spread)
        features = []
        for up in self.up:
            e = over_images(up, e)
            features.append(e)
        return features

    def heads(self, layer: int, h: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``loc`` and ``scale`` of a latent's posterior, each ``(*batch, z_channels, side, side)``.

        Args:
            layer: Which latent, counted from the top.
            h: State of the way down at this layer, before the prior's features are added to it; broadcasts
                against the features.
            features: What :meth:`forward` returned.
        """
        e = features[self.spec.scale_of[layer]]
        out = over_images(self.posteriors[layer], (h + e) / math.sqrt(2.0))
        loc, log_var = out.chunk(2, dim=-3)
        return loc, scales_of(log_var)
