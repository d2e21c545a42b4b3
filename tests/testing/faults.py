"""A right estimator of log p(x) in plain Pyro, and the ways to get it wrong that have been published."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "AnalyticKL",
    "Estimate",
    "Estimator",
    "FactorsLeftIn",
    "ForgetfulFlow",
    "LeftInTraining",
    "MissingLogQ",
    "PooledKhat",
    "RefittedVariance",
    "ScalesLeftIn",
    "sites",
]

# Data in one pass; the last pass is filled up, so that the draws of a datum depend on its position alone.
_BLOCK = 16


@dataclass(frozen=True)
class Estimate:
    """Bounds and tail indices, each of shape ``(N,)``."""

    log_prob: Tensor
    pareto_k: Tensor


class Estimator:
    """The right one: importance weights from two traces, block by block, tail indices by Hill's estimate."""

    training = False

    def __call__(
        self,
        model: nn.Module,
        guide: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        *,
        num_particles: int,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> Estimate:
        # Copies: whatever is switched in them, the originals stay as they are.
        model, guide = copy.deepcopy(model), copy.deepcopy(guide)
        model.train(self.training)
        guide.train(self.training)
        rows = []
        with torch.no_grad(), torch.random.fork_rng():
            for start in range(0, len(x), _BLOCK):
                index = torch.arange(start, start + _BLOCK).clamp(max=len(x) - 1)
                torch.manual_seed(1_000_003 * seed + start)
                inputs = (x[index], None if y is None else y[index])
                with pyro.plate("particles", num_particles, dim=-2):
                    q = poutine.trace(guide).get_trace(*inputs)
                    p = poutine.trace(poutine.replay(model, q)).get_trace(*inputs)
                rows.append(self.log_weights(p, q).T)
        log_w = torch.cat(rows)[: len(x)]
        return Estimate(log_w.logsumexp(-1) - math.log(num_particles), self.khat(log_w))

    def log_weights(self, p: Any, q: Any) -> Tensor:
        """Return log p(x, z) - log q(z | x), shape ``(K, B)``."""
        return self.log_prob(p) - self.log_prob(q)

    def log_prob(self, trace: Any) -> Tensor:
        """Add up the log-densities of a trace's sites."""
        return torch.stack([self.term(site) for site in sites(trace).values()]).sum(0)

    def term(self, site: Any) -> Tensor:
        """One site's log-density, shape ``(K, B)``."""
        return site["fn"].log_prob(site["value"])

    def khat(self, log_w: Tensor) -> Tensor:
        """Hill's estimate of each row's tail index from its largest weights."""
        most = min(log_w.shape[-1] // 5, int(3 * math.sqrt(log_w.shape[-1]))) + 1
        top = log_w.topk(most).values
        return (top - top[:, -1:]).mean(-1)


def sites(trace: Any, factors: bool = False) -> dict[str, Any]:
    """Sample sites of a trace without plates, and without factors unless asked."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not isinstance(site["fn"], poutine.subsample_messenger._Subsample)
        and (factors or site["value"].numel())
    }


class AnalyticKL(Estimator):
    """Closed-form KL in the weights: log E_q p(x | z) - KL(q || p) is no bound on log p(x)."""

    def log_weights(self, p: Any, q: Any) -> Tensor:
        latent = sites(q)["z"]["fn"], sites(p)["z"]["fn"]
        return sites(p)["x"]["fn"].log_prob(sites(p)["x"]["value"]) - _kl(*latent)


def _kl(q: Any, p: Any) -> Tensor:
    if isinstance(q, dist.MultivariateNormal):
        p = dist.MultivariateNormal(p.mean, scale_tril=p.variance.sqrt().diag_embed())
    return torch.distributions.kl_divergence(q, p)


class MissingLogQ(Estimator):
    """The density of the draws forgotten."""

    def log_weights(self, p: Any, q: Any) -> Tensor:
        return self.log_prob(p)


class FactorsLeftIn(Estimator):
    """Every sample site of the trace counted, as ``Trace.log_prob_sum`` does: ``pyro.factor`` among them."""

    def log_prob(self, trace: Any) -> Tensor:
        return torch.stack([self.term(site) for site in sites(trace, factors=True).values()]).sum(0)


class ScalesLeftIn(Estimator):
    """Log-probabilities taken as a trace computes them, scaled for training."""

    def term(self, site: Any) -> Tensor:
        return super().term(site) * site["scale"]


class RefittedVariance(Estimator):
    """The decoder's standard deviation set to the error on the data that are scored."""

    def term(self, site: Any) -> Tensor:
        fn = site["fn"]
        if site["is_observed"] and isinstance(getattr(fn, "base_dist", None), dist.Normal):
            scale = (site["value"] - fn.mean).square().mean().sqrt()
            return dist.Normal(fn.mean, scale).to_event(1).log_prob(site["value"])
        return super().term(site)


class LeftInTraining(Estimator):
    """Programs run in training mode, where a likelihood may refit itself to the batch."""

    training = True


class PooledKhat(Estimator):
    """One tail index for the weights of all data together."""

    def khat(self, log_w: Tensor) -> Tensor:
        return super().khat(log_w.reshape(1, -1)).expand(len(log_w))


class ForgetfulFlow(dist.TorchDistribution):
    r"""A coupling with the density of :math:`z = f^{-1}(\epsilon)`, but sampled as :math:`z = f(\epsilon)`.

    With ``forgetful`` false the sampler applies the inverse and is right.

    Args:
        weight: Slopes of log-scale and shift, shape ``(2,)``.
        forgetful: Whether the sampler ignores the inverse.
        dim: Number of dimensions, even.
    """

    arg_constraints = {"weight": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, weight: Tensor, forgetful: bool, dim: int = 2, batch_shape: Sequence[int] = ()
    ) -> None:
        self.weight, self.forgetful, self.dim = weight, forgetful, dim
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ForgetfulFlow":
        return ForgetfulFlow(self.weight, self.forgetful, self.dim, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.weight.dtype)
        first, second = noise.chunk(2, -1)
        log_scale, shift = self._conditioner(first)
        moved = second * log_scale.exp() + shift if self.forgetful else (second - shift) * (-log_scale).exp()
        return torch.cat([first, moved], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        first, second = value.chunk(2, -1)
        log_scale, shift = self._conditioner(first)
        noise = torch.cat([first, second * log_scale.exp() + shift], -1)
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return (normal + log_scale.sum(-1)).expand(shape)

    def _conditioner(self, first: Tensor) -> tuple[Tensor, Tensor]:
        slope, shift = self.weight.unbind(-1)
        return torch.tanh(slope * first), shift * first
