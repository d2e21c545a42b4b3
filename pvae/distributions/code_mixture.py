r"""Mixture of normals with bounds on the KL from a diagonal normal (Hershey & Olsen 2007, ICASSP)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl

from pvae.ops import has_float64

from .normal_mixture import _exponents, _exponents_in_blocks

__all__ = ["CodeMixture", "KLMode"]

KLMode = Literal["mc", "variational", "nearest", "convex", "subset"]

# Most numbers in one intermediate tensor: rows of z are handled in blocks of this size (32 MiB of doubles).
_BUDGET = 2**22


class CodeMixture(TorchDistribution):
    r"""Mixture of :math:`K` normals, diagonal or full, shared by all data.

    .. math:: p(z) = \sum_{k=1}^{K} \pi_k \, \mathcal N(z \mid m_k, S_k), \qquad
              S_k = \mathrm{diag}\, s_k^2 \ \text{ or } \ L_k L_k^\top

    Densities are taken in double precision by matrix products and in blocks of rows: 4096 rows under
    10,000 components need the ``(rows, K)`` log-densities that a gradient looks back at and little more.

    The KL from a diagonal normal q has no closed form. With
    :math:`\mathrm{KL}_k = \mathrm{KL}(q \Vert N(m_k, S_k))`, ``kl_mode`` says what
    ``torch.distributions.kl_divergence`` gives:

    - ``"mc"``: nothing (``NotImplementedError``), so that an objective takes the log-densities at its own
      draw: the exact evidence bound.
    - ``"variational"``: :math:`-\log \sum_k \pi_k e^{-\mathrm{KL}_k}`, an upper bound without noise, the
      tightest of the three closed forms.
    - ``"nearest"``: :math:`\min_k (\mathrm{KL}_k - \log \pi_k)`, an upper bound, looser.
    - ``"convex"``: :math:`\sum_k \pi_k \mathrm{KL}_k`, an upper bound that **erases the mixture**: it is the
      KL to the normalised geometric mean of the components, a single normal, plus a constant. With equal
      :math:`S_k = h^2 I` its gradients are those of :math:`N(\bar m, h^2 I)`, as narrow as one component.
      For study only.
    - ``"subset"``: :math:`\log q(z) - \log \frac1M \sum_m N(z \mid m_{k_m}, S_{k_m})` at one draw of z and
      ``num_subset`` draws of k per datum: an upper bound in expectation that falls to the KL as M grows. It
      draws its own z.

    Every one but ``"mc"`` makes the objective a looser bound than the ELBO; log p(x) under this prior is to
    be estimated from :meth:`log_prob`, which does not depend on the mode.

    Args:
        logits: Unnormalised log-weights, shape ``(K,)``; ``-inf`` leaves a component out.
        loc: Means, shape ``(K, z_dim)``.
        scale: Standard deviations, positive, shape ``(K, z_dim)``; this or ``scale_tril``.
        scale_tril: Cholesky factors of the covariances, shape ``(K, z_dim, z_dim)``.
        kl_mode: One of the names above.
        num_subset: Components drawn per datum in mode ``"subset"``.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Raises:
        ValueError: If the shapes do not agree, not exactly one of ``scale`` and ``scale_tril`` is given,
            ``kl_mode`` is unknown or ``num_subset`` is not positive.

    Example:
        >>> prior = CodeMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> prior.log_prob(torch.zeros(3, 1)).shape
        torch.Size([3])
    """

    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor | None = None,
        scale_tril: Tensor | None = None,
        *,
        kl_mode: KLMode = "mc",
        num_subset: int = 32,
        validate_args: bool | None = None,
    ) -> None:
        if (scale is None) == (scale_tril is None):
            given = "neither" if scale is None else "both"
            raise ValueError(f"exactly one of scale and scale_tril must be given, got {given}")
        if kl_mode not in get_args(KLMode):
            raise ValueError(f"kl_mode must be one of {', '.join(get_args(KLMode))}, got {kl_mode!r}")
        if num_subset < 1:
            raise ValueError(f"num_subset must be positive, got {num_subset}")
        name, spread = ("scale", scale) if scale_tril is None else ("scale_tril", scale_tril)
        assert spread is not None
        wanted = loc.shape if scale is not None else (*loc.shape, loc.shape[-1]) if loc.ndim == 2 else ()
        if logits.ndim != 1 or loc.ndim != 2 or len(logits) != len(loc) or spread.shape != wanted:
            sizes = "(K, z_dim)" if scale is not None else "(K, z_dim, z_dim)"
            raise ValueError(
                f"logits, loc and {name} must have shapes (K,), (K, z_dim) and {sizes}, got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(spread.shape)}"
            )
        self.logits, self.loc = logits, loc
        self.scale, self.scale_tril = scale, scale_tril
        self.kl_mode, self.num_subset = kl_mode, num_subset
        super().__init__(torch.Size(), loc.shape[-1:], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """What the given parameters must satisfy."""
        spread = (
            {"scale": constraints.independent(constraints.positive, 2)}
            if self.scale_tril is None
            else {"scale_tril": constraints.independent(constraints.lower_cholesky, 1)}
        )
        return {
            "logits": constraints.real_vector,
            "loc": constraints.independent(constraints.real, 2),
            **spread,
        }

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "CodeMixture":
        """Return the same mixture for a batch of independent z.

        Pyro's own ``expand`` would wrap the class, and a plate would then hide its KL.
        """
        new = self._get_checked_instance(CodeMixture, _instance)
        for name in ("logits", "loc", "scale", "scale_tril", "kl_mode", "num_subset"):
            setattr(new, name, getattr(self, name))
        super(CodeMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw z, shape ``(*sample_shape, *batch_shape, z_dim)``."""
        centre, deviation = self.sample_parts(sample_shape)
        return centre + deviation

    def sample_parts(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw a component's mean and a deviation from it, whose sum is a draw of z.

        Returns:
            Both of shape ``(*sample_shape, *batch_shape, z_dim)``.
        """
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            component = self._draw_components(shape[:-1])
            noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            return self.loc[component], self._coloured(component, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of z in nats.

        Args:
            value: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch)``.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_joint = self._log_joint()
        log_prob = self._by_rows(lambda rows: torch.logsumexp(log_joint(rows), -1), value)
        return log_prob.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def responsibilities(self, value: Tensor) -> Tensor:
        r"""Probability that each component made z, :math:`\pi_k N(z \mid m_k, S_k) / p(z)`.

        Args:
            value: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch, K)``, summing to 1 along the last dimension.
        """
        log_joint = self._log_joint()
        return self._by_rows(lambda rows: torch.softmax(log_joint(rows), -1), value)

    @property
    def mean(self) -> Tensor:
        """Mean of z, shape ``(*batch_shape, z_dim)``."""
        return (torch.softmax(self.logits, -1) @ self.loc).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate of z, shape ``(*batch_shape, z_dim)``."""
        weights = torch.softmax(self.logits, -1)
        within = self.scale.square() if self.scale is not None else self._tril.square().sum(-1)
        spread = (self.loc - weights @ self.loc).square()
        return (weights @ (within + spread)).expand(self._extended_shape())

    @property
    def _tril(self) -> Tensor:
        assert self.scale_tril is not None
        return self.scale_tril

    def _draw_components(self, shape: Sequence[int]) -> Tensor:
        """Indices with the mixture's weights, by inversion: no ``(*shape, K)`` tensor and no host sync."""
        weights = torch.softmax(self.logits.detach(), -1)
        wide = weights.to(torch.float64) if has_float64(weights.device) else weights
        total = wide.cumsum(-1)
        u = torch.rand(tuple(shape), dtype=wide.dtype, device=wide.device) * total[-1]
        # To the right of ties, so that a component without weight is never met.
        return torch.searchsorted(total, u, right=True).clamp(max=len(total) - 1)

    def _coloured(self, component: Tensor, noise: Tensor) -> Tensor:
        """Give white noise ``(*shape, z_dim)`` the scale of each row's component."""
        if self.scale is not None:
            return self.scale[component] * noise
        dim = noise.shape[-1]
        size = max(1, _BUDGET // (dim * dim))
        pairs = zip(component.reshape(-1).split(size), noise.reshape(-1, dim).split(size), strict=True)
        parts = [(self._tril[k] @ e.unsqueeze(-1)).squeeze(-1) for k, e in pairs]
        return torch.cat(parts).reshape(noise.shape)

    def _by_rows(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Apply a function of rows ``(rows, z_dim)`` in blocks; its result keeps the batch of ``values``."""
        width = len(self.logits) * (1 if self.scale is not None else self.loc.shape[-1])
        size = max(1, _BUDGET // width)
        blocks = zip(*(value.reshape(-1, value.shape[-1]).split(size) for value in values), strict=True)
        out = torch.cat([function(*block) for block in blocks])
        return out.reshape(values[0].shape[:-1] + out.shape[1:])

    def _log_joint(self) -> Callable[[Tensor], Tensor]:
        r"""Return the map of rows to :math:`\log \pi_k N(z \mid m_k, S_k)`, ``(rows, K)``."""
        log_normal, log_weights = self._log_normal(), torch.log_softmax(self.logits, -1)
        return lambda rows: log_normal(rows) + log_weights

    def _log_normal(self) -> Callable[[Tensor], Tensor]:
        """Return the map of rows to their log-densities under each component, ``(rows, K)``."""
        if self.scale is not None:
            loc, scale = self.loc, self.scale
            exponents = _exponents if has_float64(loc.device) else _exponents_in_blocks
            return lambda rows: exponents(rows, loc, scale)
        whiten = self._whitening()
        loc = self.loc.to(whiten.dtype)
        centre = loc.mean(0)
        offset = (whiten @ (loc - centre).unsqueeze(-1)).squeeze(-1)
        diagonal = self._tril.diagonal(dim1=-2, dim2=-1)
        constant = -diagonal.log().sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)

        def log_normal(rows: Tensor) -> Tensor:
            # L^-1 (z - m), one matrix product for all components: (rows, K, z_dim).
            white = ((rows.to(whiten.dtype) - centre) @ whiten.flatten(0, 1).mT).unflatten(-1, offset.shape)
            return constant - 0.5 * (white - offset).square().sum(-1).to(rows.dtype)

        return log_normal

    def _whitening(self) -> Tensor:
        """Inverse Cholesky factors, ``(K, z_dim, z_dim)``, in double precision where there is one."""
        tril = self._tril.to(torch.float64) if has_float64(self.loc.device) else self._tril
        eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
        return torch.linalg.solve_triangular(tril, eye, upper=False)

    def _kl_to_components(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the map of rows ``loc``, ``scale`` of q to the KL to each component, ``(rows, K)``."""
        log_normal = self._log_normal()
        precision = (
            self.scale.square().reciprocal() if self.scale is not None else self._whitening().square().sum(-2)
        )

        def kl(loc: Tensor, scale: Tensor) -> Tensor:
            # E_q log N(z; m, S) = log N(mu; m, S) - tr(S^-1 diag sigma^2) / 2
            trace = (scale.square().to(precision.dtype) @ precision.mT).to(loc.dtype)
            entropy = scale.log().sum(-1, keepdim=True) + 0.5 * loc.shape[-1] * (1 + math.log(2 * math.pi))
            return 0.5 * trace - log_normal(loc) - entropy

        return kl

    def _subset_log_prob(self, z: Tensor) -> Tensor:
        """Log of the mean density of ``num_subset`` components drawn for each row, ``(rows,)``."""
        component = self._draw_components((len(z), self.num_subset))
        difference = z.unsqueeze(-2) - self.loc[component]
        if self.scale is not None:
            scale = self.scale[component]
            white, log_det = difference / scale, scale.log().sum(-1)
        else:
            tril = self._tril[component]
            white = torch.linalg.solve_triangular(tril, difference.unsqueeze(-1), upper=False).squeeze(-1)
            log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * z.shape[-1] * math.log(2 * math.pi) + math.log(self.num_subset)
        return torch.logsumexp(-0.5 * white.square().sum(-1) - log_det, -1) - constant


def _variational(kl: Tensor, log_weights: Tensor) -> Tensor:
    return -torch.logsumexp(log_weights - kl, -1)


def _nearest(kl: Tensor, log_weights: Tensor) -> Tensor:
    return (kl - log_weights).amin(-1)


def _convex(kl: Tensor, log_weights: Tensor) -> Tensor:
    return kl @ log_weights.exp()


_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "variational": _variational,
    "nearest": _nearest,
    "convex": _convex,
}


@register_kl(Independent, CodeMixture)
def _kl_independent_code_mixture(q: "Independent[Any]", p: CodeMixture) -> Tensor:
    """Bound on the KL in nats as ``kl_mode`` says, shape: the broadcast batch shapes."""
    normal = q.base_dist
    if p.kl_mode == "mc" or not isinstance(normal, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    if p.kl_mode == "subset":
        z = q.rsample()
        kl = q.log_prob(z) - p._subset_log_prob(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])
    else:
        reduce, components = _REDUCE[p.kl_mode], p._kl_to_components()
        log_weights = torch.log_softmax(p.logits, -1)
        kl = p._by_rows(lambda *rows: reduce(components(*rows), log_weights), normal.loc, normal.scale)
    return kl.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))
