r"""Conditional variational autoencoder (Sohn, Lee & Yan 2015) with any conditional prior, such as the flow
prior of CVAE-NF (arXiv:2511.08946v3).
"""

from itertools import chain
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.nn import LabelEmbedding

from .vae import VAE, draw_latents

__all__ = ["ConditionalVAE"]


class ConditionalVAE(VAE):
    r"""A latent vector and a datum given a label, which is conditioned on and never modelled.

    .. math:: p(x, z \mid y) = p(z \mid y) \, p(x \mid z, y)

    Where the decoder sees y and is flexible, :math:`p(z)` in place of :math:`p(z \mid y)` is no restriction:
    with a flow f of the prior, the model is that of the prior's base and the decoder after :math:`f^{-1}`.

    Args:
        prior: Called with ``y``, or with nothing if its ``conditional`` is false; returns :math:`p(z \mid
            y)` with ``event_shape (z_dim,)``.
        decoder: Called with ``z`` ``(*batch, z_dim)`` and ``y``; one without labels passes y over.
        likelihood: Maps the decoder's output to a distribution with ``event_shape x_shape``.

    Raises:
        ValueError: If prior and decoder disagree about ``z_dim``.

    Example:
        >>> from pvae.likelihoods import Normal
        >>> from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder
        >>> from pvae.priors import StandardNormal
        >>> labels = LabelEmbedding(LabelSpace("class", 10))
        >>> model = ConditionalVAE(StandardNormal(2), MLPDecoder(2, (1, 8, 8), labels=labels), Normal())
        >>> model.sample(10, torch.arange(10)).shape
        torch.Size([10, 1, 8, 8])
    """

    conditional = True

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program.

        Args:
            x: Data, shape ``(B, *x_shape)``.
            y: Class numbers ``(B,)`` or attributes ``(B, L)``.

        Raises:
            ValueError: If ``y`` is missing.
        """
        y = _given(y)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.latent(y))
            return pyro.sample("x", self.observation(self.decoder(z, y), x), obs=x)

    def latent(self, y: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(z | y)`, with ``batch_shape`` ``(B,)``, or ``()`` where it does not depend on y."""
        return self.prior(y) if getattr(self.prior, "conditional", True) else self.prior()

    def decode(self, z: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(x | z, y)` for ``z`` ``(*batch, z_dim)`` and labels that broadcast against it."""
        return self.likelihood(self.decoder(z, _given(y)))

    def check_labels(self, y: Tensor) -> None:
        """Refuse labels that the embeddings do not know. Synchronises: for the doors, not for the loop.

        Args:
            y: Class numbers ``(B,)`` or attributes ``(B, L)``.

        Raises:
            TypeError: If classes come as floats.
            ValueError: If labels have another shape, or one is out of range.
        """
        for space in {module.space for module in self.modules() if isinstance(module, LabelEmbedding)}:
            wanted = "(B,)" if space.kind == "class" else f"(B, {space.size})"
            if y.ndim != (1 if space.kind == "class" else 2):
                raise ValueError(f"y must have shape {wanted}, got {tuple(y.shape)}")
            space.check(y)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        mean: bool = False,
        sampling: Literal["exact", "paper"] = "exact",
    ) -> Tensor:
        """Draw from the model given labels.

        Args:
            n: Number of draws, positive.
            y: Labels on any device, one row for each draw, or one row for all.
            mean: Return the mean of :math:`p(x | z, y)` instead of a draw from it.
            sampling: ``"exact"``: z from the prior. ``"paper"``: z from the base of a flow prior without the
                way back through the flow, as in the released code of arXiv:2511.08946; those are no draws
                from the model. A prior without a flow has no difference.

        Returns:
            Shape ``(n, *x_shape)``, in the units of ``x``.

        Raises:
            TypeError: If classes come as floats.
            ValueError: If ``n`` is not positive, labels are missing, out of range, or neither one nor ``n``
                rows, or ``sampling`` is another word.
        """
        if sampling not in ("exact", "paper"):
            raise ValueError(f"sampling must be 'exact' or 'paper', got {sampling!r}")
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        y = _given(y)
        self.check_labels(y)
        y = y.to(next((t.device for t in chain(self.parameters(), self.buffers())), y.device))
        if len(y) == 1:
            y = y.expand(n, *y.shape[1:])
        if len(y) != n:
            raise ValueError(f"y must have one row, or one for each of the {n} draws, got {len(y)}")
        base: nn.Module | None = getattr(self.prior, "base", None)
        prior = base(y) if sampling == "paper" and base is not None else self.latent(y)
        x = self.decode(draw_latents(prior, n), y)
        return x.mean if mean else x.sample()


def _given(y: Tensor | None) -> Tensor:
    if y is None:
        raise ValueError("y must be given: this model is conditional")
    return y
