"""A held-out log-likelihood that carries its own evidence."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .pareto import khat_share, khat_threshold

__all__ = ["LikelihoodEstimate"]


@dataclass(frozen=True)
class LikelihoodEstimate:
    r"""Importance-weighted lower bounds on log p(x), one per datum, in nats.

    ``log_prob`` is a lower bound in expectation for every number of particles and tends to log p(x) as it
    grows (Burda et al. 2016, arXiv:1509.00519v4, theorem 1). Its Monte-Carlo error is finite only where
    the weights' tail is light: ``pareto_k`` below :attr:`khat_threshold`.

    Attributes:
        log_prob: The bounds, shape ``(N,)``, double precision.
        elbo_values: Evidence lower bounds from the same draws, shape ``(N,)``.
        pareto_k: Tail index of each datum's weights, shape ``(N,)``; see :func:`pvae.evaluation.pareto_khat`.
        ess: Effective sample size of each datum's weights, shape ``(N,)``, between 1 and ``num_particles``.
        particle_error: Standard error of each ``log_prob`` from the finite number of particles, ``(N,)``.
        num_particles: Particles per datum.
        seed: Seed of the draws.
        protocol: What was scored (data set, split, binarisation, hash), if known.
        conditional: Whether the density is that of x given its label, log p(x | y).
        proposal: Name of the proposal that the latents were drawn from, where the guide has one. Estimates of
            one model under several proposals are lower bounds on the same log p(x): the one with the largest
            mean is the best. The larger of two noisy bounds datum by datum is no bound.
        num_steps: Steps T of the chain along which a density of the model is estimated, where one is (a
            diffusion's): the bound is that of the T-step model.
        calibrated: Whether the chain's reverse variances were measured on training data.
    """

    log_prob: Tensor
    elbo_values: Tensor
    pareto_k: Tensor
    ess: Tensor
    particle_error: Tensor
    num_particles: int
    seed: int
    protocol: dict[str, Any] | None = None
    conditional: bool = False
    proposal: str | None = None
    num_steps: int | None = None
    calibrated: bool | None = None

    @property
    def mean(self) -> float:
        """Mean bound in nats per datum."""
        return float(self.log_prob.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over data, nats; NaN for a single datum."""
        n = len(self.log_prob)
        return float(self.log_prob.std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the mean from the finite number of particles, nats (delta method)."""
        return float(self.particle_error.square().sum().sqrt() / len(self.particle_error))

    @property
    def elbo(self) -> float:
        """Mean evidence lower bound in nats per datum, from the same draws."""
        return float(self.elbo_values.mean())

    @property
    def khat_threshold(self) -> float:
        """Largest k-hat that is reliable with this number of particles."""
        return khat_threshold(self.num_particles)

    @property
    def khat_share(self) -> float:
        """Share of data whose k-hat is above the threshold; NaN where no k-hat could be had."""
        return khat_share(self.pareto_k, self.num_particles)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (no k-hat is ``None``)."""
        return {
            "log_likelihood": self.mean,
            "standard_error": _finite(self.standard_error),
            "monte_carlo_error": self.monte_carlo_error,
            "elbo": self.elbo,
            "khat_threshold": self.khat_threshold,
            "khat_share": _finite(self.khat_share),
            "num_data": len(self.log_prob),
            "num_particles": self.num_particles,
            "seed": self.seed,
            "conditional": self.conditional,
            "proposal": self.proposal,
            **self._chain(),
            "protocol": self.protocol,
            "per_datum": {
                "log_prob": self.log_prob.tolist(),
                "elbo": self.elbo_values.tolist(),
                "pareto_k": [_finite(k) for k in self.pareto_k.tolist()],
                "ess": self.ess.tolist(),
                "particle_error": self.particle_error.tolist(),
            },
        }

    def __str__(self) -> str:
        given = " | y" if self.conditional else ""
        drawn = "" if self.proposal is None else f", proposal {self.proposal}"
        if self.num_steps is not None:
            drawn += f", T = {self.num_steps} {'calibrated' if self.calibrated else 'uncalibrated'} steps"
        parts = [
            f"log p(x{given}) >= {self.mean:.2f} ± {self.standard_error:.2f} nats"
            f" (IWAE-{self.num_particles} on {len(self.log_prob)} data{drawn}, Monte-Carlo error"
            f" {self.monte_carlo_error:.3f}; ELBO {self.elbo:.2f})",
            self.khat_sentence,
        ]
        if self.protocol is not None:
            name, digest = self.protocol.get("name", "?"), self.protocol.get("hash", "?")
            parts.append(f"protocol {name} {digest}")
        return "; ".join(parts)

    def _chain(self) -> dict[str, Any]:
        """What a density without a chain has no word of."""
        if self.num_steps is None:
            return {}
        return {"num_steps": self.num_steps, "calibrated": self.calibrated}

    @property
    def khat_sentence(self) -> str:
        """For how many data k-hat is too high, and the remedy."""
        share = self.khat_share
        if math.isnan(share):
            return "k-hat needs 30 particles or more"
        sentence = f"k-hat > {self.khat_threshold:.2f} for {100 * share:.1f} %"
        if share > 0.05:
            sentence += (
                " (the estimate is low there: more particles, a wider guide, DefensiveGuide or"
                " annealed_likelihood)"
            )
        return sentence


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
