"""The step of an aligned model, directly and through a flow, against the plain step (see docs/divae.md)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pvae.alignment import align
from pvae.data import Split, from_tensors
from pvae.density import DensityTarget
from pvae.guides import NormalGuide
from pvae.likelihoods import Bernoulli, Likelihood, Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal

from ..program import Program
from .timing import Row, clock_of, interleave, row
from .training import BATCH_SIZE, count_syncs, placed, training

__all__ = ["ALIGNED", "AlignedCase", "time_alignment"]

Kind = Literal["plain", "direct", "flow"]

_COMPONENTS = 10


@dataclass(frozen=True)
class AlignedCase:
    """Networks and prior of one size.

    Attributes:
        x_shape: Shape of one datum: images take bits, vectors real numbers.
        z_dim: Size of z.
        hidden: Widths of the encoder's hidden layers, the decoder's in reverse.
        mixture: Whether the prior is a learned mixture of ten, or N(0, I).
        steps: Steps in one round: a tenth of a second to half a second.
    """

    x_shape: tuple[int, ...]
    z_dim: int
    hidden: tuple[int, ...]
    mixture: bool
    steps: int

    def split(self) -> Split:
        """Draw as many data as one round takes."""
        shape = (self.steps * BATCH_SIZE, *self.x_shape)
        if len(self.x_shape) == 1:
            return from_tensors(torch.randn(shape)).train
        return from_tensors(torch.randint(256, shape, dtype=torch.uint8), binarize="dynamic").train

    def program(self, kind: Kind, num_data: int) -> Program:
        """Build model and guide, with an alignment where ``kind`` names one.

        What is aligned with is the log-density of a standard normal embedding, written down and not
        estimated, as the prior can have it: nothing but the step is timed.

        Args:
            kind: ``"plain"``, ``"direct"`` or ``"flow"``.
            num_data: Number of training data.
        """
        prior = GaussianMixture(self.z_dim, _COMPONENTS) if self.mixture else StandardNormal(self.z_dim)
        likelihood: Likelihood = Normal() if len(self.x_shape) == 1 else Bernoulli()
        encoder = MLPEncoder(self.x_shape, self.z_dim, self.hidden)
        decoder = MLPDecoder(self.z_dim, self.x_shape, self.hidden[::-1])
        model: nn.Module = VAE(prior, decoder, likelihood)
        program = Program(model, NormalGuide(encoder))
        if kind == "plain":
            return program
        u = torch.randn(num_data, self.z_dim)
        rho = StandardNormal(self.z_dim)().log_prob(u)
        with warnings.catch_warnings():
            # A flow under a learned prior costs the same step, whatever becomes of the prior.
            warnings.filterwarnings("ignore", "a flow takes up the scale of a prior")
            return Program(*align(*program, DensityTarget.known(rho, embedding=u), kind=kind))


#: Sizes by name: that of the paper's networks for MNIST, a tiny one, and that of the benchmark ``medium``.
ALIGNED: dict[str, AlignedCase] = {
    "784-300-300-10": AlignedCase((1, 28, 28), z_dim=10, hidden=(300, 300), mixture=True, steps=25),
    "50-25-2": AlignedCase((50,), z_dim=2, hidden=(25,), mixture=False, steps=100),
    "784-400-400-20": AlignedCase((1, 28, 28), z_dim=20, hidden=(400, 400), mixture=False, steps=25),
}

# Largest ratio to the plain step that the design asks for.
_TARGETS: dict[Kind, float | None] = {"direct": 1.1, "flow": None}


def time_alignment(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time one step of each alignment beside the plain one, at several sizes.

    Args:
        device: Where to run.
        rounds: Interleaved rounds; all engines of one size take turns.
        engines: Engines to time; each alignment is compared with the plain step of its own.
    """
    rows = []
    for name, case in ALIGNED.items():
        split = case.split().to(device)

        def program(kind: Kind, case: AlignedCase = case, split: Split = split) -> Program:
            return placed(case.program(kind, len(split)), device)

        kinds: tuple[Kind, ...] = ("plain", *_TARGETS)
        contenders: dict[str, Callable[[], object]] = {
            f"{engine}, {kind}": training(program(kind), split, engine, case.steps)
            for engine in engines
            for kind in kinds
        }
        seconds = interleave(contenders, rounds, clock_of(device))
        for engine in engines:
            for kind, target in _TARGETS.items():
                syncs = count_syncs(program(kind), split, engine)
                ours, plain = f"{engine}, {kind}", f"{engine}, plain"
                found = row("alignment", ours, plain, seconds, case.steps, target, syncs)
                rows.append(found | {"yardstick": f"plain, {name}"})
    return rows
