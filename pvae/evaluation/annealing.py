r"""Annealed importance sampling of log p(x) (Neal 2001, arXiv:physics/9803008v2; for decoders Wu et al. 2017,
arXiv:1611.04273v2).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import Reporter, reporting

from .estimate import LikelihoodEstimate
from .likelihood import _summary
from .tempering import FORWARD, Annealer, Schedule, betas_of, chain_weights, origin_of
from .weights import held_out

__all__ = ["AnnealedEstimate", "annealed_likelihood"]


@dataclass(frozen=True, kw_only=True)
class AnnealedEstimate(LikelihoodEstimate):
    r"""Annealed lower bounds on log p(x), one per datum, in nats.

    A weight is that of a whole chain: ``num_particles`` is the number of chains, ``log_prob`` the log-mean
    of their weights, a lower bound in expectation for every number of chains and steps. ``pareto_k``,
    ``ess`` and ``particle_error`` are those of the chains' weights; k-hat needs 30 of them.

    Attributes:
        start_log_prob: Log-mean of the importance weights of the chains' starts, shape ``(N,)``: the bound
            without annealing from the same draws. ``elbo_values`` are the means of their logarithms.
        acceptance: Acceptance rate of the transitions, shape ``(N,)``; NaN where there are none.
        num_steps: Steps S of the path.
        num_leapfrog: Leapfrog steps of a transition.
        start: ``"guide"`` or ``"prior"``.
        gradient_evaluations: Gradients of the joint density for each datum, the preliminary run included.
    """

    start_log_prob: Tensor
    acceptance: Tensor
    num_steps: int
    num_leapfrog: int
    start: str
    gradient_evaluations: int

    @property
    def gain(self) -> float:
        """Mean difference in nats between the bound and that of the same draws without annealing."""
        return float((self.log_prob - self.start_log_prob).mean())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold (no k-hat is ``None``)."""
        row = super().to_dict()
        rate = float(self.acceptance.mean())
        row |= {
            "num_chains": row.pop("num_particles"),
            "num_steps": self.num_steps,
            "num_leapfrog": self.num_leapfrog,
            "start": self.start,
            "gradient_evaluations": self.gradient_evaluations,
            "acceptance": None if rate != rate else rate,
            "start_log_likelihood": float(self.start_log_prob.mean()),
        }
        row["per_datum"]["start_log_prob"] = self.start_log_prob.tolist()
        return row

    def __str__(self) -> str:
        given = " | y" if self.conditional else ""
        drawn = self.start if self.proposal is None else f"{self.start}, proposal {self.proposal}"
        parts = [
            f"log p(x{given}) >= {self.mean:.2f} ± {self.standard_error:.2f} nats"
            f" (AIS, {self.num_chains} chains of {self.num_steps} steps from the {drawn}, on"
            f" {len(self.log_prob)} data, Monte-Carlo error {self.monte_carlo_error:.3f};"
            f" {self.gain:+.2f} by annealing, acceptance {float(self.acceptance.mean()):.2f})"
        ]
        if self.khat_share > 0.05:
            parts.append(
                f"k-hat > {self.khat_threshold:.2f} for {100 * self.khat_share:.1f} %"
                " (the estimate is low there: more steps)"
            )
        if self.protocol is not None:
            parts.append(f"protocol {self.protocol.get('name', '?')} {self.protocol.get('hash', '?')}")
        return "; ".join(parts)

    @property
    def num_chains(self) -> int:
        """Chains of each datum."""
        return self.num_particles


def annealed_likelihood(
    model: Program,
    guide: Program | None,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_chains: int = 16,
    num_steps: int = 250,
    schedule: Schedule | Tensor = "linear",
    num_leapfrog: int = 2,
    start: Literal["guide", "prior"] = "guide",
    batch_size: int | None = None,
    memory: int | None = None,
    compile: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> AnnealedEstimate:
    r"""Bound log p(x) of held-out data from below by chains that lead from the guide to the posterior.

    .. math:: \log \frac1K \sum_{k=1}^K w_k, \qquad
              \log w = \sum_{s=1}^{S} (\beta_s - \beta_{s-1})
              \left(\log p(x, z_{s-1}) - \log q(z_{s-1} \mid x)\right), \qquad
              z_s \sim T_{\beta_s}(\cdot \mid z_{s-1})

    with :math:`z_0 \sim q` and transitions :math:`T_\beta` of Hamiltonian Monte Carlo that leave
    :math:`q^{1-\beta} p(x, z)^\beta` invariant. As :math:`\mathbb E\, w = p(x)`, the log-mean is below log
    p(x) in expectation, for any number of chains and steps, and tends to it as steps grow; above the true
    value by more than t nats it is with a probability below :math:`e^{-t}` (Markov's inequality; Grosse et
    al. 2015, arXiv:1511.02543v1). One step is :func:`log_likelihood` with ``num_chains``
    particles, draw by draw. What is missing to log p(x) is measured by :func:`bidirectional`, on data that
    the model makes.

    Transitions are fixed before the chains start: leapfrog steps come from a preliminary run of 16 chains
    whose draws are thrown away. Noise is drawn for each block of 32 data; estimates depend neither on
    ``batch_size`` nor on the other data, up to rounding (which in single precision can turn one acceptance
    of many thousands).

    The cost is in gradients of log p(x, z) in z: for a datum ``num_chains * (1 + (num_steps - 1) *
    num_leapfrog)`` and those of the preliminary run, :attr:`AnnealedEstimate.gradient_evaluations` in all. On
    a CPU one takes the time of 2.5 bare passes of a decoder of MNIST's size (two layers of 500), and of 6
    where the decoder is so small that the rest counts. Guides of one latent run once. Those of several run
    with every gradient; where 256 or more of some data are wanted, these are recorded as a graph, of the same
    values, in which features of x are known.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``, whose latents are real and whose densities
            are exact.
        guide: The guide program; ``None`` is allowed where chains start from the prior.
        x: Data, shape ``(N, *x_shape)``, or a split of a data set, which brings its protocol along.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_chains: Chains K per datum.
        num_steps: Steps S of the path, transitions and one.
        schedule: ``"sigmoid"``, ``"linear"`` or ``"power"``, or the places :math:`\beta_0, \ldots, \beta_S`
            themselves, which rise from 0 to 1 (``num_steps`` is then passed over).
        num_leapfrog: Leapfrog steps of a transition.
        start: What :math:`z_0` is drawn from: the guide, or the model's prior (longer paths, better spaced by
            ``"power"``, for posteriors with modes that the guide leaves out).
        batch_size: Data in one pass; by default as many as fit into a few megabytes.
        memory: Bytes that a pass keeps within; fewer chains at a time where they need more. See
            :func:`log_likelihood`.
        compile: Whether densities and gradients go through ``torch.compile``: chains take the same steps up
            to rounding, which over many can turn an acceptance. See :func:`log_likelihood`.
        seed: Seed of the draws.
        progress: Whether to show a bar; by default on a terminal only.

    Returns:
        The estimate: a lower bound in expectation, per datum, with the same evidence as
        :func:`log_likelihood`'s.

    Raises:
        ValueError: For sizes that are not positive, a schedule that does not rise from 0 to 1, latents that
            are not real, a density that is an estimate or a bound, a missing guide, and whatever
            :func:`log_likelihood` refuses.
        TypeError: If ``x`` is neither a tensor nor a split.

    Example:
        >>> print(annealed_likelihood(model, guide, data.test, num_steps=500))  # doctest: +SKIP
    """
    origin = origin_of(start, guide)
    betas = betas_of(schedule, num_steps)
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    rounding = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
    steps = len(betas) - 1
    parts = []
    with evaluating(model, guide), reporting("annealing", len(x) * steps, progress) as report:
        annealer = Annealer(
            model,
            origin,
            x.to(device),
            None if y is None else y.to(device),
            betas,
            num_chains=num_chains,
            num_leapfrog=num_leapfrog,
            seed=seed,
            batch_size=batch_size,
            memory=memory,
            compile=compile,
        )
        for chains in annealer.passes():
            size, first = chains.start.shape[1], chains.part.start
            show = partial(shown, report, first * steps, size * steps)
            log_w, log_w_start, acceptance = chain_weights(annealer, chains, chains.start, FORWARD, show)
            log_prob, _, khat, ess, error = _summary(log_w.T.cpu().double(), rounding, first)
            log_prob_start, elbo, *_ = _summary(log_w_start.T.cpu().double(), rounding, first)
            rate = acceptance.cpu().double()
            parts.append((log_prob, elbo, khat, ess, error, log_prob_start, rate))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    log_prob, elbo, khat, ess, error, start_log_prob, acceptance = columns
    return AnnealedEstimate(
        log_prob,
        elbo,
        khat,
        ess,
        error,
        num_chains,
        seed,
        protocol,
        conditional=y is not None,
        proposal=getattr(origin, "proposal_name", None),
        start_log_prob=start_log_prob,
        acceptance=acceptance,
        num_steps=steps,
        num_leapfrog=num_leapfrog,
        start=start,
        gradient_evaluations=annealer.gradient_evaluations,
    )


def shown(report: Reporter, before: int, size: int, share: float) -> None:
    """Report a share of some part of the work, after what was done before it."""
    report(before + round(share * size))
