r"""Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114v10; Rezende, Mohamed & Wierstra 2014,
arXiv:1401.4082v3).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.likelihoods import Likelihood

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""One latent vector per datum under any prior, decoder and likelihood.

    .. math:: p(x, z) = p(z) \, p(x \mid z), \qquad p(x \mid z) = p(x \mid \mathrm{decoder}(z))

    Args:
        prior: Called with ``y``, returns :math:`p(z)` with ``event_shape (z_dim,)``.
        decoder: Maps ``(*batch, z_dim)`` to ``(*batch, *likelihood.param_shape(x_shape))``.
        likelihood: Maps the decoder's output to a distribution with ``event_shape x_shape``.

    Raises:
        ValueError: If prior and decoder disagree about ``z_dim``.

    Example:
        >>> from pvae.likelihoods import Bernoulli
        >>> from pvae.nn import MLPDecoder
        >>> from pvae.priors import StandardNormal
        >>> model = VAE(StandardNormal(2), MLPDecoder(2, (1, 8, 8)), Bernoulli())
        >>> model.sample(5).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        ours, theirs = getattr(prior, "z_dim", None), getattr(decoder, "z_dim", None)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"prior and decoder must have the same z_dim, got {ours} and {theirs}")
        out_shape = getattr(decoder, "out_shape", None)
        if isinstance(likelihood, Likelihood) and out_shape is not None:
            # Without it, a likelihood guesses from the number of dimensions it is given.
            likelihood.event_dim = len(out_shape)
        self.prior = prior
        self.decoder = decoder
        self.likelihood = likelihood

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program on ``x``, shape ``(B, *x_shape)``."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(y))
            return pyro.sample("x", self.observation(self.decoder(z), x), obs=x)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(x | z)` for ``z`` of shape ``(*batch, z_dim)``."""
        return self.likelihood(self.decoder(z))

    def observation(self, params: Tensor, x: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(x | z)` from the decoder's output; a profiled likelihood trains with ``x`` too."""
        if getattr(self.likelihood, "profiled", False):
            return self.likelihood(params, x)
        return self.likelihood(params)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draw from the model, without any trace of Pyro.

        Args:
            n: Number of draws, positive.
            y: Context of the prior.
            mean: Return the mean of :math:`p(x | z)` instead of a draw from it (what is usually shown).

        Returns:
            Shape ``(n, *x_shape)``, in the units of ``x``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        z = draw_latents(self.prior(y), n)
        x = self.decode(z)
        return x.mean if mean else x.sample()


def draw_latents(prior: dist.TorchDistribution, n: int) -> Tensor:
    """Draw ``n`` latents from a prior, which may have a batch of ``n``; shape ``(n, z_dim)``.

    Raises:
        ValueError: If ``n`` is not positive, or the prior has another batch.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    if not prior.batch_shape:
        return prior.sample((n,))
    if prior.batch_shape != (n,):
        raise ValueError(f"y must have one row for each of the {n} draws, got {prior.batch_shape[0]}")
    return prior.sample()
