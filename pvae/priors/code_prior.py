r"""Priors made of an autoencoder's codes (X-VAE 2026, arXiv:2607.01275v1)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.distributions import CodeMixture, KLMode
from pvae.ops import sample_categorical

from .code_fit import fit_gmm, fit_kde, fit_marginal, fit_normal
from .code_stats import CodeStats
from .scaled_codes import ScaledCodes, ScaleMode

__all__ = ["CodePrior", "Variant"]

Variant = Literal["diag", "full", "gmm", "kde", "marginal", "paired"]

_KERNELS = ("kde", "paired")
_MEMORISES = 0.5
_MIXTURES = ("gmm", *_KERNELS)


class CodePrior(nn.Module):
    r"""A prior whose parameters are statistics of the codes :math:`a_1, \dots, a_N` of a trained autoencoder.

    - ``"diag"``: :math:`N(m, \mathrm{diag}\, s^2)`, mean and standard deviation of the codes; the KL has a
      closed form. Free affine layers next to z absorb this prior: the model class, its optimum and its
      samples are those of a standard normal prior, and only the optimisation differs.
    - ``"full"``: :math:`N(m, C)` with the shrunk covariance; closed form too.
    - ``"gmm"``: a mixture fitted to the codes by expectation maximisation.
    - ``"kde"``: a normal on each of ``num_codes`` codes. It memorises: its components are training items.
    - ``"marginal"``: an independent one-dimensional mixture in each dimension.
    - ``"paired"``: in training :math:`N(a(x), \mathrm{diag}\, h^2)` around the code of the datum itself. The
      KL to it is no bound for the datum; it is one once ``log_num_components`` is added if the datum's code
      is among those kept, and its average bounds the KL between the aggregates. Called without a code it is
      the mixture over the codes kept, which
      likelihoods and samples use.

    Parameters are buffers of fixed shapes, NaN until :meth:`fit_` fills them or a fitted state is loaded.

    Args:
        z_dim: Number of latent dimensions.
        variant: One of the names above.
        components: Components K of ``"gmm"``, and of each dimension of ``"marginal"``.
        covariance: Covariances of the components of ``"gmm"``.
        kl: What the analytic KL of ``"gmm"``, ``"kde"`` and ``"paired"`` is, see
            :class:`~pvae.distributions.CodeMixture`; ``"mc"`` is the exact evidence bound.
        num_subset: Components drawn for each datum by the KL ``"subset"``.
        num_codes: Most codes that ``"kde"`` and ``"paired"`` stand on.
        bandwidth: Of ``"kde"`` and ``"paired"``: ``None`` for Scott's :math:`s_j n^{-1 / (d + 4)}`, a
            number for that multiple of :math:`s_j`, ``"loo"`` for the multiple with the best leave-one-out
            likelihood.
        preserve_moments: Whether ``"kde"`` shrinks its centres so as to keep the codes' variance.
        robust: Whether location and scale are median and median absolute deviation.
        learn: Whether the fitted parameters are trained on with the model; scales stay positive.

    Attributes:
        loc: Mean of the codes, shape ``(z_dim,)``, for whitening and warm starts; never trained.
        scale: Their floored standard deviation, shape ``(z_dim,)``; never trained.

    Raises:
        ValueError: If a size or ``bandwidth`` is not positive, a name is unknown, or an argument does not
            belong to the variant.

    Example:
        >>> stats = CodeStats(2)
        >>> stats.update(torch.randn(100, 2))
        >>> prior = CodePrior(2).fit_(stats)
        >>> prior().event_shape
        torch.Size([2])
    """

    conditional = False
    loc: Tensor
    scale: Tensor
    fitted: Tensor
    component_logits: Tensor
    component_loc: Tensor
    component_scale: Tensor
    component_scale_tril: Tensor

    def __init__(
        self,
        z_dim: int,
        variant: Variant = "diag",
        components: int = 10,
        covariance: Literal["diag", "full"] = "diag",
        kl: KLMode = "mc",
        num_subset: int = 32,
        num_codes: int = 2000,
        bandwidth: float | Literal["loo"] | None = None,
        preserve_moments: bool = True,
        robust: bool = False,
        learn: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("z_dim", z_dim),
            ("components", components),
            ("num_subset", num_subset),
            ("num_codes", num_codes),
        ):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if variant not in get_args(Variant):
            raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
        if covariance not in ("diag", "full"):
            raise ValueError(f"covariance must be 'diag' or 'full', got {covariance!r}")
        if kl not in get_args(KLMode):
            raise ValueError(f"kl must be one of {', '.join(get_args(KLMode))}, got {kl!r}")
        if covariance == "full" and variant != "gmm":
            raise ValueError(f"covariance='full' is for variant 'gmm' alone, got {variant!r}")
        if kl != "mc" and variant not in _MIXTURES:
            raise ValueError(f"kl must be 'mc' unless variant is one of {', '.join(_MIXTURES)}, got {kl!r}")
        _check_bandwidth(bandwidth, variant, preserve_moments)
        self.z_dim, self.variant, self.components, self.covariance = z_dim, variant, components, covariance
        self.kl, self.num_subset, self.num_codes, self.bandwidth = kl, num_subset, num_codes, bandwidth
        self.preserve_moments, self.robust, self.learn = preserve_moments, robust, learn
        self.register_buffer("loc", torch.full((z_dim,), math.nan))
        self.register_buffer("scale", torch.full((z_dim,), math.nan))
        self.register_buffer("fitted", torch.tensor(False))
        # The same on the host: reading the buffer in a step would wait for the device.
        self._ready = False
        # Weights of kernels are equal by definition.
        trained = {
            name for name in self._shapes() if learn and not (name == "logits" and variant in _KERNELS)
        }
        self._stored = {name: _stored_name(name, name in trained) for name in self._shapes()}
        for name, shape in self._shapes().items():
            empty = torch.full(shape, math.nan)
            if name in trained:
                self.register_parameter(self._stored[name], nn.Parameter(empty))
            else:
                self.register_buffer(self._stored[name], empty)

    def extra_repr(self) -> str:
        """What ``print`` shows in the brackets."""
        return f"z_dim={self.z_dim}, variant={self.variant!r}, fitted={self._ready}"

    @property
    def needs_code(self) -> bool:
        """Whether training calls the prior with the code of each datum."""
        return self.variant == "paired"

    @property
    def log_num_components(self) -> float:
        r"""Logarithm of the number of components, in nats.

        Under ``"paired"`` this is what :math:`\mathrm{KL}(q \Vert N(a_i, h^2))` lacks to be an upper bound on
        the KL to the mixture.
        """
        if self.variant in _KERNELS:
            self._check_fitted()
            return math.log(int(self._value("logits").isfinite().sum()))
        dims = {"gmm": 1, "marginal": self.z_dim}.get(self.variant, 0)
        return dims * math.log(self.components)

    def fit_(self, stats: CodeStats, seed: int = 0) -> Self:
        """Take the parameters from the statistics of codes of training data.

        Args:
            stats: The statistics; ``"full"`` needs them with ``covariance="full"``.
            seed: Seed of the starts of expectation maximisation.

        Returns:
            This module.

        Raises:
            ValueError: If ``z_dim`` differs, or there are fewer codes than components.
        """
        if stats.z_dim != self.z_dim:
            raise ValueError(f"stats must have z_dim {self.z_dim}, got {stats.z_dim}")
        base = stats.scale(self.robust)
        values = self._fit(stats, seed)
        with torch.no_grad():
            self.loc.copy_(base.loc)
            self.scale.copy_(base.scale)
            for name, value in values.items():
                stored = self._stored[name]
                getattr(self, stored).copy_(_packed(stored, value))
            self.fitted.fill_(True)
        self._ready = True
        return self

    def forward(self, y: Tensor | None = None, code: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(z)`, with ``batch_shape ()`` and ``event_shape (z_dim,)``.

        Args:
            y: Must be ``None``.
            code: For ``"paired"`` the codes of the data, shape ``(B, z_dim)``; the distribution then has
                ``batch_shape (B,)``.

        Raises:
            ValueError: If ``y`` is given, or ``code`` where there is no use for it or in another shape.
            RuntimeError: If the prior has not been fitted.
        """
        if y is not None:
            raise ValueError("CodePrior is unconditional: y must be None")
        self._check_fitted()
        if code is not None:
            if not self.needs_code:
                raise ValueError(
                    f"code must be None unless variant is 'paired', got codes for {self.variant!r}"
                )
            if code.shape[-1:] != (self.z_dim,):
                raise ValueError(f"code must have shape (B, {self.z_dim}), got {tuple(code.shape)}")
            return dist.Normal(code, self._value("scale")).to_event(1)
        loc = self._value("loc")
        if self.variant == "diag":
            return dist.Normal(loc, self._value("scale")).to_event(1)
        if self.variant == "full":
            return dist.MultivariateNormal(loc, scale_tril=self._value("scale_tril"))
        if self.variant == "marginal":
            mixing = dist.Categorical(logits=self._value("logits"))
            return dist.MixtureSameFamily(mixing, dist.Normal(loc, self._value("scale"))).to_event(1)
        return self._mixture()

    def scaled(self, scale: float, mode: ScaleMode = "within") -> ScaledCodes:
        """Return a sampler for generation whose spread is ``scale`` times the prior's.

        Warns where a scale below 0.5 within the components of ``"kde"`` or ``"paired"`` gives little else
        than reconstructions of training items.

        Args:
            scale: Factor of the standard deviation: 1 is the prior, less trades diversity for fidelity, 0
                gives a component's mean (of ``"kde"`` and ``"paired"``: a training item) or the prior's.
            mode: ``"within"`` scales the deviation from the component's mean, ``"global"`` that from the
                prior's mean; the same where there is one component.

        Raises:
            ValueError: If ``scale`` is negative or not finite, or ``mode`` is unknown.
            RuntimeError: If the prior has not been fitted.
        """
        if self.variant in _KERNELS and mode == "within" and scale < _MEMORISES:
            warnings.warn(
                f"at scale {scale:g} < {_MEMORISES} samples of a {self.variant!r} prior are near "
                "reconstructions of training items",
                stacklevel=2,
            )
        with torch.no_grad():
            return ScaledCodes(self._sample_parts, self().mean, scale, mode)

    def responsibilities(self, z: Tensor) -> Tensor:
        """Probability that each component made z; a component that is nowhere large has lost its data.

        Args:
            z: Shape ``(*batch, z_dim)``.

        Returns:
            Shape ``(*batch, K)``; ``(*batch, z_dim, K)`` for ``"marginal"``; ones, ``(*batch, 1)``, for
            ``"diag"`` and ``"full"``.

        Raises:
            RuntimeError: If the prior has not been fitted.
        """
        self._check_fitted()
        if self.variant in ("diag", "full"):
            return z.new_ones(*z.shape[:-1], 1)
        if self.variant == "marginal":
            normal = dist.Normal(self._value("loc"), self._value("scale"))
            return torch.softmax(normal.log_prob(z.unsqueeze(-1)) + self._value("logits").log_softmax(-1), -1)
        return self._mixture().responsibilities(z)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the distribution's parameters."""
        d, k = self.z_dim, self.components
        if self.variant in _KERNELS:
            return {"logits": (self.num_codes,), "loc": (self.num_codes, d), "scale": (d,)}
        if self.variant == "marginal":
            return {"logits": (d, k), "loc": (d, k), "scale": (d, k)}
        if self.variant == "gmm":
            spread = {"scale": (k, d)} if self.covariance == "diag" else {"scale_tril": (k, d, d)}
            return {"logits": (k,), "loc": (k, d), **spread}
        return {"loc": (d,), **({"scale": (d,)} if self.variant == "diag" else {"scale_tril": (d, d)})}

    def _fit(self, stats: CodeStats, seed: int) -> dict[str, Tensor]:
        if self.variant in _KERNELS:
            # Training puts the prior on the code itself, so its mixture's centres are not shrunk either.
            preserve = self.preserve_moments and self.variant == "kde"
            return fit_kde(stats, self.num_codes, self.bandwidth, preserve, self.robust)
        if self.variant == "gmm":
            return fit_gmm(stats, self.components, self.covariance, self.robust, seed)
        if self.variant == "marginal":
            return fit_marginal(stats, self.components, self.robust, seed)
        return fit_normal(stats, "full" if self.variant == "full" else "diag", self.robust)

    def _value(self, name: str) -> Tensor:
        stored = self._stored[name]
        return _unpacked(stored, getattr(self, stored))

    def _mixture(self) -> CodeMixture:
        logits, loc = self._value("logits"), self._value("loc")
        how: dict[str, Any] = {"kl_mode": self.kl, "num_subset": self.num_subset}
        if self.covariance == "full":
            return CodeMixture(logits, loc, scale_tril=self._value("scale_tril"), **how)
        return CodeMixture(logits, loc, self._value("scale").expand(loc.shape), **how)

    def _sample_parts(self, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw component means and deviations from them, each ``(*sample_shape, z_dim)``."""
        with torch.no_grad():
            if self.variant in _MIXTURES:
                return self._mixture().sample_parts(sample_shape)
            loc = self._value("loc")
            shape = (*sample_shape, self.z_dim)
            noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
            if self.variant == "full":
                return loc.expand(shape), noise @ self._value("scale_tril").mT
            scale = self._value("scale")
            if self.variant == "marginal":
                k = sample_categorical(self._value("logits"), sample_shape)
                dims = torch.arange(self.z_dim, device=loc.device)
                loc, scale = loc[dims, k], scale[dims, k]
            return loc.expand(shape), scale * noise

    def _check_fitted(self) -> None:
        if not self._ready:
            raise RuntimeError(
                "CodePrior has no parameters yet: call fit_ with the statistics of an autoencoder's codes, "
                "or load a fitted state"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.fitted)


def _check_bandwidth(bandwidth: float | str | None, variant: str, preserve_moments: bool) -> None:
    if bandwidth is None:
        return
    if variant not in _KERNELS:
        raise ValueError(f"bandwidth must be None unless variant is 'kde' or 'paired', got {bandwidth!r}")
    if bandwidth == "loo":
        return
    if isinstance(bandwidth, str) or not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be None, 'loo' or a positive number, got {bandwidth!r}")
    if variant == "kde" and preserve_moments and bandwidth >= 1:
        raise ValueError(f"bandwidth must be below 1, the codes' own scale, to keep moments, got {bandwidth}")


def _stored_name(name: str, trained: bool) -> str:
    """Name of a parameter in the state: what is trained is stored without constraints."""
    raw = {"scale": "log_scale", "scale_tril": "raw_tril"}.get(name, name) if trained else name
    return f"component_{raw}"


def _packed(stored: str, value: Tensor) -> Tensor:
    """Undo :func:`_unpacked`."""
    if stored == "component_log_scale":
        return value.log()
    if stored == "component_raw_tril":
        return value.tril(-1) + torch.diag_embed(value.diagonal(dim1=-2, dim2=-1).log())
    return value


def _unpacked(stored: str, tensor: Tensor) -> Tensor:
    if stored == "component_log_scale":
        return tensor.exp()
    if stored == "component_raw_tril":
        return tensor.tril(-1) + torch.diag_embed(tensor.diagonal(dim1=-2, dim2=-1).exp())
    return tensor
