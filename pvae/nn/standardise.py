"""Change of the units of an autoencoder's code, folded into the weights on both sides."""

from typing import Protocol

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .leading import check_event

__all__ = ["standardise_"]


class _Decoder(Protocol):
    """What of a decoder is needed: the linear layer that reads z."""

    z_dim: int

    @property
    def input_layer(self) -> nn.Linear: ...


@torch.no_grad()
def standardise_(encoder: Encoder, decoder: _Decoder, loc: Tensor, scale: Tensor) -> None:
    r"""Make the code :math:`(a - m) / s` out of the code :math:`a`, in place; reconstructions stay as they
    are.

    An autoencoder's code is known up to such a map: the decoder undoes it. Only the head of the encoder and
    the first layer of the decoder change,
    :math:`W_e \leftarrow W_e / s,\; b_e \leftarrow (b_e - m) / s` and
    :math:`b_d \leftarrow b_d + W_d m,\; W_d \leftarrow W_d \,\mathrm{diag}\, s`.

    Args:
        encoder: Its location is the code; its scales are left as they are.
        decoder: A decoder with an ``input_layer``.
        loc: :math:`m`, shape ``(z_dim,)``.
        scale: :math:`s`, positive, shape ``(z_dim,)``.

    Raises:
        ValueError: If the shapes do not fit, or a scale is not positive.
    """
    z_dim = encoder.z_dim
    check_event("loc", loc, (z_dim,))
    check_event("scale", scale, (z_dim,))
    if not bool((scale > 0).all()):
        raise ValueError(f"scale must be positive, got {scale.min().item():g}")
    head, first = encoder.head, decoder.input_layer
    head.bias[:z_dim] = (head.bias[:z_dim] - loc) / scale
    head.weight[:z_dim] /= scale.unsqueeze(-1)
    first.bias.add_(first.weight[:, :z_dim] @ loc)
    first.weight[:, :z_dim] *= scale
