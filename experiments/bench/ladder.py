"""The step of a ladder under a diffusion prior of pseudoinputs, against the plain ladder and against the same
step written by hand (see docs/dvp-vae.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pvae.data import Split, from_tensors
from pvae.guides import LadderGuide
from pvae.inference import ELBO
from pvae.likelihoods import Bernoulli
from pvae.models import Ladder
from pvae.nn import BottomUp, DCTPseudoinput, LadderSpec, MLPDenoiser, PseudoinputPosterior, TopDown
from pvae.priors import DiffusionPrior

from ..program import Program
from .hand_ladder import HandLadder
from .hand_loops import HandLoop, adamax
from .timing import Row, clock_of, interleave, row
from .training import count_syncs, placed, training

__all__ = ["LADDERS", "LadderCase", "copied", "disagreement", "ladder_syncs", "time_ladder"]

_BATCH_SIZE = 100
_OBJECTIVE, _OPTIMIZER = ELBO("mean_field"), "adamax"
# Tables of cosines are kept in single precision on both sides, and rounded in other orders.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LadderCase:
    """Networks of one size.

    Attributes:
        side: Height and width of an image.
        scales: Pairs (side, number of latents), fine to coarse.
        channels: Channels of the feature planes.
        stem: What the encoder begins with.
        size: Height and width of u.
        hidden: Width of the denoiser.
        steps: Steps in one round: half a second or so.
    """

    side: int
    scales: tuple[tuple[int, int], ...]
    channels: int
    stem: Literal["conv4", "full"]
    size: int
    hidden: int
    steps: int

    def levels(self) -> Tensor:
        """Draw grey images, uint8, as many as one round takes."""
        return torch.randint(256, (self.steps * _BATCH_SIZE, 1, self.side, self.side), dtype=torch.uint8)

    def program(self, pseudoinputs: bool = True) -> Program:
        """Build model and guide with the library, with a diffusion prior of pseudoinputs or plain."""
        spec, likelihood = LadderSpec((1, self.side, self.side), self.scales, self.channels), Bernoulli()
        top_down = TopDown(spec, likelihood.param_shape(spec.x_shape), context=pseudoinputs)
        bottom_up = BottomUp(spec, stem=self.stem)
        if not pseudoinputs:
            return Program(Ladder(top_down, likelihood), LadderGuide(bottom_up, top_down))
        pseudoinput = DCTPseudoinput(spec.x_shape, self.size, self._scale())
        prior = DiffusionPrior(MLPDenoiser(pseudoinput.u_shape, self.hidden), pseudoinput.u_shape)
        model = Ladder(top_down, likelihood, prior, pseudoinput)
        return Program(model, LadderGuide(bottom_up, top_down, PseudoinputPosterior(pseudoinput)))

    def hand(self) -> HandLadder:
        """Build the one with pseudoinputs by hand."""
        halved = self.stem == "conv4"
        return HandLadder(self.side, self.scales, self.channels, halved, self._scale(), self.hidden)

    def _scale(self) -> Tensor:
        # What noise has at most, but for the mean: the images are noise.
        scale = torch.full((1, self.size, self.size), 2.0)
        scale[:, 0, 0] = self.side
        return scale


#: Sizes by name: four latents of an image as large as MNIST's, and the networks of the recipe ``dvp-tiny``.
LADDERS: dict[str, LadderCase] = {
    "tiny": LadderCase(28, ((14, 2), (7, 2)), channels=8, stem="conv4", size=7, hidden=192, steps=4),
    "digits": LadderCase(8, ((4, 2), (2, 2)), channels=16, stem="full", size=3, hidden=128, steps=10),
}


def time_ladder(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time one step beside that of the plain ladder and beside a loop by hand, at several sizes.

    The loop is run as it stands, with its channels last in memory (which the library sees to by itself), and
    compiled where the engine is ``graph``.

    Args:
        device: Where to run.
        rounds: Interleaved rounds; all contenders of one size take turns.
        engines: Engines to time; each is compared with the plain ladder's of its own.

    Raises:
        RuntimeError: If the loop by hand has another loss or other gradients.
    """
    rows = []
    for name, case in LADDERS.items():
        if disagreement(case) > _ROUNDING:
            raise RuntimeError(f"the loop by hand does other work than the library at {name!r}")
        levels = case.levels()
        split = from_tensors(levels, binarize="dynamic").train.to(device)

        def by_hand(
            case: LadderCase = case, levels: Tensor = levels, last: bool = False, compile: bool = False
        ) -> Callable[[], object]:
            net = case.hand().to(device)
            if last:
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return partial(HandLoop(net, levels.to(device), _BATCH_SIZE, compile, adamax).run, case.steps)

        contenders = {"loop": by_hand(), "loop, channels last": by_hand(last=True)}
        if "graph" in engines:
            contenders["loop, compiled"] = by_hand(compile=True)
        syncs = {}
        for engine in engines:
            for kind in ("dvp", "plain"):
                program = placed(case.program(kind == "dvp"), device)
                contenders[f"{engine}, {kind}"] = training(
                    program,
                    split,
                    engine,
                    case.steps,
                    batch_size=_BATCH_SIZE,
                    objective=_OBJECTIVE,
                    optimizer=_OPTIMIZER,
                )
            syncs[engine] = ladder_syncs(placed(case.program(), device), split, engine)
        seconds = interleave(contenders, rounds, clock_of(device))
        for engine in engines:
            loops = [yardstick for yardstick in contenders if yardstick.startswith("loop")]
            loops = [loop for loop in loops if engine == "graph" or loop != "loop, compiled"]
            for yardstick in (f"{engine}, plain", *loops):
                found = row("ladder", f"{engine}, dvp", yardstick, seconds, case.steps, None, syncs[engine])
                rows.append(found | {"yardstick": f"{yardstick.removeprefix(f'{engine}, ')}, {name}"})
    return rows


def ladder_syncs(program: Program, split: Split, engine: str) -> int:
    """Count the host synchronisations of one step as it is timed here."""
    return count_syncs(program, split, engine, objective=_OBJECTIVE, optimizer=_OPTIMIZER)


def copied(program: Program, net: HandLadder) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Copy all parameters to the net written by hand; return the pairs, the library's first."""
    posteriors = dict(program.guide.named_parameters())
    rho = posteriors.pop("posterior_u.rho")
    ours = [rho, *posteriors.values(), *program.model.parameters()]
    pairs = list(zip(ours, net.parameters(), strict=True))
    with torch.no_grad():
        for mine, theirs in pairs:
            theirs.copy_(mine)
    return pairs


def disagreement(case: LadderCase) -> float:
    """Largest relative difference of loss and gradients between the two sides, away from where both start."""
    program, net = Program(*(part.double() for part in case.program())), case.hand().double()
    with torch.no_grad():
        for part in program:
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    ours, theirs = zip(*copied(program, net), strict=True)
    x = torch.randint(2, (5, 1, case.side, case.side)).double()
    found = []
    losses: tuple[Callable[[], Tensor], ...] = (
        lambda: _OBJECTIVE.terms(*program, x).loss,
        lambda: net.loss(x),
    )
    for loss, parameters in zip(losses, (ours, theirs), strict=True):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            value = loss()
        found.append((value.detach(), *torch.autograd.grad(value, parameters)))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
