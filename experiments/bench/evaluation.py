"""An estimate of log p(x) against the decoder passes that it cannot do without."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pvae

from .steps import CASES
from .timing import Row, clock_of, interleave, row
from .training import placed

__all__ = ["time_evaluation"]

_NUM_IMAGES, _NUM_PARTICLES = 100, 1000


def time_evaluation(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time ``log_likelihood`` of the medium programs against decoder passes over the same chunks of rows,
    alone and with the density of x, which no likelihood can do without."""
    case = CASES["medium"]
    program = placed(case.program(), device)
    x = (torch.rand(_NUM_IMAGES, *case.x_shape) < 0.5).float().to(device)

    def ours() -> object:
        return pvae.log_likelihood(*program, x, num_particles=_NUM_PARTICLES, progress=False)

    model: Any = program.model
    decoder = model.decoder
    chunks = [torch.randn(shape, device=device) for shape in _decoder_inputs(decoder, ours)]

    def passes() -> None:
        with torch.inference_mode():
            for z in chunks:
                decoder(z)

    def scored() -> None:
        with torch.inference_mode():
            for z in chunks:
                logits = decoder(z)
                target = x[: z.shape[-2]].expand_as(logits)
                F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(2).sum(-1)

    seconds = interleave(
        {"log_likelihood": ours, "decoder": passes, "decoder + density": scored},
        rounds,
        clock_of(device),
    )
    return [
        row("evaluation", "log_likelihood", "decoder", seconds, 1, 1.1, None),
        row("evaluation", "log_likelihood", "decoder + density", seconds, 1, None, None),
    ]


def _decoder_inputs(decoder: nn.Module, run: Callable[[], object]) -> list[torch.Size]:
    """Shapes of what ``run`` hands to the decoder, all but the one-datum check at the start."""
    shapes: list[torch.Size] = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        run()
    finally:
        hook.remove()
    return [shape for shape in shapes if shape[:-1].numel() > 1]
