r"""The loss of a free-form injective flow as a distribution (Sorrenson et al. 2023, arXiv:2306.01843)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .jacobian_normal import JacobianNormal, half_log_det

__all__ = ["FreeFormNormal"]


class FreeFormNormal(JacobianNormal):
    r"""The normal of :class:`JacobianNormal` that in training gives its mean instead of a draw.

    Where gradients are taken, :meth:`rsample` returns :math:`f(x)` and :meth:`score_parts` holds

    .. math:: -\left( \tfrac d2 \log 2 \pi + \tfrac12 \log\det J S^2 J^\top \right)

    with the surrogate for the log-determinant, value included, so that an "ELBO" becomes the loss of a
    free-form injective flow with a learnable noise,

    .. math:: L = -\log p(x \mid z = f(x)) - \log p(f(x)) - \tfrac d2 \log 2\pi - \tfrac12 \log\det J S^2
    J^\top

    the Laplace approximation of :math:`-\log p(x)` for noise small against :math:`g'`. **It is no bound**,
    and its figures are not comparable with those of one: only an evaluation, which uses :meth:`exact` or
    :meth:`laplace`, is. Without gradients draws follow the density. Arguments are those of
    :class:`JacobianNormal`.

    Attributes:
        training_density: ``"free-form"``: not a density at all; importance-weighted objectives refuse it.
    """

    training_density = "free-form"

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return f(x) where gradients are taken, a draw elsewhere.

        Shape ``(*sample_shape, *batch_shape, z_dim)``.
        """
        if not torch.is_grad_enabled():
            return super().rsample(sample_shape)
        shape = self._extended_shape(torch.Size(sample_shape))
        if self.logdet == "exact":
            loc, rows = self._jacobian()
            volume = half_log_det(rows)
        else:
            # One data probe, or no draw beside the latent ones.
            on_data = self.probe == "data"
            loc, _, volume = self._probed(self._noise_for(self.x.shape[: -self._data_dims])[: int(on_data)])
            volume = volume.squeeze(0) if on_data else volume
        value = loc.expand(shape).clone()
        self._remember(value, -(0.5 * shape[-1] * math.log(2 * math.pi) + volume).expand(shape[:-1]))
        return value
