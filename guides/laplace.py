r"""Guide with Laplace's covariance, in Gauss-Newton form (Sorrenson et al. 2025, arXiv:2506.01522v1)."""

from itertools import chain
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor, nn

from pvae.distributions import laplace_normal, variance_of
from pvae.nn import LabelSpace

from .flow import FlowGuide
from .tied import TiedGuide

__all__ = ["LaplaceGuide", "laplace_proposal"]

# Draws for the scale of a prior without a variance, and labels for one that depends on attributes.
_DRAWS = 4096
_LABELS = 64


class LaplaceGuide(TiedGuide):
    r"""A normal around the encoder's location with the covariance that decoder, noise and prior imply there.

    .. math:: q(z \mid x) = \mathcal N(z \mid f(x), \Sigma_L), \qquad
              \Sigma_L = \left(\mathrm{diag}\,\tau^{-2} + g'(f(x))^\top g'(f(x)) / \sigma^2\right)^{-1}

    It has no covariance parameters either, and unlike :class:`FiveGuide` it can represent a latent that the
    decoder ignores, whose posterior is the prior. Density and gradient are exact, through both networks; the
    price is a decoder Jacobian of ``z_dim`` forward-mode passes in every step. With a linear decoder and a
    normal prior its optimum is probabilistic PCA.

    Args:
        encoder: As in :class:`FiveGuide`.
        decoder: The model's decoder, held and not owned. Gradients are taken of its derivative: its layers
            must allow that as the encoder's must.
        likelihood: The model's likelihood, ``Normal`` (any sigma) or, experimentally, ``Bernoulli``.
        prior_scale: Standard deviation :math:`\tau` of z under the prior, positive, a number or ``(z_dim,)``.
        trained: Whether gradients will be taken; ``False`` for a proposal in an evaluation, where a decoder
            with LayerNorm is right too.

    Raises:
        TypeError: For another likelihood.
        ValueError: If ``prior_scale`` is not positive, or a network has derivatives that are wrong or
            missing.
    """

    proposal_name: ClassVar[str] = "laplace"
    prior_scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        *,
        prior_scale: float | Tensor = 1.0,
        trained: bool = True,
    ) -> None:
        super().__init__(
            encoder, decoder, likelihood, differentiate_encoder=False, differentiate_decoder=trained
        )
        scale = torch.as_tensor(prior_scale)
        if scale.shape not in ((), (self.z_dim,)) or not bool((scale > 0).all()):
            raise ValueError(
                f"prior_scale must be positive, a number or of shape ({self.z_dim},), got {prior_scale}"
            )
        weight = next(encoder.parameters(), torch.zeros(()))
        self.register_buffer("prior_scale", scale.to(weight), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x, y))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> MultivariateNormal:
        """Return :math:`q(z | x)` for ``x`` ``(B, *x_shape)``, outside of any program."""
        return laplace_normal(
            self.location(x, y), lambda z: self.reconstruction(z, y), self.noise(x, y), self.prior_scale
        )


def laplace_proposal(
    model: nn.Module, guide: nn.Module, prior_scale: float | Tensor | None = None
) -> LaplaceGuide:
    r"""Return Laplace's normal around the location of another guide, for an evaluation to draw from.

    The importance-weighted likelihood is a bound under any proposal, so that the higher one counts. Where the
    guide's own covariance is too narrow (:class:`FiveGuide`), this one can be tens of nats higher; where the
    location is far from the mode, or the posterior no normal, the guide's own may be::

        pvae.log_likelihood(model, guide, x)
        pvae.log_likelihood(model, laplace_proposal(model, guide), x)

    Args:
        model: The model, with ``prior``, ``decoder`` and ``likelihood``.
        guide: A guide whose ``encoder`` gives the location of z: :class:`NormalGuide`,
            :class:`FullCovarianceGuide`, :class:`FiveGuide`, :class:`LaplaceGuide`, or one's own.
        prior_scale: Standard deviation of z under the prior, a number or ``(z_dim,)``. By default that of the
            model's prior as it is now, in each dimension: its own where it has a finite one, else that of
            about 4,096 draws. Under a prior that depends on y it is the root mean square over all classes
            (over draws of attributes), so that it depends on no datum.

    Returns:
        The guide program. It shares the networks and is for evaluation: no gradient of the decoder's
        derivative is promised.

    Raises:
        TypeError: If ``model`` or ``guide`` has no such parts, the guide is a flow, whose location is not the
            encoder's, or the likelihood is another one.
        ValueError: If a network has derivatives that are wrong or missing, or the scale of the prior cannot
            be found.
    """
    encoder = getattr(guide, "encoder", None)
    if not isinstance(encoder, nn.Module) or isinstance(guide, FlowGuide):
        raise TypeError(
            "guide must have an encoder that gives the location of z, such as NormalGuide, "
            f"got {type(guide).__name__}"
        )
    decoder, likelihood = getattr(model, "decoder", None), getattr(model, "likelihood", None)
    if not isinstance(decoder, nn.Module) or not isinstance(likelihood, nn.Module):
        raise TypeError(
            f"model must have a decoder and a likelihood, such as VAE, got {type(model).__name__}"
        )
    scale = _scale_of_prior(model) if prior_scale is None else prior_scale
    return LaplaceGuide(encoder, decoder, likelihood, prior_scale=scale, trained=False)


@torch.no_grad()
def _scale_of_prior(model: Any) -> Tensor:
    """Standard deviation of z under the model's prior, ``(z_dim,)``; generators are left as they were."""
    prior = getattr(model, "prior", None)
    if not isinstance(prior, nn.Module):
        raise TypeError(f"model must have a prior, or prior_scale be given, got {type(model).__name__}")
    devices = {tensor.device for tensor in chain(prior.parameters(), prior.buffers())}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        torch.manual_seed(0)
        variance = variance_of(_prior_of(prior, model), _DRAWS)
    scale = variance.reshape(-1, variance.shape[-1]).mean(0).sqrt()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"the prior must have a finite positive scale, or prior_scale be given, got {scale}")
    return scale


def _prior_of(prior: Any, model: Any) -> TorchDistribution:
    """The prior, under all labels where it depends on them."""
    if not (getattr(model, "conditional", False) and getattr(prior, "conditional", True)):
        return prior()
    space = getattr(getattr(prior, "labels", None), "space", None)
    if not isinstance(space, LabelSpace):
        raise ValueError(
            f"prior must have an embedding of its labels, or prior_scale be given, got {type(prior).__name__}"
        )
    device = next(prior.parameters()).device
    if space.kind == "class":
        return prior(torch.arange(space.size, device=device))
    return prior(torch.randint(2, (_LABELS, space.size), device=device).to(torch.get_default_dtype()))
