r"""Likelihood regret: what the guide's own family could gain on a datum (Xiao, Yan & Amit 2020,
arXiv:2003.02977).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import Program
from pvae.inference.progress import reporting

from .blocks import block_of, block_seed, rows_per_pass
from .gaps import _proposals
from .latents import latent_names
from .layout import layout_of
from .local_normal import Ascent, Family, family_of
from .weights import held_out, log_weights

__all__ = ["LikelihoodRegret", "likelihood_regret"]

_BLOCK = 64  # data optimised together
_BLOCK_NUMBERS = 2**22  # most latent numbers drawn, or entries of factors, in one block


@dataclass(frozen=True)
class LikelihoodRegret:
    r"""What re-optimised posteriors gain over the guide, datum by datum, in nats.

    .. math:: LR(x) = \mathcal L[q^*; x] - \mathcal L[q_\phi; x]

    with :math:`q^*` the best member of the guide's family for the datum alone: the amortisation gap of
    :func:`inference_gaps`, of data that may be strange. Both ELBOs come from one set of draws that the
    optimisation has not seen. An optimum not quite reached makes it too small.

    Attributes:
        regret: Shape ``(N,)``, float64; larger for stranger data. Single ones can be negative by chance.
        elbo: ELBO of the guide, shape ``(N,)``.
        error: Standard error of each regret from the finite number of draws, shape ``(N,)``.
        family: What :math:`q^*` is; see :class:`InferenceGaps`. ``"other"``: a diagonal Gaussian for each
            datum stands for the guide's family, and the regret is no longer above zero in expectation.
        num_steps: Steps of the optimisation.
        num_particles: Draws behind an ELBO.
        seed: Seed of all draws.
        protocol: What the data were, if known.
    """

    regret: Tensor
    elbo: Tensor
    error: Tensor
    family: Family
    num_steps: int
    num_particles: int
    seed: int
    protocol: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists that JSON can hold."""
        return {
            "mean": float(self.regret.mean()),
            "family": self.family,
            "num_data": len(self.regret),
            "num_steps": self.num_steps,
            "num_particles": self.num_particles,
            "seed": self.seed,
            "protocol": self.protocol,
            "per_datum": {
                "regret": self.regret.tolist(),
                "elbo": self.elbo.tolist(),
                "error": self.error.tolist(),
            },
        }

    def __str__(self) -> str:
        n = len(self.regret)
        error = float(self.regret.std()) / math.sqrt(n) if n > 1 else math.nan
        return (
            f"likelihood regret {float(self.regret.mean()):.2f} ± {error:.2f} nats on {n} data (too small by "
            f"what {self.num_steps} steps leave; family {self.family})"
        )


def likelihood_regret(
    model: Program,
    guide: Program,
    x: Tensor | Split,
    y: Tensor | None = None,
    *,
    num_steps: int = 100,
    step_particles: int = 8,
    num_particles: int = 64,
    learning_rate: float = 0.2,
    seed: int = 0,
    progress: bool | None = None,
) -> LikelihoodRegret:
    """Re-optimise the posterior of every datum by itself, all data of a block at once.

    The optimisation is that of :func:`inference_gaps`, from the guide's own location and scale; what is found
    for a datum depends on no other. For one it costs about ``3 * num_steps * step_particles`` bare passes of
    the decoder. Both programs run in evaluation mode and are left, with all random generators, as they were.

    Args:
        model: The model program, ``model(x)`` or ``model(x, y)``; log p(x, z) must have a gradient in z.
        guide: The guide program, with an exact density.
        x: Data, shape ``(N, *x_shape)``, or a split.
        y: Contexts, first dimension ``N``. A split's own labels are used if ``model.conditional`` is true.
        num_steps: Steps of Adam, at least two.
        step_particles: Draws behind a step, even.
        num_particles: Draws behind each of the two ELBOs.
        learning_rate: Of Adam at the start, in posterior standard deviations.
        seed: Seed of all draws.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: For sizes out of range, or programs outside the contract (see :func:`log_likelihood`).
        TypeError: If ``x`` is neither a tensor nor a split.
        ValueError: If a latent is not a real number.
    """
    for name, size, least in (("num_steps", num_steps, 2), ("num_particles", num_particles, 1)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if step_particles < 2 or step_particles % 2:
        raise ValueError(f"step_particles must be even and positive, got {step_particles}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate:g}")
    x, y, protocol = held_out(model, x, y)
    device = device_of(model, guide)
    parts = []
    with evaluating(model, guide), reporting("likelihood regret", len(x), progress) as report:
        x = x.to(device)
        y = None if y is None else y.to(device)
        latent_names(model, guide, x, y)
        layout = layout_of(model, x, y)
        family = family_of(guide, x[:1], None if y is None else y[:1])[0]
        rows = rows_per_pass(x)
        full = family == "full"
        numbers = max(num_particles * layout.size, layout.size**2 if full else 0)
        block = max(1, min(_BLOCK, _BLOCK_NUMBERS // numbers, rows // step_particles))
        # One noise for all data: what is fitted to a datum depends on no other, nor on its place.
        ascent = Ascent(num_steps, step_particles, learning_rate, block_seed(seed + 1, 0))
        for start in range(0, len(x), block):
            data, used = block_of(x, y, start, block), min(block, len(x) - start)
            found = _proposals(model, guide, *data, family, layout, ascent, full)
            best = found[family if family in found else "diagonal"][0]
            # On the same noise, where both draw it in one order: what they share cancels.
            draws_seed = block_seed(seed + 2, start)
            log_w = [
                log_weights(model, *data, [propose(num_particles, draws_seed)], rows)[:, :used].cpu().double()
                for propose in (found["amortised"][0], best)
            ]
            gain = log_w[1] - log_w[0]
            spread = gain.std(0) if num_particles > 1 else torch.full_like(gain[0], math.nan)
            parts.append((gain.mean(0), log_w[0].mean(0), spread / math.sqrt(num_particles)))
            report(start + used)
    regret, elbo, error = (torch.cat(column) for column in zip(*parts, strict=True))
    bad = ~regret.isfinite()
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(f"ELBOs must be finite, got a regret of {float(regret[where])} for datum {where}")
    return LikelihoodRegret(regret, elbo, error, family, num_steps, num_particles, seed, protocol)
