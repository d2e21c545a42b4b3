r"""VAE under a prior from the codes of a pretrained autoencoder (X-VAE 2026, arXiv:2607.01275v1)."""

import copy
from typing import Literal, Self

import pyro
import torch
from torch import Tensor, nn

from pvae.priors import CodePrior

from .vae import VAE

__all__ = ["XVAE"]


class XVAE(VAE):
    r"""A VAE whose prior is fitted to codes and stays fixed.

    .. math:: p(x, z) = p_{\mathrm{codes}}(z) \, p(x \mid z)

    A single Gaussian prior is absorbed by the affine layers that end the encoder and begin the decoder: it
    has the model class, the optimum and the samples of the standard VAE. Mixtures, a warm start or a frozen
    decoder are where codes can matter.

    Args:
        prior: Prior of the codes.
        decoder: Maps ``(*batch, z_dim)`` to ``(*batch, *likelihood.param_shape(x_shape))``.
        likelihood: Maps the decoder's output to a distribution with ``event_shape x_shape``.
        code_encoder: The autoencoder's encoder, of which a constant copy is held: its location is the code
            of x. Needed in training by a prior that is paired with x, and by a comparison of latents with
            codes.

    Raises:
        ValueError: If prior and decoder disagree about ``z_dim``, or a paired prior has no encoder of codes.
    """

    prior: CodePrior

    def __init__(
        self,
        prior: CodePrior,
        decoder: nn.Module,
        likelihood: nn.Module,
        code_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__(prior, decoder, likelihood)
        if prior.needs_code and code_encoder is None:
            raise ValueError("code_encoder must be given: this prior is paired with the code of x")
        self.code_encoder = None if code_encoder is None else _constant(code_encoder)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but never that of the autoencoder."""
        super().train(mode)
        if self.code_encoder is not None:
            self.code_encoder.eval()
        return self

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program on ``x``, shape ``(B, *x_shape)``.

        A paired prior is that of the datum's own code in training, and the mixture over codes in evaluation.
        """
        paired = self.training and self.prior.needs_code
        prior = self.prior(code=self.code(x)) if paired else self.prior()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior)
            return pyro.sample("x", self.observation(self.decoder(z), x), obs=x)

    @torch.no_grad()
    def code(self, x: Tensor) -> Tensor:
        """Return the autoencoder's code of ``x``, shape ``(B, z_dim)``.

        Raises:
            ValueError: If the model holds no encoder of codes.
        """
        if self.code_encoder is None:
            raise ValueError("this model holds no encoder of codes")
        loc: Tensor = self.code_encoder(x)[0]
        return loc

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        mean: bool = False,
        scale: float = 1.0,
        scale_mode: Literal["within", "global"] = "within",
    ) -> Tensor:
        """Draw from the model, or nearer to or farther from the centre of its prior.

        Args:
            n: Number of draws, positive.
            y: Not used; the prior is unconditional.
            mean: Return the mean of :math:`p(x | z)` instead of a draw from it.
            scale: Factor on the standard deviation of z, at least 0. 1 is the model; below, samples are less
                diverse; above, they leave what was fitted. No part of training or of any likelihood.
            scale_mode: ``"within"`` scales the components of a mixture, ``"global"`` the whole about its
                mean.

        Returns:
            Shape ``(n, *x_shape)``, in the units of ``x``.

        Raises:
            ValueError: If ``n`` is not positive, ``scale`` is negative, or ``scale_mode`` is another word.
        """
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        x = self.decode(self.prior.scaled(scale, scale_mode).sample((n,)))
        return x.mean if mean else x.sample()


def _constant(network: nn.Module) -> nn.Module:
    """Copy a network with buffers for parameters, where no optimiser and no param store finds them."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
    return network.eval()
