"""The step of CVAE-NF against the same conditional model under the standard normal."""

import torch

from pvae.data import from_tensors
from pvae.guides import NormalGuide
from pvae.likelihoods import Normal
from pvae.models import ConditionalVAE
from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import ConditionalFlowPrior, CouplingFlow, StandardNormal

from ..program import Program
from .timing import Row, clock_of, interleave, row
from .training import BATCH_SIZE, count_syncs, placed, training

__all__ = ["time_flow_prior"]

_STEPS = 20


def time_flow_prior(device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time the step of CVAE-NF at the size of its MNIST recipe against the same CVAE under N(0, I)."""
    levels = torch.randint(256, (_STEPS * BATCH_SIZE, 1, 28, 28), dtype=torch.uint8)
    data = from_tensors(levels, y=torch.arange(len(levels)) % 10, class_names="0123456789", dequantize=True)
    split = data.train.to(device)
    rows = []
    for engine in engines:
        programs = {flow: placed(_conditional(flow), device) for flow in (True, False)}
        syncs = count_syncs(placed(_conditional(True), device), split, engine)
        contenders = {
            engine if flow else "N(0, I)": training(program, split, engine, _STEPS)
            for flow, program in programs.items()
        }
        seconds = interleave(contenders, rounds, clock_of(device))
        rows.append(row("cvae-nf", engine, "N(0, I)", seconds, _STEPS, 1.5, syncs))
    return rows


def _conditional(flow: bool) -> Program:
    """A CVAE of labels 0 to 9, under the flow prior or the standard normal."""
    z_dim, x_shape, hidden = 16, (1, 28, 28), (400, 200)

    def labels() -> LabelEmbedding:
        return LabelEmbedding(LabelSpace("class", 10), 64)

    prior = (
        ConditionalFlowPrior(z_dim, labels(), CouplingFlow(z_dim, context_dim=64))
        if flow
        else StandardNormal(z_dim)
    )
    decoder = MLPDecoder(z_dim, x_shape, hidden[::-1], "silu", labels=labels())
    encoder = MLPEncoder(x_shape, z_dim, hidden, "silu", labels=labels())
    return Program(ConditionalVAE(prior, decoder, Normal("batch", 0.3)), NormalGuide(encoder))
