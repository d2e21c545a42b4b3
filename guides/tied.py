r"""What guides share whose covariance comes from the model's derivatives (FIVE, arXiv:2506.01522v1)."""

from typing import Any

import torch
from torch import Tensor, nn

from pvae.likelihoods import Bernoulli, Normal
from pvae.nn import Encoder, LabelEmbedding, check_forward_mode

from .normal import takes_labels

__all__ = ["TiedGuide"]

# Least variance of a pixel of a Bernoulli likelihood: a saturated one would have none, and infinite
# precision.
_LEAST_VARIANCE = 0.01


class TiedGuide(nn.Module):
    r"""Base class of guides made of an encoder's location, a decoder and the noise of a likelihood.

    Decoder and likelihood are the model's. They are held, not owned: the parameters of this guide are those
    of the encoder alone. The rows of an encoder's head that give scales are not used; their gradient is zero,
    and an optimiser without weight decay leaves them where they are.

    The noise is the standard deviation of x given z:

    - ``Normal`` with sigma "fixed", "learned" or "frozen": sigma, with its gradient where it is learned (with
      sigma in the posterior too, it is pulled by ``x_dim - z_dim`` nats per unit of log sigma, not by
      ``x_dim``).
    - ``Normal`` with sigma "batch": in training the likelihood fits sigma to each batch *after* z is drawn.
      The posterior takes the running average of the batches before, held constant, and in an evaluation the
      measured sigma: a bound at every moment, in which the sigma of the posterior is not optimised.
    - ``Bernoulli``, experimental (no part of the paper): :math:`\sqrt{\max(p (1 - p), 0.01)}` at
      :math:`p = \mathrm{sigmoid}(\eta(f(x)))`, held constant; g is the mean p, not the logits.
      For linear logits :math:`J V J^\top = H^{-1} - H^{-2}` as for a normal; the encoder's derivatives
      between binary x are not tied down by any datum.

    Args:
        encoder: A :class:`pvae.nn.Encoder`, whose location is f, or any module that maps x, and labels if it
            has an argument ``y``, to z or to a tuple that begins with z.
        decoder: The model's decoder.
        likelihood: The model's likelihood, ``Normal`` or ``Bernoulli``.
        differentiate_encoder: Whether the encoder's derivative is used, with its gradient.
        differentiate_decoder: Whether gradients are taken of the decoder's derivative.

    Attributes:
        shares_parameters: True: the density depends on the model's parameters. The objective "dreg", which
            holds the parameters of the guide constant, refuses such a guide.
        keeps_float32: True: where the networks are trained in bfloat16, they are not inside this guide, whose
            products of Jacobians need all digits.

    Raises:
        TypeError: If the likelihood is another one.
        ValueError: If a network has a layer whose derivatives are wrong or missing (named), encoder and
            decoder disagree about ``z_dim``, or neither has one.
    """

    shares_parameters = True
    keeps_float32 = True

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        *,
        differentiate_encoder: bool,
        differentiate_decoder: bool,
    ) -> None:
        super().__init__()
        if not isinstance(likelihood, Normal | Bernoulli):
            raise TypeError(
                "likelihood must be Normal, or Bernoulli as an approximation, since the posterior is made of "
                f"its noise around the mean of x, got {type(likelihood).__name__}"
            )
        sizes = [size for size in (getattr(net, "z_dim", None) for net in (encoder, decoder)) if size]
        if not sizes or len(set(sizes)) > 1:
            raise ValueError(f"encoder and decoder must have the same z_dim, got {sizes or 'none'}")
        self.encoder = encoder
        # Held in a tuple, as the model owns them: registered here too, they would have two names.
        self._model = (decoder, likelihood)
        self._sees_y = (takes_labels(encoder), takes_labels(decoder))
        self.z_dim: int = sizes[0]
        if differentiate_encoder:
            self._check_encoder()
        labels = getattr(decoder, "labels", None)
        if getattr(decoder, "z_dim", None):
            y = _labels_for(labels)
            check_forward_mode(
                "decoder", decoder, lambda z: self.reconstruction(z, y), (self.z_dim,), differentiate_decoder
            )
        else:
            check_forward_mode("decoder", decoder, reverse=differentiate_decoder)

    def _check_encoder(self) -> None:
        if isinstance(self.encoder, Encoder):
            y = _labels_for(self.encoder.labels)
            check_forward_mode("encoder", self.encoder, lambda x: self.location(x, y), self.encoder.x_shape)
        else:
            check_forward_mode("encoder", self.encoder)

    def location(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """f(x): map data ``(*batch, *x_shape)`` and labels to ``(*batch, z_dim)``."""
        if isinstance(self.encoder, Encoder):
            return self.encoder.location(x, y)
        out: Any = self.encoder(x, y) if y is not None and self._sees_y[0] else self.encoder(x)
        return out[0] if isinstance(out, tuple) else out

    def reconstruction(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """g(z): the mean of x for latents ``(*batch, z_dim)`` and labels, ``(*batch, *x_shape)``."""
        decoder, likelihood = self._model
        params: Tensor = decoder(z, y) if y is not None and self._sees_y[1] else decoder(z)
        return params.sigmoid() if isinstance(likelihood, Bernoulli) else params

    def noise(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Standard deviation of x given z, in a shape that broadcasts against ``x`` ``(B, *x_shape)``."""
        _, likelihood = self._model
        if isinstance(likelihood, Bernoulli):
            with torch.no_grad():
                p = self.reconstruction(self.location(x, y), y)
                return (p * (1 - p)).clamp(min=_LEAST_VARIANCE).sqrt()
        sigma: Tensor = likelihood.sigma
        return sigma if sigma.ndim == 0 else sigma.reshape(-1, *(1,) * (x.ndim - 2))


def _labels_for(labels: LabelEmbedding | None) -> Tensor | None:
    """Two labels that an embedding accepts."""
    if labels is None:
        return None
    device = next(labels.parameters()).device
    space = labels.space
    if space.kind == "class":
        return torch.zeros(2, dtype=torch.int64, device=device)
    return torch.zeros(2, space.size, device=device)
