r"""Training objectives: ELBO (Kingma & Welling 2014, arXiv:1312.6114v10, eq. 3), IWAE (Burda et al. 2016,
arXiv:1509.00519v4, eq. 8) and its doubly reparameterised gradient DReG (Tucker et al. 2019,
arXiv:1810.04152v2), with free bits (Kingma et al. 2016, arXiv:1606.04934v2, eq. 15).
"""

import functools
import operator
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pyro.infer
import torch
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.func import functional_call

from pvae.alignment import DensityFactor
from pvae.distributions import declared
from pvae.ops import batch_mean, log_mean_exp

from .program import Program, Site, SiteRecorder, particle_plate

__all__ = ["ELBO", "Kind", "Terms"]

Kind = Literal["elbo", "mean_field", "iwae", "dreg"]
_KINDS = ("elbo", "mean_field", "iwae", "dreg")

# Most latents of a site whose density is a surrogate in training and, inside a logarithm, must be exact: the
# exact one costs a pass of the encoder for each.
_MOST_EXACT = 64


@dataclass(frozen=True)
class Terms:
    """An objective and its parts, all in nats, as tensors on the device.

    Attributes:
        loss: What is minimised: minus the bound with the training-only settings in it, mean over the
            batch, a scalar.
        parts: Means over batch and particles: ``reconstruction`` (minus log-likelihood), ``kl`` (all
            latent sites), ``kl/<site>``, ``factor/<site>`` where the model has factors, ``align`` where one
            of them belongs to training alone (minus it: what it adds to the loss), and
            ``surrogate/<site>`` where a guide's log q is a surrogate: how good it is, one at best. ``kl``
            and ``loss`` are then no bounds.
        log_x: log p(x | z), shape ``(*particles, B)``.
        ratios: log q - log p of each latent site, or its closed form, of the same shape.
        weighted: Whether particles are combined inside the logarithm.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    log_x: Tensor
    ratios: list[Tensor]
    weighted: bool

    @property
    def bound(self) -> Tensor:
        """The bound per datum without ``beta``, free bits and factors, shape ``(B,)``."""
        log_w = self.log_x - _sum(self.ratios)
        if log_w.ndim == 1:
            return log_w
        return log_mean_exp(log_w, 0) if self.weighted else log_w.mean(0)


class ELBO(pyro.infer.ELBO):
    r"""A bound on the log evidence whose evaluation needs no trace and never waits for the device.

    .. math:: \mathcal L_K(x) = \mathbb E_{z_{1:K} \sim q} \log \frac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}

    for ``"iwae"`` and ``"dreg"``; for ``"elbo"`` and ``"mean_field"`` the mean of :math:`K` single-particle
    bounds. It equals Pyro's ``Trace_ELBO`` / ``TraceMeanField_ELBO`` (vectorised particles) in value and
    gradient for the same noise, and can be handed to :class:`pyro.infer.SVI` in their place.

    A factor that is marked as training-only (:data:`pvae.alignment.TRAINING_ONLY`) is no part of p(x, z): it
    is added to the bound, averaged over particles, and never stands in a weight.

    Both programs take ``x`` of shape ``(B, *x_shape)`` first; every site lies in their plate over the data.

    Args:
        kind: ``"elbo"`` (Monte Carlo), ``"mean_field"`` (closed-form KL where Pyro knows one; right if no
            model parent of a site descends from that site in the guide), ``"iwae"``, ``"dreg"``.
        num_particles: Number of particles :math:`K`.
        free_bits: Nats per latent site below which its KL, averaged over the batch, is not penalised.
            A training-only setting.

    Raises:
        ValueError: For an unknown ``kind``, ``num_particles`` below 1, negative ``free_bits``, or free bits
            in an importance-weighted bound, which has no KL term.
    """

    def __init__(self, kind: Kind = "elbo", num_particles: int = 1, free_bits: float = 0.0) -> None:
        if kind not in _KINDS:
            raise ValueError(f"objective must be one of {', '.join(_KINDS)}, got {kind!r}")
        if num_particles < 1:
            raise ValueError(f"num_particles must be positive, got {num_particles}")
        if free_bits < 0:
            raise ValueError(f"free_bits must not be negative, got {free_bits}")
        if free_bits and kind in ("iwae", "dreg"):
            raise ValueError(f"free_bits needs a KL term, which objective {kind!r} does not have")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.kind = kind
        self.free_bits = free_bits

    def __repr__(self) -> str:
        return f"ELBO({self.kind!r}, num_particles={self.num_particles}, free_bits={self.free_bits})"

    def terms(
        self, model: Program, guide: Program, *args: Any, beta: Tensor | float = 1.0, **kwargs: Any
    ) -> Terms:
        """Evaluate the objective and its parts on one batch.

        Args:
            model: The model program.
            guide: The guide program.
            *args: Arguments of both, ``x`` first.
            beta: Weight of the latent sites alone (KL warm-up); 1 gives the bound. A training-only setting.
            **kwargs: Keyword arguments of both.

        Raises:
            ValueError: If a latent of the guide has no reparameterised sample, model and guide have other
                latents, a site lies outside the plate over the data, or an importance-weighted objective
                meets a guide that gives the mean of log q in its place, has no density in training, or
                has an exact one of too many latents, or (of several particles) a model with a bound in place
                of a log-density; "dreg" a guide that shares parameters with the model, or a training-only
                factor made of the draws.
        """
        shape = self._log_prob_shape(len(args[0]))
        # The recorder stands outside the plate, which would otherwise not broadcast a replayed site.
        with SiteRecorder() as q, self._plate():
            guide(*args, **kwargs)
        values = self._values(q.sites)
        with SiteRecorder(values) as p, self._plate():
            model(*args, **kwargs)
        _check_programs(p.sites, q.sites, shape)
        if self.kind in ("iwae", "dreg"):
            _check_densities(self.kind, q.sites)
            _check_bounds(self.kind, p.sites, self.num_particles)
            if self.kind == "dreg":
                _check_own_parameters(guide)
                _check_training_only(p.sites, self.num_particles)
        guide_sites = self._held(guide, values, args, kwargs) if self.kind == "dreg" else q.sites
        log_x, factors, ratios = self._log_terms(p.sites, guide_sites)
        reconstruction = -log_x.mean()
        kl = {name: ratio.mean() for name, ratio in ratios.items()}
        extra = [-_training_only(s, p.sites).mean() for s in p.sites.values() if s.training_only]
        factor = {name: value.mean() for name, value in factors.items()}
        if self.kind in ("iwae", "dreg"):
            log_w = log_x - beta * _sum(ratios.values())
            log_w = log_w + _sum(factors.values()) if factors else log_w
            if self.kind == "dreg":
                _square_weights(values, log_w)
            loss = -log_mean_exp(log_w, 0).mean() if log_w.ndim > 1 else -log_w.mean()
        else:
            penalties = [_penalty(k, self.free_bits) if self.free_bits else k for k in kl.values()]
            loss = reconstruction + beta * _sum(penalties)
            loss = loss - _sum(factor.values()) if factor else loss
        loss = loss + _sum(extra) if extra else loss
        parts = {"reconstruction": reconstruction, "kl": _sum(kl.values())}
        parts |= {f"kl/{name}": value for name, value in kl.items()}
        parts |= {f"factor/{name}": value for name, value in factor.items()}
        parts |= {"align": _sum(extra)} if extra else {}
        health = {name: declared(site.fn, "health", None) for name, site in q.sites.items()}
        parts |= {f"surrogate/{name}": value.mean() for name, value in health.items() if value is not None}
        return Terms(loss, parts, log_x, list(ratios.values()), self.kind in ("iwae", "dreg"))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over the batch, as Pyro's objectives have it."""
        return self.terms(model, guide, *args, **kwargs).loss * len(args[0])

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Like :meth:`differentiable_loss`, as a number."""
        with torch.no_grad():
            return float(torch_item(self.differentiable_loss(model, guide, *args, **kwargs)))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Like :meth:`loss`, and adds the gradients to the parameters' ``.grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(torch_item(loss))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("this ELBO builds no traces: call terms, loss or differentiable_loss")

    def _plate(self) -> Any:
        return particle_plate(self.num_particles) if self.num_particles > 1 else nullcontext()

    def _log_prob_shape(self, batch: int) -> tuple[int, ...]:
        return (self.num_particles, batch) if self.num_particles > 1 else (batch,)

    def _values(self, q: dict[str, Site]) -> dict[str, Tensor]:
        """The guide's draws, as the model is to see them."""
        latents = {name: site.value for name, site in q.items() if not site.observed}
        if self.kind != "dreg":
            return latents
        # A node of its own between guide and model: DReG scales the gradient that crosses it, once, also
        # where one latent of the guide depends on another.
        return {name: value.view_as(value) for name, value in latents.items()}

    def _held(self, guide: Program, values: dict[str, Tensor], args: Any, kwargs: Any) -> dict[str, Site]:
        """Score the draws under the guide with its parameters held constant."""
        module = getattr(guide, "program", guide)
        if not isinstance(module, nn.Module):
            kind = type(guide).__name__
            raise TypeError(f"objective 'dreg' needs a guide that is an nn.Module, got {kind}")
        constant = {name: value.detach() for name, value in module.named_parameters()}
        with SiteRecorder(values) as held, self._plate():
            functional_call(module, constant, args, kwargs)
        return held.sites

    def _log_terms(
        self, p: dict[str, Site], q: dict[str, Site]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return log p(x | z), the factors that are not training-only, and log q - log p (or its closed form)
        of each latent site.
        """
        log_x = [s.scaled_log_prob() for s in p.values() if s.observed and not s.is_factor]
        factors = {s.name: s.scaled_log_prob() for s in p.values() if s.is_factor and not s.training_only}
        factors |= {s.name: -s.scaled_log_prob() for s in q.values() if s.is_factor}
        ratios = {s.name: self._ratio(s, q[s.name]) for s in p.values() if not s.observed}
        return _sum(log_x), factors, ratios

    def _ratio(self, p: Site, q: Site) -> Tensor:
        if self.kind == "mean_field":
            try:
                return q.scaled(kl_divergence(q.fn, p.fn))
            except NotImplementedError:
                pass
        if self.kind in ("iwae", "dreg") and declared(q.fn, "training_density", "exact") != "exact":
            return q.scaled_log_prob() - p.scaled_log_prob()
        return _log_q(q) - p.scaled_log_prob()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Add tensors without the extra zero that ``sum`` starts from: each operation counts on a small net."""
    return functools.reduce(operator.add, terms)


def _penalty(kl: Tensor, free_bits: float) -> Tensor:
    """Return a site's KL where its mean over the batch is above the free bits, and those elsewhere."""
    # NaN is not below: it must be seen.
    return torch.where(batch_mean(kl.detach()) < free_bits, free_bits, kl)


def _square_weights(values: dict[str, Tensor], log_w: Tensor) -> None:
    r"""Multiply the gradient that reaches each draw by its normalised weight.

    The gradient with respect to the guide is then
    :math:`\sum_k \tilde w_k^2 \, \partial_z \log w_k \, \partial_\phi z_k` (Tucker et al. 2019), while the
    model's parameters keep :math:`\sum_k \tilde w_k \, \partial_\theta \log w_k`.
    """
    weight = log_w.detach().softmax(0) if log_w.ndim > 1 else torch.ones_like(log_w)
    for value in values.values():
        if value.requires_grad:
            factor = weight.reshape(weight.shape + (1,) * (value.ndim - weight.ndim))
            value.register_hook(factor.mul)


def _log_q(site: Site) -> Tensor:
    """Log q(z), with the gradient of a surrogate where the distribution declares one (``score_parts``).

    Where it declares its entropy analytic, the mean of log q(z) in value too.
    """
    parts = site.fn.score_parts(site.value)
    if parts.entropy_term is parts.log_prob or _has_analytic_entropy(site.fn):
        return site.scaled(parts.entropy_term)
    surrogate = parts.entropy_term - parts.entropy_term.detach()
    return site.scaled(parts.log_prob.detach() + surrogate)


def _has_analytic_entropy(fn: Any) -> bool:
    return bool(declared(fn, "analytic_entropy", False))


def _check_densities(kind: str, q: dict[str, Site]) -> None:
    """Refuse a mean of log q inside the logarithm, where the objective would be no bound."""
    for name, site in q.items():
        if _has_analytic_entropy(site.fn):
            raise ValueError(
                f"objective {kind!r} needs log q(z) at the draw, but guide site {name!r} has an analytic "
                "entropy: build the guide with entropy='sampled'"
            )
        density = declared(site.fn, "training_density", "exact")
        if density not in ("exact", "surrogate"):
            raise ValueError(
                f"objective {kind!r} needs a density of guide site {name!r}, which in training has none "
                f"but a loss of its own ({density}): use objective 'elbo'"
            )
        if density == "surrogate" and site.fn.event_shape.numel() > _MOST_EXACT:
            raise ValueError(
                f"objective {kind!r} needs the exact log q(z) of guide site {name!r}, a pass of the encoder "
                f"for each latent: there must be at most {_MOST_EXACT}, got {site.fn.event_shape.numel()}"
            )


def _check_bounds(kind: str, p: dict[str, Site], num_particles: int) -> None:
    """Refuse to exponentiate a bound on a log-density, whose noise alone would raise the objective."""
    for name, site in p.items():
        if num_particles > 1 and declared(site.fn, "density", "exact") == "bound":
            raise ValueError(
                f"objective {kind!r} needs a density of model site {name!r}, which has only a stochastic "
                "lower bound of its logarithm (estimator 'vlb'): use objective 'elbo' or 'mean_field', or "
                "its unbiased estimate (estimator 'chain')"
            )


def _check_own_parameters(guide: Program) -> None:
    """Refuse a guide whose density depends on the model's parameters: DReG holds those of q constant."""
    if getattr(getattr(guide, "program", guide), "shares_parameters", False):
        raise ValueError(
            "objective 'dreg' needs a guide with parameters of its own alone, but the density of "
            f"{type(getattr(guide, 'program', guide)).__name__} depends on the model's: use objective 'iwae'"
        )


def _training_only(site: Site, sites: dict[str, Site]) -> Tensor:
    """A training-only factor, of the log-density of another site where it is made of that."""
    if isinstance(site.fn, DensityFactor):
        return site.scaled(site.fn.of(sites[site.fn.site].bare_log_prob))
    return site.scaled_log_prob()


def _check_training_only(p: dict[str, Site], num_particles: int) -> None:
    """Refuse a term made of the draws: DReG multiplies the gradient that reaches each draw by its weight."""
    for name, site in p.items():
        if num_particles > 1 and site.training_only == "draw":
            raise ValueError(
                f"objective 'dreg' would weigh the gradient of the training-only factor {name!r}, which is "
                "made of the draw: align with estimator='mean' or 'multi', or use objective 'iwae'"
            )


def _check_programs(p: dict[str, Site], q: dict[str, Site], shape: tuple[int, ...]) -> None:
    """Refuse what would make the objective something else than a bound per datum (shapes only: no sync)."""
    for name, site in q.items():
        if not site.observed and not site.fn.has_rsample:
            kind = type(site.fn).__name__
            raise ValueError(f"guide site {name!r} must have a reparameterised sample, got {kind}")
    for program, sites in (("guide", q), ("model", p)):
        for name, site in sites.items():
            if tuple(site.fn.batch_shape) != shape:
                raise ValueError(
                    f"{program} site {name!r} must lie in the plate over the data with batch_shape {shape}, "
                    f"got {tuple(site.fn.batch_shape)}"
                )
    missing = [name for name, site in p.items() if not site.observed and name not in q]
    if missing:
        raise ValueError(f"the guide must sample every latent site of the model, {missing[0]!r} is missing")
    extra = [name for name, site in q.items() if not site.observed and name not in p]
    if extra:
        # Its density under the guide alone would make the objective no bound on log p(x).
        raise ValueError(f"the model must have every latent site of the guide, {extra[0]!r} is missing")
    if not any(site.observed and not site.is_factor for site in p.values()):
        raise ValueError("the model must observe at least one site, got none")
