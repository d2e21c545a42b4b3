r"""Two-level hierarchical VAE (Tomczak & Welling 2018, arXiv:1705.07120v5, sec. 4)."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.likelihoods import Likelihood
from pvae.nn import PairDecoder

from .vae import draw_latents

__all__ = ["HVAE"]


class HVAE(nn.Module):
    r"""Two latent vectors, the upper one under any prior.

    .. math:: p(x, z_1, z_2) = p(z_2) \, p(z_1 \mid z_2) \, p(x \mid z_1, z_2)

    With a :class:`pvae.priors.VampPrior` of the guide's upper encoder this is the paper's two-level model.

    Args:
        prior: Called without arguments, returns :math:`p(z_2)` with ``event_shape (z_2_dim,)``.
        conditional_prior: Maps ``z_2`` ``(*batch, z_2_dim)`` to ``loc`` and ``scale`` of :math:`p(z_1 \mid
            z_2)`, such as an :class:`pvae.nn.MLPEncoder` of data of shape ``(z_2_dim,)``.
        decoder: Maps ``(z_1, z_2)`` to ``(*batch, *likelihood.param_shape(x_shape))``.
        likelihood: Maps the decoder's output to a distribution with ``event_shape x_shape``.

    Raises:
        ValueError: If the parts disagree about the size of a latent.
    """

    conditional = False

    def __init__(
        self, prior: nn.Module, conditional_prior: nn.Module, decoder: PairDecoder, likelihood: nn.Module
    ) -> None:
        super().__init__()
        ours = (getattr(conditional_prior, "z_dim", None), getattr(prior, "z_dim", None))
        for site, mine, theirs in zip(("z_1", "z_2"), ours, decoder.z_dims, strict=True):
            if mine is not None and mine != theirs:
                raise ValueError(
                    f"prior and decoder must have the same size of {site}, got {mine} and {theirs}"
                )
        if isinstance(likelihood, Likelihood):
            likelihood.event_dim = len(decoder.out_shape)
        self.prior = prior
        self.conditional_prior = conditional_prior
        self.decoder = decoder
        self.likelihood = likelihood

    @property
    def z_dim(self) -> int:
        """Number of latent numbers of a datum, both levels together."""
        return sum(self.decoder.z_dims)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program on ``x``, shape ``(B, *x_shape)``; ``y`` is passed over."""
        with pyro.plate("data", len(x), dim=-1):
            z_2 = pyro.sample("z_2", self.prior())
            z_1 = pyro.sample("z_1", self.below(z_2))
            return pyro.sample("x", self.observation(self.decoder(z_1, z_2), x), obs=x)

    def below(self, z_2: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(z_1 | z_2)` for ``z_2`` of shape ``(*batch, z_2_dim)``."""
        loc, scale = self.conditional_prior(z_2)
        return dist.Normal(loc, scale).to_event(1)

    def decode(self, z_1: Tensor, z_2: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(x | z_1, z_2)` for latents whose leading dimensions broadcast."""
        return self.likelihood(self.decoder(z_1, z_2))

    def observation(self, params: Tensor, x: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(x | z_1, z_2)` from the decoder's output; a profiled likelihood sees ``x``."""
        if getattr(self.likelihood, "profiled", False):
            return self.likelihood(params, x)
        return self.likelihood(params)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draw from the model.

        Args:
            n: Number of draws, positive.
            y: Not used; the model is unconditional.
            mean: Return the mean of :math:`p(x | z_1, z_2)` instead of a draw from it.

        Returns:
            Shape ``(n, *x_shape)``, in the units of ``x``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        z_2 = draw_latents(self.prior(), n)
        x = self.decode(self.below(z_2).sample(), z_2)
        return x.mean if mean else x.sample()
