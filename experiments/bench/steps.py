"""A training step against the same networks in hand-written PyTorch, and under Pyro's own SVI."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pvae.data import Split, from_tensors
from pvae.guides import NormalGuide
from pvae.inference import registered
from pvae.likelihoods import Bernoulli
from pvae.models import VAE
from pvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

from ..program import Program
from .hand_loops import CapturedLoop, HandLoop, HandVAE, conv_vae, mlp_vae
from .timing import Row, clock_of, interleave, row
from .training import BATCH_SIZE, count_syncs, placed, training

__all__ = ["CASES", "Case", "time_steps"]


@dataclass(frozen=True)
class Case:
    """One pair of programs, built with the library and by hand.

    Attributes:
        x_shape: Shape of one datum.
        z_dim: Size of z.
        hidden: Widths of the encoder's hidden layers; empty for the convolutional networks.
        steps: Steps in one round: a tenth of a second to half a second.
        eager_target: Largest ratio of the eager step to the eager loop that the design asks for.
    """

    x_shape: tuple[int, ...]
    z_dim: int
    hidden: tuple[int, ...]
    steps: int
    eager_target: float

    def program(self) -> Program:
        """Build model and guide with the library."""
        encoder: nn.Module
        decoder: nn.Module
        if self.hidden:
            encoder = MLPEncoder(self.x_shape, self.z_dim, self.hidden)
            decoder = MLPDecoder(self.z_dim, self.x_shape, self.hidden[::-1])
        else:
            encoder, decoder = ConvEncoder(self.x_shape, self.z_dim), ConvDecoder(self.z_dim, self.x_shape)
        return Program(VAE(StandardNormal(self.z_dim), decoder, Bernoulli()), NormalGuide(encoder))

    def hand(self) -> HandVAE:
        """Build the same networks by hand."""
        return (
            mlp_vae(torch.Size(self.x_shape).numel(), self.hidden, self.z_dim)
            if self.hidden
            else conv_vae(self.z_dim)
        )

    def levels(self) -> Tensor:
        """Draw grey images, uint8, as many as one round takes."""
        return torch.randint(256, (self.steps * BATCH_SIZE, *self.x_shape), dtype=torch.uint8)


#: The step benchmarks: digits size, MNIST size, and convolutions. The steps of each are about as long as a
#: round of the others.
CASES: dict[str, Case] = {
    "small": Case((1, 8, 8), z_dim=8, hidden=(64,), steps=100, eager_target=2.0),
    "medium": Case((1, 28, 28), z_dim=20, hidden=(400, 400), steps=25, eager_target=1.1),
    "conv": Case((1, 28, 28), z_dim=20, hidden=(), steps=5, eager_target=1.1),
}


def time_steps(name: str, device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time each engine's step against the loop, the compiled loop (``graph`` alone), the captured one
    (``cuda_graph`` alone), and stock SVI.
    """
    case = CASES[name]
    levels = case.levels()
    split = from_tensors(levels, binarize="dynamic").train.to(device)
    loops = {"loop": False, "loop, compiled": True} if "graph" in engines else {"loop": False}
    contenders: dict[str, Callable[[], object]] = {
        loop: partial(
            HandLoop(case.hand().to(device), levels.to(device), BATCH_SIZE, compiled).run, case.steps
        )
        for loop, compiled in loops.items()
    }
    if "cuda_graph" in engines:
        contenders["loop, captured"] = partial(
            CapturedLoop(case.hand().to(device), levels.to(device), BATCH_SIZE).run, case.steps
        )
    contenders["stock SVI"] = _stock(placed(case.program(), device), split, case.steps)
    syncs = {}
    for engine in engines:
        syncs[engine] = count_syncs(placed(case.program(), device), split, engine)
        contenders[engine] = training(placed(case.program(), device), split, engine, case.steps)
    seconds = interleave(contenders, rounds, clock_of(device))
    comparisons: dict[str, list[tuple[str, float | None]]] = {
        "eager": [("loop", case.eager_target), ("stock SVI", None)],
        "traced": [("loop", 1.1), ("stock SVI", None)],
        "graph": [("loop", 0.95), ("loop, compiled", 1.05), ("stock SVI", None)],
        "cuda_graph": [("loop", None), ("loop, captured", 1.05), ("stock SVI", 1 / 3)],
    }
    return [
        row(name, engine, yardstick, seconds, case.steps, target, syncs[engine])
        for engine in engines
        for yardstick, target in comparisons[engine]
    ]


def _stock(program: Program, split: Split, steps: int) -> Callable[[], object]:
    """Return one round of Pyro's own SVI with its validation off; it reads each loss back."""
    svi = SVI(
        registered(program.model, "model"),
        registered(program.guide, "guide"),
        pyro.optim.Adam({"lr": 1e-3}),
        Trace_ELBO(),
    )
    with pyro.get_param_store().scope() as own:
        pass

    def run() -> None:
        # A param store of its own, which keeps what is trained from round to round.
        with pyro.get_param_store().scope(own), pyro.validation_enabled(False):
            for batch in split.batches(BATCH_SIZE, seed=0, epoch=0, drop_last=True):
                svi.step(batch.x)

    return run
