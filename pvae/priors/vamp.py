r"""Mixture-of-posteriors prior (Tomczak & Welling 2018, arXiv:1705.07120v5, sec. 3)."""

from collections.abc import Callable

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.distributions import NormalMixture

__all__ = ["VampPrior"]


class VampPrior(nn.Module):
    r"""Uniform mixture of the guide at :math:`K` learned pseudoinputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid u_k)

    Gradients reach the encoder and the pseudoinputs jointly, as in the authors' code.

    Args:
        encoder: Maps ``(K, *x_shape)`` to ``(loc, scale)``, each ``(K, z_dim)``: the guide's own encoder.
        u: Initial pseudoinputs, shape ``(K, *x_shape)``, in the units of ``x``.
        bounds: Range that the pseudoinputs are clipped to, as the data are; ``None`` for no clipping.

    Raises:
        ValueError: If ``u`` is not a batch of data, is not finite, or lies outside ``bounds`` (where its
            gradient would be zero for ever).
    """

    conditional = False

    def __init__(
        self,
        encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
        u: Tensor,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if u.ndim < 2 or len(u) < 1:
            raise ValueError(f"u must have shape (K, *x_shape), got {tuple(u.shape)}")
        if not u.isfinite().all():
            raise ValueError("u must be finite, got NaN or infinite pseudoinputs")
        if bounds is not None and not ((u >= bounds[0]) & (u <= bounds[1])).all():
            raise ValueError(
                f"u must lie in bounds {bounds}, got values in [{u.min().item():.3g}, {u.max().item():.3g}]"
            )
        # Held in a tuple, as the guide owns the encoder: registered here too, its weights
        # would stand in Pyro's param store under two names.
        self._encoder = (encoder,)
        self.bounds = bounds
        self.u = nn.Parameter(u.detach().clone())

    @property
    def z_dim(self) -> int:
        """Number of latent dimensions, as the encoder has it."""
        return int(self._encoder[0].z_dim)  # type: ignore[attr-defined]

    @property
    def pseudoinputs(self) -> Tensor:
        """The pseudoinputs within their bounds, shape ``(K, *x_shape)``."""
        return self.u if self.bounds is None else F.hardtanh(self.u, *self.bounds)

    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(z)`, with ``batch_shape ()`` and ``event_shape (z_dim,)``.

        Raises:
            ValueError: If ``y`` is given: this prior is unconditional.
        """
        if y is not None:
            raise ValueError("VampPrior is unconditional: y must be None")
        loc, scale = self._encoder[0](self.pseudoinputs)
        return NormalMixture(loc.new_zeros(len(loc)), loc, scale)
