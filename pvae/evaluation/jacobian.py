r"""Whether a covariance implied by an encoder's Jacobian can be believed (FIVE, arXiv:2506.01522v1)."""

import math
import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.distributions import FreeFormNormal, JacobianNormal
from pvae.inference.isolation import device_of, evaluating
from pvae.ops import gram_tril, has_float64, inverse_tril, jacobian_columns, jacobian_rows

__all__ = ["LIMITS", "JacobianReport", "jacobian_posterior", "jacobian_report"]

LIMITS = MappingProxyType({"health": 0.8, "inconsistency": 0.3, "residual": 2.0})
"""Where a figure of :class:`JacobianReport` becomes a problem: ``health`` below, the others above."""

# A latent whose posterior variance is nearly the prior's tells nothing about x.
_COLLAPSED = 0.9

# Draws that the surrogate's value is the mean of, and data in one pass of them; the same draws every time.
_DRAWS = 256
_SEED = 20_250_602


@dataclass(frozen=True)
class JacobianReport:
    r"""Encoder against decoder at some data: Jacobians J and G, and Laplace's covariance :math:`\Sigma_L`.

    J, G and :math:`\Sigma_L` are those of z in units of the prior's standard deviation, S is the noise of x.

    Attributes:
        health: :math:`\mathrm{tr}(J G) / d`, mean over the data: what the surrogate's probes estimate. One
            minus the mean posterior variance for an encoder that finds the mode.
        half_log_det: :math:`\frac12 \log\det J S^2 J^\top`, mean over the data, nats, z in its own units:
            the exact value of what the surrogate stands for.
        half_log_det_surrogate: What the training loss has in its place, mean over at least 256 draws, nats.
            The loss is too low by the difference, which grows as q is less isotropic. That of a free-form
            flow is no log-determinant in value at all.
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
    half_log_det_surrogate: float
    inconsistency: float
    residual: float
    active: int
    z_dim: int
    num_data: int

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence with its figure for each supposition of the posterior that does not hold."""
        found = []
        if not self.health > LIMITS["health"]:
            found.append(
                f"tr(J G) / d is {self.health:.2f} < {LIMITS['health']}: the surrogate's gradient is biased "
                "and the covariance too narrow in latents that the data leave open; use the Laplace proposal "
                "too"
            )
        if not self.inconsistency < LIMITS["inconsistency"]:
            found.append(
                f"J G differs from I - Sigma_L by {self.inconsistency:.2f} > {LIMITS['inconsistency']}: "
                "the encoder does not invert the decoder there; train longer or with more probes"
            )
        if not self.residual < LIMITS["residual"]:
            found.append(
                f"squared residuals are {self.residual:.2f} > {LIMITS['residual']} times the noise variance: "
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
            f"residual {self.residual:.2f}, "
            f"half log det {self.half_log_det:.2f} (in the loss {self.half_log_det_surrogate:.2f}), "
            f"{self.active} of {self.z_dim} latents active"
        )


def jacobian_report(
    guide: Any,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_data: int = 64,
    prior_scale: float | Tensor = 1.0,
    warn: bool = True,
) -> JacobianReport:
    """Compare the Jacobians of encoder and decoder at the first data; cheap enough for every epoch.

    One full Jacobian of each network per datum, in evaluation mode; the guide and all random generators are
    left as they were.

    Args:
        guide: A guide with a method ``posterior`` that returns a :class:`pvae.distributions.JacobianNormal`,
            such as :class:`pvae.guides.FiveGuide`.
        x: Data, shape ``(N, *x_shape)``, or a split.
        y: Labels, first dimension ``N``.
        num_data: How many data to look at.
        prior_scale: Standard deviation of z under the prior, positive, a number or ``(z_dim,)``.
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
        x = x[:num_data]
        y = x.y if y is None else y
        x = x.x
    device = device_of(guide)
    x = x[:num_data].to(device)
    y = None if y is None else y[:num_data].to(device)
    with evaluating(guide):
        report = _report(guide, x, y, prior_scale)
    if warn:
        for problem in report.problems:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return report


def jacobian_posterior(guide: Any, x: Tensor, y: Tensor | None = None) -> JacobianNormal:
    """Return the posterior of a guide whose covariance is the encoder's.

    Raises:
        TypeError: If it has none.
    """
    make = getattr(guide, "posterior", None)
    q = None if make is None else make(x, y)
    if not isinstance(q, JacobianNormal):
        raise TypeError(
            "guide must have a method posterior(x, y) that returns a JacobianNormal, "
            f"got {type(guide).__name__}"
        )
    return q


def _report(guide: Any, x: Tensor, y: Tensor | None, prior_scale: float | Tensor) -> JacobianReport:
    q = jacobian_posterior(guide, x, y)
    d = q.event_shape[0]
    scale = torch.as_tensor(prior_scale, dtype=x.dtype, device=x.device).expand(d)
    loc, rows = jacobian_rows(q.encoder, x, d)
    reconstruction, columns = jacobian_columns(q.decoder, loc)
    noise = q.noise.expand(x.shape)
    columns = columns.flatten(1, -2) * scale
    product = (rows.flatten(2) / scale.unsqueeze(-1)) @ columns
    weighted = (rows * noise.unsqueeze(1)).flatten(2)
    covariance = _laplace(columns / noise.flatten(1).unsqueeze(-1))
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    half_log_det = float(gram_tril(weighted).diagonal(dim1=-2, dim2=-1).log().sum(-1).mean())
    return JacobianReport(
        health=float(product.diagonal(dim1=-2, dim2=-1).mean()),
        half_log_det=half_log_det,
        half_log_det_surrogate=half_log_det if q.logdet == "exact" else _in_the_loss(guide, x, y),
        inconsistency=float((product - (eye - covariance)).square().sum((-2, -1)).sqrt().mean() / d**0.5),
        residual=float(((x - reconstruction) / noise).square().mean()),
        active=_active(covariance.mean(0)),
        z_dim=d,
        num_data=len(x),
    )


def _laplace(steepness: Tensor) -> Tensor:
    """Sigma_L, z in units of the prior, from the decoder's Jacobian in units of the noise, ``(B, x_dim, d)``.

    A posterior's own :meth:`laplace` would take that Jacobian once more.
    """
    # In single precision the product would swallow the prior where the decoder is steep.
    steep = steepness.double() if has_float64(steepness.device) else steepness
    eye = torch.eye(steep.shape[-1], dtype=steep.dtype, device=steep.device)
    tril = inverse_tril(eye + steep.mT @ steep)
    return (tril @ tril.mT).to(steepness.dtype)


def _in_the_loss(guide: Any, x: Tensor, y: Tensor | None) -> float:
    """What a training step would report for half the log-determinant, mean over draws and data."""
    torch.manual_seed(_SEED)
    index = torch.arange(len(x), device=x.device).repeat(-(-_DRAWS // len(x)))
    total = 0.0
    for part in index.split(_DRAWS):
        with torch.enable_grad():  # a surrogate is there where gradients are taken
            q = jacobian_posterior(guide, x[part], None if y is None else y[part])
            log_q = q.score_parts(q.rsample()).log_prob
        total -= float(log_q.detach().double().sum())
    # A free-form flow counts the density at the mean, the other the mean of the density.
    constant = math.log(2 * math.pi) + (0 if isinstance(q, FreeFormNormal) else 1)
    return total / len(index) - 0.5 * q.event_shape[0] * constant


def _active(covariance: Tensor) -> int:
    """Number of directions that the data tell about; none where the covariance is not finite."""
    if not bool(covariance.isfinite().all()):
        return 0
    return int((torch.linalg.eigvalsh(covariance.cpu().double()) < _COLLAPSED).sum())
