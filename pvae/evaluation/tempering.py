r"""Annealing the latents of a program from its guide, or its prior, to its posterior (Neal 2001,
arXiv:physics/9803008v2).

.. math:: f_\beta(z) = q(z \mid x)^{1 - \beta} \, p(x, z)^\beta, \qquad
          0 = \beta_0 < \beta_1 < \dots < \beta_S = 1

Chains start at :math:`z_0 \sim q` and move by transitions that leave :math:`f_{\beta_1}, f_{\beta_2}, \ldots`
invariant; their weight

.. math:: \log w = \sum_{s=1}^{S} (\beta_s - \beta_{s-1})
                   \left(\log p(x, z_{s-1}) - \log q(z_{s-1} \mid x)\right)

is that of importance sampling on the whole path of the chain, and :math:`\mathbb E\, w = p(x)`. Started from
the prior instead, :math:`f_\beta = p(z)\, p(x \mid z)^\beta`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pvae.distributions import declared
from pvae.inference.program import Program

from .blocks import BLOCK, BLOCK_NUMBERS, block_of, block_seed, rows_per_pass
from .hmc import Noise, Point, transition
from .latents import _run, latent_names
from .layout import Layout, check_real
from .memory import Budget, check_memory
from .path import Path, Paths, bytes_of_state
from .weights import draw, exact

__all__ = [
    "FORWARD",
    "REVERSE",
    "Annealer",
    "Chains",
    "Schedule",
    "betas_of",
    "chain_weights",
    "origin_of",
]

Schedule = Literal["sigmoid", "linear", "power"] | Sequence[float]

# Chains that share a generator and a pass of the decoder.
_GROUP = 64
# Streams of random numbers that chains move by, there and back.
FORWARD, REVERSE = 4, 5
# The preliminary run: its chains, its transitions before it moves along the path, at most so many places
# where it stops there, and transitions at each.
_TRIAL_CHAINS = 16
_WARM_UP = 16
_MOST_KNOTS = 48
_LONGEST_STAY = 3
# Acceptance that steps are adapted to, how fast, and how fast the spread of chains is forgotten.
_TARGET = 0.7
_RATE = 0.3
_FORGETTING = 0.2
_TINY = 1e-12


def betas_of(schedule: Schedule | Tensor, num_steps: int) -> Tensor:
    r"""Places on the path, from 0 to 1, shape ``(num_steps + 1,)``, double precision.

    ``"linear"``: :math:`s / S`. ``"sigmoid"``: dense at both ends, :math:`\sigma(4 (2 s / S - 1))` scaled to
    [0, 1] (Grosse et al. 2015, arXiv:1511.02543v1). ``"power"``: :math:`(s / S)^3`, dense at the
    start, for paths that begin where the posterior is not.

    Args:
        schedule: One of the words, or the places themselves.
        num_steps: Number of steps S; passed over where the places are given.

    Raises:
        ValueError: If ``num_steps`` is not positive, the word is another, or places do not rise strictly
            from 0 to 1.
    """
    if not isinstance(schedule, str):
        betas = torch.as_tensor(schedule, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or (betas.diff() <= 0).any():
            raise ValueError(f"schedule must rise strictly from 0 to 1, got {schedule}")
        return betas
    if num_steps < 1:
        raise ValueError(f"num_steps must be positive, got {num_steps}")
    place = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if schedule == "linear":
        return place
    if schedule == "power":
        return place**3
    if schedule != "sigmoid":
        raise ValueError(f"schedule must be 'sigmoid', 'linear', 'power' or numbers, got {schedule!r}")
    place = torch.sigmoid(4 * (2 * place - 1))
    return (place - place[0]) / (place[-1] - place[0])


def origin_of(start: str, guide: Program | None) -> Program | None:
    """The guide that chains start from, or ``None`` for the prior.

    Raises:
        ValueError: If ``start`` is neither, or the guide is missing.
    """
    if start not in ("guide", "prior"):
        raise ValueError(f"start must be 'guide' or 'prior', got {start!r}")
    if start == "guide" and guide is None:
        raise ValueError("guide must be given where chains start from it, got None")
    return guide if start == "guide" else None


@dataclass(frozen=True)
class _Steps:
    """Leapfrog steps for every place of the path: of the nearest place that the preliminary run came by."""

    sizes: Tensor  # (T, B, D)
    num_places: int

    def __call__(self, place: int) -> Tensor:
        return self.sizes[place * len(self.sizes) // self.num_places]


@dataclass(frozen=True)
class Chains:
    """The chains of some data, ready to run.

    Attributes:
        part: Which data these are.
        path: Their densities.
        start: Draws of the guide (or the prior), shape ``(K, B, D)``.
        steps: Leapfrog steps for a place on the path; ``None`` where chains never move.
        truth: For simulated data, the latents that they were made from, shape ``(B, D)``.
    """

    part: slice
    path: Path
    start: Tensor
    steps: _Steps | None
    truth: Tensor | None
    _seeds: tuple[int, ...]
    _block: int

    def groups(self, stream: int) -> Iterator[tuple[slice, Noise]]:
        """Cut the chains into groups that are run one by one, each with its random numbers."""
        for number, first in enumerate(range(0, len(self.start), _GROUP)):
            group = slice(first, min(first + _GROUP, len(self.start)))
            yield group, self.noise(stream, group.stop - group.start, number)

    def noise(self, stream: int, num_chains: int, group: int = 0) -> Noise:
        """Random numbers of one group of chains in one of several independent runs (``stream``)."""
        seeds = [_stream(seed, stream + 16 * group) for seed in self._seeds]
        return Noise(seeds, num_chains, self._block, self.start.shape[1], self.start)


class Annealer:
    """What annealing needs besides a direction: checks, batches, seeds, and steps found beforehand.

    Leapfrog steps come from a preliminary run of 16 chains along the path, whose draws are thrown away: given
    them the transitions are fixed, so that weights stay unbiased. They follow each datum's acceptance rate
    and the spread of its chains, dimension by dimension, and depend on no other datum.

    Args:
        model: The model program.
        guide: The guide, or ``None`` to start from the prior.
        x: Data on the programs' device, shape ``(N, *x_shape)``; with ``simulate``, only their shape counts.
        y: Contexts.
        betas: Places on the path, shape ``(S + 1,)``.
        num_chains: Chains K of each datum.
        num_leapfrog: Leapfrog steps of a transition.
        seed: Seed of everything that is drawn.
        batch_size: Data in one pass, rounded to blocks; by default as many as fit.
        moves_at_end: Whether chains also move at the last place.
        simulate: Whether the model's own draws take the place of x.
        memory: Bytes that a pass keeps within; the default of :func:`log_likelihood` if ``None``.
        compile: Whether densities and gradients are compiled.

    Raises:
        ValueError: For sizes that are not positive, or programs that cannot be annealed.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        x: Tensor,
        y: Tensor | None,
        betas: Tensor,
        *,
        num_chains: int,
        num_leapfrog: int,
        seed: int,
        batch_size: int | None,
        moves_at_end: bool = False,
        simulate: bool = False,
        memory: int | None = None,
        compile: bool = False,
    ) -> None:
        _check_sizes(num_chains=num_chains, num_leapfrog=num_leapfrog, batch_size=batch_size)
        self.model, self.guide, self.x, self.y = model, guide, x, y
        self.increments = betas.diff().tolist()
        self.places = betas[1:].tolist() if moves_at_end else betas[1:-1].tolist()
        self.num_chains, self.num_leapfrog, self.seed = num_chains, num_leapfrog, seed
        self.simulate = simulate
        # The prior as a guide: the model with its data out of sight.
        self._proposal = pyro.poutine.block(model, hide_fn=_is_observed) if guide is None else guide
        self.layout = _checked_layout(model, self._proposal, x, y)
        self._block = min(BLOCK, max(1, BLOCK_NUMBERS // (num_chains * self.layout.size)))
        rows = rows_per_pass(x)
        fitting = batch_size or rows // max(_TRIAL_CHAINS, min(num_chains, _GROUP))
        budget = Budget(check_memory(memory, x.device), x.device)
        states = budget.rows(bytes_of_state(model, guide, x, y, self.layout), quick=False)
        self._states = states
        self._blocks = max(1, min(fitting, states) // self._block)
        # A short path is walked slowly, for steps to follow it.
        most = _MOST_KNOTS if len(self.places) >= 2 * _MOST_KNOTS else _MOST_KNOTS // 2
        self._knots = min(len(self.places), most)
        self._stay = min(_LONGEST_STAY, _MOST_KNOTS // max(1, self._knots))
        self._paths = Paths(model, guide, self.layout, states, self._evaluations(), compile)

    @property
    def gradient_evaluations(self) -> int:
        """Gradients of the joint density that a run costs a datum, the preliminary run's included."""
        if not self.places:
            return self.num_chains
        there = self.num_chains * (1 + len(self.places) * self.num_leapfrog)
        return _TRIAL_CHAINS * (1 + self._trial * self.num_leapfrog) + there

    @property
    def _trial(self) -> int:
        """Transitions of the preliminary run."""
        return _WARM_UP + self._knots * self._stay if self.places else 0

    def _evaluations(self) -> Counter[int]:
        """How often the densities of some data are asked for, by the number of chains."""
        counts = Counter({_TRIAL_CHAINS: self._trial * self.num_leapfrog})
        for start in range(0, self.num_chains, _GROUP):
            ways = 2 if self.simulate else 1
            counts[min(_GROUP, self.num_chains - start)] += ways * len(self.places) * self.num_leapfrog
        return counts

    def passes(self) -> Iterator[Chains]:
        """Prepare the data pass by pass: draw the starts, find the steps."""
        size = self._blocks * self._block
        for start in range(0, len(self.x), size):
            part = slice(start, min(start + size, len(self.x)))
            num = part.stop - part.start
            firsts = range(start, part.stop, self._block)
            seeds = tuple(block_seed(self.seed, i // self._block) for i in firsts)
            blocks = [block_of(self.x, self.y, i, self._block) for i in firsts]
            truth = None
            if self.simulate:
                made = [self._simulated(*b, seed) for b, seed in zip(blocks, seeds, strict=True)]
                blocks = [(x, y) for (x, _), (_, y) in zip(made, blocks, strict=True)]
                truth = torch.cat([z for _, z in made])[:num]
            x = torch.cat([x for x, _ in blocks])[:num]
            y = None if self.y is None else self.y[part]
            path = self._paths(x, y)
            # The seeds of importance sampling itself: with one step the two are the same.
            z = self._draws(blocks, seeds, self.num_chains)[:, :num]
            chains = Chains(part, path, z, None, truth, seeds, self._block)
            if self.places:
                trial = self._draws(blocks, tuple(_stream(s, 1) for s in seeds), _TRIAL_CHAINS)[:, :num]
                chains = replace(chains, steps=self._found_steps(path, trial, chains.noise(2, len(trial))))
            yield chains

    def _draws(
        self, blocks: list[tuple[Tensor, Tensor | None]], seeds: tuple[int, ...], num_chains: int
    ) -> Tensor:
        found = [
            draw(self._proposal, x, y, num_chains, seed, rows=self._states)[0]
            for (x, y), seed in zip(blocks, seeds, strict=True)
        ]
        return torch.cat([self.layout.vectors(values) for values in found], 1)

    def _simulated(self, x: Tensor, y: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Draw latents and data from the model, as many as ``x`` has rows: ``(B, *x_shape)``, ``(B, D)``."""
        torch.manual_seed(_stream(seed, 3))
        sites = _run(self.model, x, y)
        observed, *more = (s for s in sites.values() if s.observed and not s.is_factor)
        if more or observed.value is not x:
            raise ValueError(
                f"model must observe x as it is, in one site, for data to be simulated, got {observed.name!r}"
                + "".join(f" and {s.name!r}" for s in more)
            )
        made = observed.fn.sample().to(x.dtype)
        values = {name: sites[name].value for name in self.layout.names}
        again = _run(self.model, made, y, values)[observed.name]
        if not torch.allclose(again.fn.log_prob(made), observed.fn.log_prob(made), 1e-4, 1e-3):
            raise ValueError(
                f"model site {observed.name!r} must not depend on x itself for data to be simulated"
            )
        return made, self.layout.vectors({name: v.unsqueeze(0) for name, v in values.items()})[0]

    def _found_steps(self, path: Path, z: Tensor, noise: Noise) -> _Steps:
        """Run chains along the path and write down steps that suit each datum there."""
        knots = [i * len(self.places) // self._knots for i in range(self._knots)]
        point = path(z)
        variance = z.var(0).clamp_(min=_TINY)
        log_step = torch.full_like(variance[:, 0], 0.5).div_(self.layout.size**0.25).log_()
        sizes = []
        for number, place in enumerate([knots[0]] * _WARM_UP + [k for k in knots for _ in range(self._stay)]):
            step = log_step.exp().unsqueeze(-1) * variance.sqrt()
            if number >= _WARM_UP and (number + 1 - _WARM_UP) % self._stay == 0:
                sizes.append(step)
            point, probability = transition(path, point, self.places[place], step, self.num_leapfrog, noise)
            log_step = log_step + _RATE * (probability.mean(0) - _TARGET).to(log_step)
            variance = torch.lerp(variance, point.z.var(0).clamp_(min=_TINY), _FORGETTING)
        return _Steps(torch.stack(sizes), len(self.places))


def _anneal(
    annealer: Annealer, chains: Chains, z: Tensor, noise: Noise, reverse: bool = False
) -> Iterator[tuple[Tensor, Point, Tensor]]:
    r"""Move chains along the path, from its start to its end or, in ``reverse``, back.

    In reverse, from draws of the exact posterior, every weight and transition is that of the way there in the
    opposite order, and :math:`\mathbb E\, 1/w = 1/p(x)`.

    Args:
        annealer: What runs.
        chains: Data, densities and steps.
        z: Where the chains start, shape ``(K, B, D)``.
        noise: Their random numbers.
        reverse: The direction.

    Yields:
        After each step: log-weights so far ``(K, B)``, where the chains are, and the acceptance probability
        so far, mean over transitions and chains, ``(B,)``.
    """
    increments, places = annealer.increments, list(enumerate(annealer.places))
    if reverse:
        increments, places = increments[::-1], places[::-1]
    point = chains.path(z)
    log_w = torch.zeros_like(point.log_start)
    accepted = torch.zeros_like(log_w[0])
    for number, increment in enumerate(increments):
        log_w = log_w + increment * (point.log_end - point.log_start)
        if number < len(places):
            assert chains.steps is not None
            index, place = places[number]
            step = chains.steps(index)
            point, probability = transition(chains.path, point, place, step, annealer.num_leapfrog, noise)
            accepted = accepted + (probability.mean(0) - accepted) / (number + 1)
        yield log_w, point, accepted


def chain_weights(
    annealer: Annealer,
    chains: Chains,
    z: Tensor,
    stream: int,
    report: Callable[[float], object],
    *,
    reverse: bool = False,
    visit: Callable[[int, Tensor, Point], object] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all chains of some data, a group at a time.

    Args:
        annealer: What runs.
        chains: Data, densities and steps.
        z: Where the chains start, shape ``(K, B, D)``.
        stream: Which random numbers they take.
        report: Told what share of the work is done.
        reverse: The direction.
        visit: Shown every step of every group of chains: its number from 1 on, log-weights and states.

    Returns:
        Log-weights ``(K, B)``, those of the chains' starts without annealing, and acceptance rates ``(B,)``,
        NaN where nothing moves.
    """
    found = []
    total = len(annealer.increments) * len(z)
    for group, noise in chains.groups(stream):
        width = group.stop - group.start
        for number, state in enumerate(_anneal(annealer, chains, z[group], noise, reverse)):
            log_w, point, accepted = state
            if number == 0:
                # The first step's weight is the whole ratio at the start, to the power of the step.
                first = log_w / annealer.increments[-1 if reverse else 0]
            if visit is not None:
                visit(number + 1, log_w, point)
            report((group.start * len(annealer.increments) + width * (number + 1)) / total)
        found.append((log_w, first, accepted.expand_as(log_w)))
    log_w, first, accepted = (torch.cat(column) for column in zip(*found, strict=True))
    return log_w, first, accepted.mean(0) if annealer.places else torch.full_like(accepted[0], math.nan)


def _checked_layout(model: Program, proposal: Program, x: Tensor, y: Tensor | None) -> Layout:
    """Check both programs on two data; find out what latents there are.

    Raises:
        ValueError: For a latent that is not real, a density that is none, or programs outside the contract.
    """
    two = slice(0, 2)
    y_two = None if y is None else y[two]
    sites = _run(model, x[two], y_two)
    for site in sites.values():
        kind = declared(site.fn, "density", "exact")
        if kind == "bound":
            raise ValueError(
                f"model site {site.name!r} has only a stochastic lower bound of its log-density, "
                "which annealing cannot raise to a power"
            )
        if kind != "exact":
            # An estimate raised to the power beta is biased, and its noise would have to stand still while
            # a chain moves.
            raise ValueError(
                f"model site {site.name!r} has only an estimate of its density, which has no gradient "
                "that a chain could follow: take log_likelihood"
            )
    check_real(sites, "model")
    names = latent_names(model, proposal, x, y)
    if not names:
        raise ValueError("model must have a latent to be annealed, got none")
    check_real(_run(proposal, x[two], y_two, replace=exact), "guide")
    return Layout({name: sites[name].value.shape[1:] for name in names}, sites[names[0]].value.dtype)


def _check_sizes(num_chains: int, num_leapfrog: int, batch_size: int | None) -> None:
    sizes = {"num_chains": num_chains, "num_leapfrog": num_leapfrog, "batch_size": batch_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be positive, got {size}")


def _is_observed(msg: Any) -> bool:
    return bool(msg["type"] == "sample" and msg["is_observed"])


def _stream(seed: int, stream: int) -> int:
    """Seed of an independent stream of a block's random numbers; stream 0 is the seed itself."""
    return (seed + stream * 0x9E3779B97F4A7C15) % 2**63
