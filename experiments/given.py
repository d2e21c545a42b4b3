"""Images that share a pseudoinput: which ones, and how near their low-pass is to what they were given."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import evaluating
from pvae.nn import Pseudoinput

__all__ = ["LowPass", "evenly", "low_pass"]

# Held-out images that are compared with one another, and how many of them at a time.
_COMPARED, _BATCH = 2000, 500


class LowPass(NamedTuple):
    """How near generated images are to the pseudoinput u = f(x) that they were given.

    All are root mean squares per coefficient, in the units of u. Images that ignore u are from it what
    different images are from one another.

    Attributes:
        rms: Of f(x) - u, over all draws of x.
        rows: The same for each u.
        means: Of f(E x) - u, over all means of p(x | z): without the noise of the pixels.
        between: Of f(x) - f(x'), over all pairs of different held-out images.
    """

    rms: float
    rows: tuple[float, ...]
    means: float
    between: float

    def __str__(self) -> str:
        return (
            f"u of the drawn images is {self.rms:.3g} from the given one, of their means {self.means:.3g}; "
            f"u of different held-out images {self.between:.3g} from one another (RMS per coefficient)"
        )


def low_pass(
    pseudoinput: Pseudoinput,
    u: Sequence[Tensor],
    means: Sequence[Tensor],
    draws: Sequence[Tensor],
    held: Split,
) -> LowPass:
    """Measure how near draws are to the pseudoinputs that they were given.

    Args:
        pseudoinput: f, the model's.
        u: What was given, each ``u_shape``.
        means: Means of p(x | z) for each u, each ``(n, *x_shape)``.
        draws: Draws of x from them.
        held: Held-out data, at least two.
    """
    spread = torch.linspace(0, len(held) - 1, min(_COMPARED, len(held)), dtype=torch.float64)
    with evaluating(pseudoinput):
        smooth, squares = (
            torch.stack(
                [(pseudoinput(x) - of).double().square().mean() for of, x in zip(u, made, strict=True)]
            )
            for made in (means, draws)
        )
        compared = torch.cat(
            [pseudoinput(x.to(u[0].device)).double() for x in held[spread.long()].x.split(_BATCH)]
        )
    # The mean square over pairs of different data is twice their sample variance.
    between = 2 * compared.var(0).mean()
    return LowPass(
        squares.mean().sqrt().item(),
        tuple(squares.sqrt().tolist()),
        smooth.mean().sqrt().item(),
        between.sqrt().item(),
    )


def evenly(size: int, num: int, seed: int) -> Tensor:
    """Positions of ``num`` of ``size`` data, in order, each at random in a part of its own."""
    inside = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends = torch.arange(num + 1) * size // num
    return ends[:-1] + (inside * ends.diff()).long()
