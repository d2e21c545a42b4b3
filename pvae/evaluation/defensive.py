r"""Defensive mixture of prior and guide, as a proposal (Hesterberg 1995, Technometrics 37:185-194)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae.distributions import declared
from pvae.inference.program import Program, SiteRecorder

from .latents import _call
from .weights import _precision, exact

__all__ = ["DefensiveGuide"]


class DefensiveGuide(nn.Module):
    r"""A guide that now and then draws all latents from the prior, so that no weight is without a bound.

    .. math:: q_\alpha(z \mid x) = \alpha \, p(z) + (1 - \alpha) \, q(z \mid x), \qquad
              w = \frac{p(x, z)}{q_\alpha(z \mid x)} \le \frac{p(x \mid z)}{\alpha}

    A mixture of the joint densities of all latents. Where p(x | z) is bounded so are the weights, however
    narrow the guide: their variance is finite, and a standard error exists. The price is small, as
    :math:`\mathbb E\, w^2` is at most :math:`1 / (1 - \alpha)` times that of the guide alone. It helps where
    a guide leaves out mass that the prior covers; in many dimensions draws of the prior rarely land there.
    The bound on log p(x) holds as under any proposal; the ELBO of the mixture, in which bad draws of the
    prior count in full, is low and of no use.

    Each site is drawn from its conditional distribution under the mixture, whose weights are those of prior
    and guide given the latents above,

    .. math:: q_\alpha(z_l \mid z_{>l}) \propto \alpha \, p(z_{\ge l}) + (1 - \alpha) \, q(z_{\ge l} \mid x),

    so that this is a guide as any other, for all that takes one, and the product over sites is the mixture
    above. With L sites both programs run up to L times for each run of it, the model only down to the site.

    Give it to an estimate in the guide's place, as a proposal::

        pvae.log_likelihood(model, DefensiveGuide(model, guide), x)

    Args:
        model: The model program, held and not owned; its latents have exact densities.
        guide: The guide program, with the model's latents in the model's order.
        alpha: Share of draws from the prior, in (0, 1).

    Raises:
        ValueError: If ``alpha`` is not between 0 and 1; when it runs, for latents in another order and
            densities that are estimates.
    """

    proposal_name: ClassVar[str] = "defensive"

    def __init__(self, model: Program, guide: Program, alpha: float = 0.1) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        self._model = (model,)
        self.guide = guide
        self.alpha = alpha

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Draw all latents for ``x``, each ``(*particles, B, *event_shape)``."""
        # What both programs do inside is theirs alone: handlers outside see the sites below.
        with pyro.poutine.block(), SiteRecorder(replace=exact) as whole:
            _call(self.guide, x, y)
        fixed = [site for site in whole.sites.values() if not (site.observed or site.is_factor)]
        values: dict[str, Tensor] = {}
        shares = [math.log(self.alpha), math.log1p(-self.alpha)]
        weights = torch.tensor(shares, dtype=_precision(x.device), device=x.device)
        plate = pyro.plate("data", len(x), dim=-1)
        for site in fixed:
            first = site.fn if site.mask is None else site.fn.mask(site.mask)
            q = first if not values else self._next(self.guide, x, y, values, site.name, "guide")
            p = self._next(self._model[0], x, y, values, site.name, "model")
            both = _Either(p, q, weights)
            with plate:
                values[site.name] = pyro.sample(site.name, both)
            weights = both.given(values[site.name])

    def _next(
        self,
        program: Program,
        x: Tensor,
        y: Tensor | None,
        values: dict[str, Tensor],
        name: str,
        label: str,
    ) -> Any:
        """Distribution of the first latent that has no value yet, given those that have."""
        with pyro.poutine.block():
            try:
                with _Until(values) as reached:
                    _call(program, x, y)
            except _ReachedError:
                pass
        if reached.name != name:
            raise ValueError(
                f"model and guide must have the same latents in the same order, got {label} site "
                f"{reached.name!r} in the place of {name!r}"
            )
        if label == "guide":
            return exact(name, reached.fn)
        if declared(reached.fn, "density", "exact") != "exact":
            raise ValueError(
                f"model site {name!r} has only an estimate of its density, which cannot divide a weight"
            )
        return reached.fn


class _ReachedError(Exception):
    """A program has come to the site it was run for."""


class _Until(Messenger):
    """Replay the values given, and stop at the first latent without one."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.name: str | None = None
        self.fn: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            return
        self.name = msg["name"]
        self.fn = msg["fn"] if msg["mask"] is None else msg["fn"].mask(msg["mask"])
        raise _ReachedError


class _Either(TorchDistribution):
    """Mixture of two distributions over one space, drawn without reparameterisation.

    Args:
        p: The first one.
        q: The second one.
        log_weights: Log-weights, normalised, shape ``(*batch, 2)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, p: Any, q: Any, log_weights: Tensor) -> None:
        if p.event_shape != q.event_shape:
            raise ValueError(
                f"model and guide must have latents of the same shape, got {tuple(p.event_shape)} and "
                f"{tuple(q.event_shape)}"
            )
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape, log_weights.shape[:-1])
        self.p, self.q, self.log_weights = p, q, log_weights
        super().__init__(shape, p.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the prior, which the posterior cannot leave."""
        return self.p.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_Either":
        """Return the mixture for a larger batch."""
        shape = torch.Size(batch_shape)
        return _Either(self.p.expand(shape), self.q.expand(shape), self.log_weights.expand(*shape, 2))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw, shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        with torch.no_grad():
            sample_shape = torch.Size(sample_shape)
            p, q = (fn.expand(self.batch_shape).sample(sample_shape) for fn in (self.p, self.q))
            share = self.log_weights[..., 0].exp().expand(self.batch_shape)
            shape = sample_shape + self.batch_shape
            first = torch.rand(shape, dtype=share.dtype, device=share.device) < share
            return torch.where(first.reshape(*first.shape, *(1,) * len(self.event_shape)), p, q)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, shape ``(*batch)``."""
        return self._joint(value).logsumexp(-1)

    def given(self, value: Tensor) -> Tensor:
        """Log-weights of the two once the value is known, shape ``(*batch, 2)``."""
        return self._joint(value).log_softmax(-1)

    def _joint(self, value: Tensor) -> Tensor:
        terms = torch.broadcast_tensors(self.p.log_prob(value), self.q.log_prob(value))
        return torch.stack(terms, -1).to(self.log_weights.dtype) + self.log_weights
