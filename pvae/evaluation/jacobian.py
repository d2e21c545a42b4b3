r"""Whether a covariance implied by an encoder's Jacobian can be believed (FIVE, arXiv:2506.01522v1)."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.distributions import JacobianNormal
from pvae.inference.isolation import device_of, evaluating
from pvae.ops import gram_tril, jacobian_columns, jacobian_rows

__all__ = ["JacobianReport", "jacobian_report"]

# A latent whose posterior variance is nearly the prior's tells nothing about x.
_COLLAPSED = 0.9
_LEAST_HEALTH = 0.8
_MOST_INCONSISTENT = 0.3
_MOST_RESIDUAL = 2.0


@dataclass(frozen=True)
class JacobianReport:
    r"""Encoder against decoder at some data: Jacobians J and G, and Laplace's covariance :math:`\Sigma_L`.

    Attributes:
        health: :math:`\mathrm{tr}(J G) / d`, mean over the data: what the surrogate's probes estimate. One
            minus the mean posterior variance for an encoder that finds the mode.
        half_log_det: :math:`\frac12 \log\det J S^2 J^\top`, mean over the data, nats: the exact value of what
            the surrogate stands for.
        inconsistency: :math:`\| J G - (I - \Sigma_L) \|_F / \sqrt d`, mean over the data: zero for a linear
            encoder at the mode.
        residual: Mean of :math:`((x - g(f(x))) / s)^2` over numbers of x: about ``1 - z_dim / x_dim`` where
            the noise is that of the data around the decoder's image.
        active: Number of eigenvalues of the mean of :math:`\Sigma_L` below 0.9.
        z_dim: Number of latents.
        num_data: Number of data looked at.
    """

    health: float
    half_log_det: float
    inconsistency: float
    residual: float
    active: int
    z_dim: int
    num_data: int

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence with its figure for each supposition of the posterior that does not hold."""
        found = []
        if not self.health > _LEAST_HEALTH:
            found.append(
                f"tr(J G) / d is {self.health:.2f} < {_LEAST_HEALTH}: the surrogate's gradient is biased and "
                "the covariance too narrow in latents that the data leave open; use the Laplace proposal too"
            )
        if not self.inconsistency < _MOST_INCONSISTENT:
            found.append(
                f"J G differs from I - Sigma_L by {self.inconsistency:.2f} > {_MOST_INCONSISTENT}: "
                "the encoder does not invert the decoder there; train longer or with more probes"
            )
        if not self.residual < _MOST_RESIDUAL:
            found.append(
                f"squared residuals are {self.residual:.2f} > {_MOST_RESIDUAL} times the noise variance: "
                "f(x) is not the mode of the posterior"
            )
        if self.active < self.z_dim:
            found.append(
                f"{self.z_dim - self.active} of {self.z_dim} latents are not active (eigenvalue of Sigma_L "
                f"above {_COLLAPSED}): no such posterior is possible; use a smaller z_dim or LaplaceGuide"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and sentences that JSON can hold."""
        return {**vars(self), "problems": list(self.problems)}

    def __str__(self) -> str:
        return (
            f"tr(J G)/d {self.health:.3f}, |J G - (I - Sigma_L)| {self.inconsistency:.3f}, "
            f"residual {self.residual:.2f}, log det {self.half_log_det:.2f}, "
            f"{self.active} of {self.z_dim} latents active"
        )


def jacobian_report(
    guide: Any,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_data: int = 64,
    warn: bool = True,
) -> JacobianReport:
    """Compare the Jacobians of encoder and decoder at the first data; cheap enough for every epoch.

    One full Jacobian of each network per datum, in evaluation mode; the guide is left as it was.

    Args:
        guide: A guide with a method ``posterior`` that returns a :class:`pvae.distributions.JacobianNormal`,
            such as :class:`pvae.guides.FiveGuide`.
        x: Data, shape ``(N, *x_shape)``, or a split.
        y: Labels, first dimension ``N``.
        num_data: How many data to look at.
        warn: Whether to give a warning for each problem found.

    Returns:
        The figures.

    Raises:
        TypeError: If the guide has no such posterior.
        ValueError: If ``num_data`` is not positive.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be positive, got {num_data}")
    if isinstance(x, Split):
        y = x.y if y is None else y
        x = x.x
    device = device_of(guide)
    x = x[:num_data].to(device)
    y = None if y is None else y[:num_data].to(device)
    with evaluating(guide):
        make = getattr(guide, "posterior", None)
        q = None if make is None else make(x, y)
        if not isinstance(q, JacobianNormal):
            raise TypeError(
                "guide must have a method posterior(x, y) that returns a JacobianNormal, "
                f"got {type(guide).__name__}"
            )
        report = _report(q, x)
    if warn:
        for problem in report.problems:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return report


def _report(q: JacobianNormal, x: Tensor) -> JacobianReport:
    d = q.event_shape[0]
    loc, rows = jacobian_rows(q.encoder, x, d)
    reconstruction, columns = jacobian_columns(q.decoder, loc)
    noise = q.noise.expand(x.shape)
    product = rows.flatten(2) @ columns.flatten(1, -2)
    weighted = (rows * noise.unsqueeze(1)).flatten(2)
    covariance = q.laplace().covariance_matrix
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    return JacobianReport(
        health=float(product.diagonal(dim1=-2, dim2=-1).mean()),
        half_log_det=float(gram_tril(weighted).diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()),
        inconsistency=float((product - (eye - covariance)).square().sum((-2, -1)).sqrt().mean() / d**0.5),
        residual=float(((x - reconstruction) / noise).square().mean()),
        active=int((torch.linalg.eigvalsh(covariance.mean(0).cpu().double()) < _COLLAPSED).sum()),
        z_dim=d,
        num_data=len(x),
    )
