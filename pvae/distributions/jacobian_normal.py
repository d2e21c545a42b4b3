r"""Normal whose covariance an encoder's Jacobian implies (FIVE, arXiv:2506.01522v1; surrogate after free-form
injective flows, Sorrenson et al. 2023, arXiv:2306.01843).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from pvae.ops import gram_tril, jacobian_rows, pull_back, push_forward

from .laplace_normal import laplace_normal

__all__ = ["Directions", "JacobianNormal", "LogDet", "Probe"]

LogDet = Literal["surrogate", "pinv", "exact"]
Probe = Literal["latent", "data"]
Directions = Literal["sphere", "rademacher", "gaussian"]

_EULER = 0.5772156649015329


class _Draw(NamedTuple):
    """One call of rsample: the tensor returned, and what stands for log q there."""

    value: Tensor
    log_q: Tensor


class JacobianNormal(TorchDistribution):
    r"""Observation noise pushed through the derivative of an encoder.

    .. math:: q(z \mid x) = \mathcal N\left(z \mid f(x),\; f'(x) \, \mathrm{diag}\, s^2 \, f'(x)^\top\right),
              \qquad z = f(x) + f'(x) (s \odot v), \quad v \sim \mathcal N(0, I)

    A draw costs one Jacobian-vector product, and the covariance is not formed. The entropy
    :math:`\frac d2 \log 2 \pi e + \frac12 \log \det J S^2 J^\top` would need it; a training step needs its
    gradient alone, :math:`\mathrm{tr}\, K^+ \partial K` with :math:`K = J S`. The surrogate takes the
    decoder's Jacobian for the pseudo-inverse, which it is where f inverts g on the data and posterior
    variances are small against the prior's,

    .. math:: \partial \, \tfrac12 \log\det J S^2 J^\top \approx \partial \, u^\top f'(x) \,
              \mathrm{SG}[g'(f(x))\, u], \qquad \mathbb E\, u u^\top = I

    with a relative bias of about the posterior variance; its mean over u, divided by ``z_dim``
    (:attr:`health`), tends to one as the bias vanishes.

    - ``log_prob`` is always the exact density, by the full Jacobian: ``z_dim`` passes in reverse mode.
    - :meth:`score_parts`, which an ELBO reads, has the surrogate's gradient for the very tensor that
      :meth:`rsample` returned with gradients on, and the exact density for any other value. The *value*
      reported with the surrogate is no density either: minus the entropy of an isotropic normal whose draws
      have the length of this one, which in expectation is at most log q by the inequality of arithmetic and
      geometric means. What must weigh draws (IWAE, importance sampling) uses ``log_prob`` or :meth:`exact`;
      Pyro's ``RenyiELBO`` reads ``score_parts`` and must not be used with a surrogate.
    - Under ``torch.no_grad()`` there is no surrogate.

    Args:
        encoder: :math:`f`, maps ``(*batch, *x_shape)`` to ``(*batch, z_dim)`` and treats leading dimensions
            one by one. Its layers must let the reverse mode through a forward-mode derivative
            (:func:`pvae.nn.check_forward_mode`).
        decoder: :math:`g`, maps ``(*batch, z_dim)`` to the mean of x, shape ``(*batch, *x_shape)``. No
            gradient reaches it.
        x: Data, shape ``(*batch, *x_shape)``.
        noise: Standard deviation :math:`s` of x given z, positive, in a shape that broadcasts against x;
            gradients reach it.
        z_dim: Size of z, at most that of x.
        data_dims: Number of dimensions of one datum; all of x but the first if ``None``.
        logdet: ``"surrogate"``; ``"pinv"``: the same with :math:`K^+` in the place of the decoder's
            Jacobian, without bias; ``"exact"``: automatic differentiation of the log-determinant. The last
            two cost ``z_dim`` passes for each step, and the last one their memory too.
        probe: ``"latent"``: u as above, one more tangent of the encoder and one of the decoder. ``"data"``:
            the draw's own v in its place, :math:`\mathrm{SG}[g'(f(x))^\top (v / s)]^\top f'(x) (s \odot v)`:
            cheaper by one tangent, twice the noise.
        directions: Latent probes are uniform on the sphere of radius :math:`\sqrt{z_{dim}}` and, where there
            are several, orthogonal; or have entries of :math:`\pm 1`; or are normal.
        num_probes: Latent probes per datum; ``z_dim`` orthogonal ones leave no noise.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Attributes:
        training_density: ``"surrogate"``: an evaluation takes :meth:`exact` instead.
        health: :math:`u^\top f' g' u / z_{dim}` per datum of the last draw with surrogate, shape ``(*batch)``
            of x, without gradient; ``None`` without one. It estimates the mean eigenvalue of :math:`J G`.

    Raises:
        ValueError: For another word, sizes that do not fit, ``logdet`` other than "surrogate" with data
            probes, more orthogonal probes than latents, or several probes where none are drawn.

    Example:
        >>> from pvae.nn import MLPDecoder, MLPEncoder
        >>> encoder, decoder = MLPEncoder((4,), 2, activation="silu"), MLPDecoder(2, (4,))
        >>> q = JacobianNormal(encoder.location, decoder, torch.randn(5, 4), torch.tensor(0.1), z_dim=2)
        >>> q.expand([3, 5]).rsample().shape
        torch.Size([3, 5, 2])
    """

    arg_constraints = {"noise": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True
    training_density = "surrogate"

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        x: Tensor,
        noise: Tensor,
        z_dim: int,
        *,
        data_dims: int | None = None,
        logdet: LogDet = "surrogate",
        probe: Probe = "latent",
        directions: Directions = "sphere",
        num_probes: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        check_options(z_dim, logdet, probe, directions, num_probes)
        self._data_dims = x.ndim - 1 if data_dims is None else data_dims
        split = x.ndim - self._data_dims
        x_dim = math.prod(x.shape[split:])
        if z_dim > x_dim:
            raise ValueError(
                f"z_dim must be at most the {x_dim} numbers of a datum, whose noise q is made of, got {z_dim}"
            )
        self.encoder, self.decoder, self.x, self.noise = encoder, decoder, x, noise
        self.logdet, self.probe, self.directions, self.num_probes = logdet, probe, directions, num_probes
        self.health: Tensor | None = None
        self._draw: _Draw | None = None
        super().__init__(x.shape[:split], torch.Size((z_dim,)), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "JacobianNormal":
        """Return the same normals for more draws of each; new leading dimensions share one linearisation."""
        new = self._get_checked_instance(JacobianNormal, _instance)
        for name in ("encoder", "decoder", "noise", "logdet", "probe", "directions", "num_probes"):
            setattr(new, name, getattr(self, name))
        shape = torch.Size(batch_shape)
        split = self.x.ndim - self._data_dims
        # A batch dimension of size 1 may be widened; dimensions beyond those of x are left to the tangents.
        new.x = self.x.expand(*shape[len(shape) - split :], *self.x.shape[split:])
        new._data_dims = self._data_dims
        new.health = new._draw = None
        super(JacobianNormal, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """:math:`f(x)`, shape ``(*batch_shape, z_dim)``."""
        return self.encoder(self.x).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate of z, by the full Jacobian, shape ``(*batch_shape, z_dim)``."""
        return self.exact().variance

    def entropy(self) -> Tensor:
        """Entropy in nats, by the full Jacobian, shape ``batch_shape``."""
        return self.exact().entropy()

    def exact(self) -> MultivariateNormal:
        """Return this normal with its covariance written out, from ``z_dim`` passes of the encoder."""
        loc, rows = self._jacobian()
        tril = gram_tril(rows)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=self._validate_args).expand(
            self.batch_shape
        )

    def laplace(self, prior_scale: float | Tensor = 1.0) -> MultivariateNormal:
        """Return the normal around f(x) with Laplace's covariance (:func:`laplace_normal`)."""
        normal = laplace_normal(
            self.encoder(self.x), self.decoder, self.noise, prior_scale, self._validate_args
        )
        return normal.expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log-density of z in nats, by the full Jacobian; differentiable.

        Args:
            value: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch)``.
        """
        return self.exact().log_prob(value)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z, shape ``(*sample_shape, *batch_shape, z_dim)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        loc, tangents, log_q = self._linearised(self._noise_for(shape))
        value = (loc + tangents).reshape(shape)
        self._remember(value, None if log_q is None else log_q.reshape(shape[:-1]))
        return value

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return log q, no score function, and the term that an ELBO differentiates, each of one shape.

        Args:
            x: A value of z. For the last draw, these are the surrogate; for any other value the exact
                density.
            *args: Not used.
            **kwargs: Not used.
        """
        draw = self._draw
        log_q = draw.log_q if draw is not None and draw.value is x else self.log_prob(x)
        return ScoreParts(log_q, 0, log_q)

    def _noise_for(self, shape: torch.Size) -> Tensor:
        """Standard normal v in data space for draws of ``shape``, ``(n, *x.shape)``."""
        n = math.prod(shape[: len(shape) - 1 - (self.x.ndim - self._data_dims)])
        return torch.randn(n, *self.x.shape, dtype=self.x.dtype, device=self.x.device)

    def _remember(self, value: Tensor, log_q: Tensor | None) -> None:
        self._draw = None if log_q is None else _Draw(value, log_q)

    def _linearised(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return f(x), the tangents f'(x)(s v) ``(n, *batch, z_dim)``, and what stands for log q there."""
        if not torch.is_grad_enabled():
            self.health = None
            return *push_forward(self.encoder, self.x, self.noise * v), None
        if self.logdet == "exact":
            loc, rows = self._jacobian()
            tangents = (rows @ v.flatten(-self._data_dims).unsqueeze(-1)).squeeze(-1)
            return loc, tangents, self._minus_entropy(half_log_det(rows), tangents)
        loc, tangents, volume = self._probed(v)
        if self.logdet == "pinv":
            with torch.no_grad():
                value = half_log_det(self._jacobian()[1])
            return loc, tangents, self._minus_entropy(value + (volume - volume.detach()), tangents)
        # In the value, log det by the length of the draw; in the gradient, by the probe.
        z_dim = tangents.shape[-1]
        length = tangents.detach().square().sum(-1) / z_dim
        value = 0.5 * z_dim * (length.log() - _mean_log_chi2(z_dim))
        return loc, tangents, self._minus_entropy(value + (volume - volume.detach()), tangents)

    def _minus_entropy(self, volume: Tensor, tangents: Tensor) -> Tensor:
        # The quadratic form of a draw, |P v|^2 for a projector P, is a function of no parameter in
        # expectation: its mean has the same gradient with less noise.
        constant = 0.5 * tangents.shape[-1] * (1 + math.log(2 * math.pi))
        return -(constant + volume).expand(tangents.shape[:-1])

    def _probed(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f(x), the tangents of draws ``v``, and a tensor with the gradient of half the log det."""
        z_dim = self.event_shape[0]
        log_mean, deviation = self._log_noise()
        if self.probe == "data":
            loc, tangents = push_forward(self.encoder, self.x, self.noise * v)
            with torch.no_grad():
                _, pulled = pull_back(self.decoder, loc.detach(), v / self.noise)
            trace = (tangents * pulled).sum(-1)
            self.health = trace.detach().mean(0) / z_dim
            # The tangents hold the whole of the noise, whose mean is counted exactly below.
            return loc, tangents, z_dim * log_mean + trace * (1 + log_mean.detach() - log_mean)
        with torch.no_grad():
            u = _directions(self.directions, self.num_probes, self.x, self._data_dims, z_dim)
            if self.logdet == "pinv":
                w = self._pseudo_inverse(u)
            else:
                _, w = push_forward(self.decoder, self.encoder(self.x), u)
        if deviation is not None:
            w = w * (1 + deviation - deviation.detach())
        # One linearisation: the draws and the probes are tangents of the same pass.
        loc, both = push_forward(self.encoder, self.x, torch.cat([self.noise * v, w]))
        tangents, images = both.split([len(v), len(w)])
        trace = (u * images).sum(-1).mean(0)
        self.health = trace.detach() / z_dim
        return loc, tangents, z_dim * log_mean + trace

    def _log_noise(self) -> tuple[Tensor, Tensor | None]:
        r"""Mean of log s over a datum, and where gradients need it the deviations from it.

        With :math:`P` the projector on the row space of K, the derivative of half the log-determinant with
        respect to :math:`\log s_i` is :math:`P_{ii}`, and :math:`\mathrm{tr}\, P` is ``z_dim``: a common
        factor of the noise enters exactly, and only what is left by the probe.
        """
        if self.noise.ndim == 0:
            return self.noise.log(), None
        log = self.noise.log().expand(self.x.shape)
        mean = log.flatten(log.ndim - self._data_dims).mean(-1)
        if not self.noise.requires_grad:
            return mean, None
        return mean, log - mean.reshape(*mean.shape, *(1,) * self._data_dims)

    def _pseudo_inverse(self, u: Tensor) -> Tensor:
        r""":math:`S K^+ u`, shape ``(n, *x.shape)``."""
        rows = self._jacobian()[1]
        q, upper = torch.linalg.qr(rows.mT, mode="reduced")
        solved = q @ torch.linalg.solve_triangular(upper.mT, u.unsqueeze(-1), upper=False)
        return self.noise * solved.reshape(len(u), *self.x.shape)

    def _jacobian(self) -> tuple[Tensor, Tensor]:
        """Return f(x) and K, the Jacobian in units of the noise, ``(*batch, z_dim, x_dim)``."""
        loc, rows = jacobian_rows(self.encoder, self.x, self.event_shape[0])
        noise = self.noise.expand(self.x.shape).unsqueeze(-1 - self._data_dims)
        return loc, (rows * noise).flatten(-self._data_dims)


def check_options(z_dim: int, logdet: str, probe: str, directions: str, num_probes: int) -> None:
    """Refuse options of :class:`JacobianNormal` that do not go together.

    Raises:
        ValueError: If they do not.
    """
    for name, word, words in (
        ("logdet", logdet, ("surrogate", "pinv", "exact")),
        ("probe", probe, ("latent", "data")),
        ("directions", directions, ("sphere", "rademacher", "gaussian")),
    ):
        if word not in words:
            raise ValueError(
                f"{name} must be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}, got {word!r}"
            )
    if num_probes < 1:
        raise ValueError(f"num_probes must be positive, got {num_probes}")
    if probe == "data" and logdet != "surrogate":
        raise ValueError(f"logdet must be 'surrogate' with probe = 'data', got {logdet!r}")
    if num_probes > 1 and (probe == "data" or logdet == "exact"):
        raise ValueError(
            "num_probes must be 1 with probe = 'data', where the draw is the probe, and with "
            f"logdet = 'exact', where there is none, got {num_probes}"
        )
    if directions == "sphere" and num_probes > z_dim:
        raise ValueError(
            f"num_probes must be at most z_dim = {z_dim} for orthogonal directions, got {num_probes}"
        )


def half_log_det(rows: Tensor) -> Tensor:
    """Half the log-determinant of ``rows rows^T``, shape ``(*batch)``."""
    return gram_tril(rows).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _directions(kind: str, num: int, x: Tensor, data_dims: int, z_dim: int) -> Tensor:
    """Probes with E[u u^T] = I, shape ``(num, *batch, z_dim)``."""
    shape = (num, *x.shape[: x.ndim - data_dims], z_dim)
    u = torch.randn(shape, dtype=x.dtype, device=x.device)
    if kind == "gaussian":
        return u
    if kind == "rademacher":
        return torch.where(u < 0, -torch.ones_like(u), torch.ones_like(u))
    if num == 1:
        return u * (math.sqrt(z_dim) / u.norm(dim=-1, keepdim=True))
    # Columns of an orthonormal basis of a random subspace, which is all that the mean over them depends on.
    return math.sqrt(z_dim) * torch.linalg.qr(u.movedim(0, -1)).Q.movedim(-1, 0)


def _mean_log_chi2(degrees: int) -> float:
    """Mean of log(Q / degrees) for Q chi-square distributed: digamma(degrees / 2) - log(degrees / 2)."""
    half = 0.5 * degrees
    at, digamma = (0.5, -_EULER - 2 * math.log(2)) if degrees % 2 else (1.0, -_EULER)
    while at < half:
        digamma += 1 / at
        at += 1
    return digamma - math.log(half)
