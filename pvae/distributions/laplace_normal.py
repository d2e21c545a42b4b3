r"""Laplace's approximation of a posterior around a given point, in its Gauss-Newton form (FIVE,
arXiv:2506.01522v1).
"""

from collections.abc import Callable

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pvae.ops import has_float64, inverse_tril, jacobian_columns

__all__ = ["laplace_normal"]


def laplace_normal(
    loc: Tensor,
    decoder: Callable[[Tensor], Tensor],
    noise: Tensor,
    prior_scale: float | Tensor = 1.0,
    validate_args: bool | None = None,
) -> MultivariateNormal:
    r"""Normal around ``loc`` with the covariance that decoder, noise and prior imply there.

    .. math:: \Sigma_L = \left( \mathrm{diag}\, \tau^{-2}
              + g'(\mu)^\top \, \mathrm{diag}\, s^{-2} \, g'(\mu) \right)^{-1}

    the inverse of the Hessian of :math:`-\log p(x, z)` at :math:`\mu` without the term in :math:`g''`: the
    exact posterior covariance where g is linear and the prior normal, and never broader than the prior. The
    decoder's Jacobian takes ``z_dim`` passes in forward mode; gradients reach ``loc``, decoder and noise.

    Args:
        loc: :math:`\mu`, shape ``(*batch, z_dim)``.
        decoder: :math:`g`, maps ``(*batch, z_dim)`` to the mean of x, shape ``(*batch, *x_shape)``, and
            treats leading dimensions one by one.
        noise: Standard deviation :math:`s` of x given z, positive, in a shape that broadcasts against the
            decoder's output.
        prior_scale: Standard deviation :math:`\tau` of z under the prior, positive, shape ``()`` or
            ``(z_dim,)``. For a prior that is not normal a number of that size still gives a good proposal.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Returns:
        The normal, ``batch_shape (*batch)`` and ``event_shape (z_dim,)``.
    """
    _, columns = jacobian_columns(decoder, loc)
    weighted = (columns / noise.unsqueeze(-1)).flatten(loc.ndim - 1, -2)
    scale = torch.as_tensor(prior_scale, dtype=loc.dtype, device=loc.device)
    if has_float64(loc.device):
        # In single precision the product would swallow the prior where the decoder is steep.
        weighted, scale = weighted.double(), scale.double()
    prior = torch.diag_embed(scale.square().reciprocal().expand(loc.shape[-1:]))
    tril = inverse_tril(prior + weighted.mT @ weighted).to(loc.dtype)
    return MultivariateNormal(loc, scale_tril=tril, validate_args=validate_args)
