r"""Networks that work in standardised coordinates of z, whatever its scale (X-VAE, arXiv:2607.01275v1)."""

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .labels import LabelEmbedding
from .leading import check_event, check_size

__all__ = ["WhitenedDecoder", "WhitenedEncoder"]


class WhitenedEncoder(Encoder):
    r"""An encoder whose output is read in units of a fixed location and scale.

    .. math:: \mu = m + s \odot \alpha, \qquad \sigma = s \odot \beta

    for the wrapped encoder's :math:`(\alpha, \beta)`. A prior :math:`\mathcal N(m, \mathrm{diag}\, s^2)` with
    this encoder and a :class:`WhitenedDecoder` is the standard normal prior with the wrapped networks, step
    for step.

    Args:
        encoder: The encoder.

    Attributes:
        loc: :math:`m`, shape ``(z_dim,)``, zero until :meth:`set_`.
        scale: :math:`s`, shape ``(z_dim,)``, one until :meth:`set_`.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, encoder: Encoder) -> None:
        nn.Module.__init__(self)  # its head is the wrapped encoder's
        self.x_shape, self.z_dim, self.h_dim = encoder.x_shape, encoder.z_dim, encoder.h_dim
        self.encoder = encoder
        _add_coordinates(self, encoder.z_dim)

    @property
    def labels(self) -> LabelEmbedding | None:  # type: ignore[override]  # the wrapped encoder's, not a second one
        """The wrapped encoder's embedding of labels."""
        return self.encoder.labels

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        """The wrapped encoder's head, in whitened units."""
        return self.encoder.head

    def set_(self, loc: Tensor, scale: Tensor) -> None:
        """Set :math:`m` and :math:`s`, each ``(z_dim,)``."""
        _set_coordinates(self, loc, scale)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the wrapped encoder's features, shape ``(*batch, h_dim)``."""
        return self.encoder.features(x, y)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Map features ``(*batch, h_dim)`` to ``loc`` and ``scale`` in the units of z."""
        loc, scale = self.encoder.heads(h)
        return self.loc + self.scale * loc, self.scale * scale

    def location(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the location in the units of z, shape ``(*batch, z_dim)``."""
        return self.loc + self.scale * self.encoder.location(x, y)


class WhitenedDecoder(nn.Module):
    r"""A decoder that reads :math:`(z - m) / s`.

    Args:
        decoder: The decoder, called with the standardised z, and labels if it sees them.

    Attributes:
        loc: :math:`m`, shape ``(z_dim,)``, zero until :meth:`set_`.
        scale: :math:`s`, shape ``(z_dim,)``, one until :meth:`set_`.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.z_dim = check_size("z_dim", decoder.z_dim)  # type: ignore[arg-type]  # a decoder has one
        self.out_shape = decoder.out_shape
        self.decoder = decoder
        _add_coordinates(self, self.z_dim)

    def set_(self, loc: Tensor, scale: Tensor) -> None:
        """Set :math:`m` and :math:`s`, each ``(z_dim,)``."""
        _set_coordinates(self, loc, scale)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``z`` ``(*batch, z_dim)`` to ``(*batch, *out_shape)``."""
        white = (z - self.loc) / self.scale
        return self.decoder(white) if y is None else self.decoder(white, y)


def _add_coordinates(module: nn.Module, z_dim: int) -> None:
    module.register_buffer("loc", torch.zeros(z_dim))
    module.register_buffer("scale", torch.ones(z_dim))


def _set_coordinates(module: WhitenedEncoder | WhitenedDecoder, loc: Tensor, scale: Tensor) -> None:
    check_event("loc", loc, (module.z_dim,))
    check_event("scale", scale, (module.z_dim,))
    if not bool((scale > 0).all()):
        raise ValueError(f"scale must be positive, got {scale.min().item():g}")
    module.loc.copy_(loc)
    module.scale.copy_(scale)
