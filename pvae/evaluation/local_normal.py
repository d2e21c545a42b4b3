r"""Gaussian posteriors fitted to each datum by itself (Cremer, Li & Duvenaud 2018, arXiv:1801.03558)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.inference.program import Program, Site, SiteRecorder, particle_plate

from .latents import _call
from .layout import Layout
from .weights import _precision, draw, exact, log_weights

__all__ = [
    "AdjustedGuide",
    "Ascent",
    "Family",
    "LocalNormal",
    "family_of",
    "fit_adjustment",
    "fit_normal",
    "moments",
]

Family = Literal["diagonal", "conditional", "full", "other"]

_JITTER = 1e-6  # of a variance, so that the covariance of draws has a Cholesky factor


@dataclass(frozen=True)
class LocalNormal:
    r"""One Gaussian for each datum over all its latents, :math:`\mathcal N(\mu_i, L_i L_i^\top)`.

    Attributes:
        loc: :math:`\mu`, shape ``(B, d)``, in double precision.
        factor: Standard deviations, shape ``(B, d)``, or Cholesky factors, shape ``(B, d, d)``.
    """

    loc: Tensor
    factor: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of the factor, shape ``(B, d)``."""
        return self.factor if self.factor.ndim == 2 else self.factor.diagonal(dim1=-2, dim2=-1)

    def full(self) -> "LocalNormal":
        """Return the same Gaussians with Cholesky factors."""
        return self if self.factor.ndim == 3 else LocalNormal(self.loc, torch.diag_embed(self.factor))

    def diagonalised(self) -> "LocalNormal":
        """Return Gaussians with the same means and marginal standard deviations, independent."""
        return self if self.factor.ndim == 2 else LocalNormal(self.loc, self.factor.square().sum(-1).sqrt())

    def at(self, w: Tensor) -> Tensor:
        """Map whitened vectors ``(K, B, d)`` to latents."""
        return self.loc + self._times(w)

    def draw(self, layout: Layout, num_particles: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draw as a guide does: values of the sites, and log q in nats, shape ``(K, B)``."""
        torch.manual_seed(seed)
        noise = torch.randn(num_particles, *self.loc.shape, dtype=self.loc.dtype).to(self.loc.device)
        log_scale = self.diagonal.log().sum(-1)
        log_q = -0.5 * noise.square().sum(-1) - log_scale - layout.size / 2 * math.log(2 * math.pi)
        return layout.sites(self.at(noise)), log_q

    def moved(self, shift: Tensor, stretch: Tensor, mix: Tensor | None) -> "LocalNormal":
        r"""Change the Gaussians, in whitened coordinates: :math:`\mu + L a` and :math:`L (I + U) e^S`."""
        loc, factor = self.at(shift), self.factor
        if mix is not None:
            factor = factor + factor @ mix.tril(-1)
        scale = stretch.exp()
        return LocalNormal(loc, factor * (scale if factor.ndim == 2 else scale.unsqueeze(-2)))

    def _times(self, w: Tensor) -> Tensor:
        if self.factor.ndim == 2:
            return self.factor * w
        return (self.factor @ w.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Ascent:
    """How an optimum is looked for.

    Attributes:
        num_steps: Steps of Adam.
        num_particles: Draws behind each step, an even number.
        learning_rate: Rate at the start, in units of the standard deviation at the time; it falls to zero
            along a cosine.
        seed: Seed of the noise.
    """

    num_steps: int
    num_particles: int
    learning_rate: float
    seed: int

    def halves(self) -> tuple["Ascent", "Ascent"]:
        """Return two climbs of half the steps each, with noise of their own."""
        first = replace(self, num_steps=-(-self.num_steps // 2))
        return first, replace(self, num_steps=self.num_steps // 2, seed=self.seed + first.num_steps)

    def run(
        self,
        parameters: list[Tensor],
        rates: list[float],
        bound: Callable[[int], Tensor],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Climb ``bound(seed)``, shape ``(B,)``; each datum has rows of its own and moves as if alone."""
        groups = [
            {"params": [p], "lr": rate * self.learning_rate}
            for p, rate in zip(parameters, rates, strict=True)
        ]
        # Squares are forgotten within tens of steps, or the steep start would slow all that follows.
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        for step in range(self.num_steps):
            with torch.enable_grad():
                # Of these parameters alone: no gradient is left on the programs'.
                gradients = torch.autograd.grad(-bound(self.seed + step).sum(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            schedule.step()
            after()


def fit_normal(score: Callable[[Tensor], Tensor], start: LocalNormal, ascent: Ascent) -> LocalNormal:
    r"""Climb the ELBO of a Gaussian for each datum, from where it stands.

    .. math:: \mathrm{ELBO}_i = E_{w \sim \mathcal N(0, I)} \left[ \log p(x_i, \mu_i + L_i w)
              - \log \mathcal N(w) + \log \det L_i \right]

    Steps are taken in coordinates that the Gaussian itself whitens, so that neither a scale nor a correlation
    of the posterior slows them; gradients follow the path of the draw alone (Roeder, Wu & Duvenaud 2017,
    arXiv:1703.09194), whose noise vanishes where the family holds the posterior. Noise is fresh in every
    step, in antithetic pairs, and common to all data, so that a datum's optimum depends on no other.

    Args:
        score: Maps latents ``(K, B, d)`` to log p(x, z) in nats, shape ``(K, B)``.
        start: The Gaussians at the start; diagonal ones stay so.
        ascent: How far, and by what steps.
    """
    shape = start.loc.shape
    shift, stretch = (torch.zeros_like(start.loc).requires_grad_() for _ in range(2))
    full = start.factor.ndim == 3 and shape[1] > 1
    mix = torch.zeros_like(start.factor).requires_grad_() if full else None
    parameters = [shift, stretch] + ([] if mix is None else [mix])
    # Each entry of U is one of d in the change of a direction.
    rates = [1.0, 1.0] + ([] if mix is None else [shape[1] ** -0.5])
    now = [start]

    def bound(seed: int) -> Tensor:
        torch.manual_seed(seed)
        half = torch.randn(ascent.num_particles // 2, 1, shape[1], dtype=start.loc.dtype).to(start.loc.device)
        w = stretch.exp() * torch.cat([half, -half])
        if mix is not None:
            w = w + (mix.tril(-1) @ w.unsqueeze(-1)).squeeze(-1)
        w = w + shift
        # log q(z) up to a constant: the parameters of q are those of this moment, without gradient.
        return (score(now[0].at(w)) + 0.5 * w.square().sum(-1)).mean(0)

    @torch.no_grad()
    def settle() -> None:
        now[0] = now[0].moved(shift, stretch, mix)
        for parameter in parameters:
            parameter.zero_()

    ascent.run(parameters, rates, bound, settle)
    return now[0]


class AdjustedGuide:
    r"""A guide whose normals are shifted and stretched for each datum, in units of their own scales.

    .. math:: q_i(z_l \mid z_{>l}) = \mathcal N\left(\mu_l(x_i, z_{>l}) + a_{il} \odot \sigma_l(x_i, z_{>l}),
              \; \mathrm{diag}(e^{s_{il}} \odot \sigma_l(x_i, z_{>l}))^2\right)

    How a level depends on the draw above stays the guide's. With one site this is every diagonal Gaussian.

    Args:
        guide: A guide of diagonal normals.
        shift: :math:`a` by site, shape ``(B, *event_shape)``.
        stretch: :math:`s` by site.
    """

    def __init__(self, guide: Program, shift: Mapping[str, Tensor], stretch: Mapping[str, Tensor]) -> None:
        self.guide, self.shift, self.stretch = guide, shift, stretch

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Run the guide on the data that the adjustments belong to."""
        with _Adjust(self.shift, self.stretch):
            return _call(self.guide, x, y)

    @classmethod
    def unchanged(cls, guide: Program, layout: Layout, x: Tensor) -> "AdjustedGuide":
        """Return the guide itself, with nothing adjusted for the data ``x``."""
        zero = layout.sites(torch.zeros(len(x), layout.size, dtype=layout.dtype, device=x.device))
        return cls(guide, zero, zero)


def fit_adjustment(
    model: Program, start: AdjustedGuide, x: Tensor, y: Tensor | None, ascent: Ascent
) -> AdjustedGuide:
    """Climb the ELBO of an :class:`AdjustedGuide` for each datum, from where it stands."""
    num = ascent.num_particles
    shift, stretch = (
        {name: value.clone().requires_grad_() for name, value in part.items()}
        for part in (start.shift, start.stretch)
    )
    adjusted = AdjustedGuide(start.guide, shift, stretch)
    parameters = [*shift.values(), *stretch.values()]

    def bound(seed: int) -> Tensor:
        drawn = draw(adjusted, x, y, num, seed)
        return log_weights(model, x, y, [drawn], rows=num * len(x)).mean(0)

    ascent.run(parameters, [1.0] * len(parameters), bound)
    return adjusted


def family_of(guide: Program, x: Tensor, y: Tensor | None) -> tuple[Family, LocalNormal | None]:
    """Name a guide's family; return its Gaussians where it has one site of them.

    Returns:
        ``"diagonal"``: one site, independent normals. ``"conditional"``: several sites of them.
        ``"full"``: one multivariate normal. ``"other"``: all else.
    """
    with SiteRecorder(replace=exact) as q, particle_plate(1):
        _call(guide, x, y)
    sites = [site for site in q.sites.values() if not site.is_factor]
    found = [_normal(site.fn) for site in sites]
    if len(sites) > 1:
        return ("other" if None in found else "conditional"), None
    if found[0] is not None:
        loc, scale = (_vector(part, sites[0]) for part in found[0])
        return "diagonal", LocalNormal(loc, scale)
    fn = sites[0].fn
    if type(fn) is dist.MultivariateNormal:
        tril = fn.scale_tril.expand(1, len(x), *fn.scale_tril.shape[-2:])[0]
        return "full", LocalNormal(_vector(fn.loc, sites[0]), tril.to(_precision(tril.device)))
    return "other", None


def moments(guide: Program, x: Tensor, y: Tensor | None, layout: Layout, seed: int) -> LocalNormal:
    """Gaussians with the means and covariances of a guide's draws, for a start."""
    values, _ = draw(guide, x, y, 200 + 4 * layout.size, seed)
    z = layout.vectors(values, _precision(x.device))
    loc, std = z.mean(0), z.std(0)
    centred = (z - loc).transpose(0, 1)
    covariance = centred.mT @ centred / (len(z) - 1)
    # A latent that the guide does not move would have no direction to climb in.
    std = std.clamp(min=_JITTER)
    covariance = covariance + torch.diag_embed(_JITTER * std.square())
    return LocalNormal(loc, torch.linalg.cholesky(covariance))


class _Adjust(Messenger):
    def __init__(self, shift: Mapping[str, Tensor], stretch: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shift, self.stretch = shift, stretch

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.shift:
            return
        fn = exact(name, msg["fn"])
        normal = _normal(fn)
        if normal is None:
            raise ValueError(f"guide site {name!r} must be normal for each datum, got {type(fn).__name__}")
        loc, scale = normal
        new = dist.Normal(loc + scale * self.shift[name], scale * self.stretch[name].exp())
        msg["fn"] = new.to_event(len(fn.event_shape))


def _normal(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of independent normals."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return (fn.loc, fn.scale) if type(fn) is dist.Normal else None


def _vector(value: Tensor, site: Site) -> Tensor:
    """One row for each datum, from a parameter of the site's distribution."""
    return value.expand(site.value.shape)[0].reshape(site.value.shape[1], -1).to(_precision(value.device))
