"""The step of each posterior family against that of the diagonal normal, at several latent sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pvae.data import from_tensors
from pvae.guides import FiveGuide, FullCovarianceGuide, LaplaceGuide, NormalGuide
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import ConvDecoder, ConvEncoder, Encoder, MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

from ..program import Program
from .timing import Row, clock_of, interleave, row
from .training import BATCH_SIZE, count_syncs, placed, training

__all__ = ["NETWORKS", "time_posteriors"]

_X_SHAPE = (1, 28, 28)
_HIDDEN = (256, 256)
# Beyond this size Laplace's covariance takes minutes for what the others do in seconds.
_MOST_LAPLACE = 8

Networks = Callable[[int], tuple[Encoder, nn.Module]]


@dataclass(frozen=True)
class Case:
    """Networks for a number of latents.

    Attributes:
        networks: Maps the number of latents to an encoder and a decoder of images ``(1, 28, 28)``.
        sizes: Numbers of latents.
        steps: Steps in one round.
    """

    networks: Networks
    sizes: tuple[int, ...]
    steps: int


def _mlp(z_dim: int) -> tuple[Encoder, nn.Module]:
    return MLPEncoder(_X_SHAPE, z_dim, _HIDDEN, "silu"), MLPDecoder(z_dim, _X_SHAPE, _HIDDEN, "silu")


def _conv(z_dim: int) -> tuple[Encoder, nn.Module]:
    return ConvEncoder(_X_SHAPE, z_dim), ConvDecoder(z_dim, _X_SHAPE)


#: Benchmarks by name.
NETWORKS: dict[str, Case] = {
    "five": Case(_mlp, (8, 32, 128), steps=10),
    "five-conv": Case(_conv, (32,), steps=2),
}

# Largest ratio to the diagonal step that the design asks for.
_TARGETS: dict[str, float | None] = {
    "full covariance": None,
    "five, latent probe": 3.0,
    "five, data probe": 2.0,
    "fif": None,
    "laplace": None,
}


def time_posteriors(name: str, device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time one step of every posterior beside the diagonal one; all with a learned sigma.

    Args:
        name: One of :data:`NETWORKS`.
        device: Where to run.
        rounds: Interleaved rounds.
        engines: Engines to time; each posterior is compared under its own.
    """
    case, rows = NETWORKS[name], []
    levels = torch.randint(256, (case.steps * BATCH_SIZE, *_X_SHAPE), dtype=torch.uint8)
    split = from_tensors(levels, dequantize=True).train.to(device)
    for engine in engines:
        for z_dim in case.sizes:
            kinds = [kind for kind in _TARGETS if kind != "laplace" or z_dim <= _MOST_LAPLACE]

            def program(kind: str, z_dim: int = z_dim) -> Program:
                return placed(_program(kind, case.networks, z_dim), device)

            contenders = {
                kind: training(program(kind), split, engine, case.steps) for kind in ("diagonal", *kinds)
            }
            seconds = interleave(contenders, rounds, clock_of(device))
            for kind in kinds:
                syncs = count_syncs(program(kind), split, engine)
                # Rows are told apart by engine and size; the seconds by what was timed.
                found = row(name, kind, "diagonal", seconds, case.steps, _TARGETS[kind], syncs)
                rows.append(found | {"ours": f"{engine}, {kind}", "yardstick": f"diagonal, {z_dim} latents"})
    return rows


def _program(kind: str, networks: Networks, z_dim: int) -> Program:
    encoder, decoder = networks(z_dim)
    likelihood = Normal("learned", 0.3)
    model = VAE(StandardNormal(z_dim), decoder, likelihood)
    guides: dict[str, Callable[[], nn.Module]] = {
        "diagonal": lambda: NormalGuide(encoder),
        "full covariance": lambda: FullCovarianceGuide(encoder),
        "five, latent probe": lambda: FiveGuide(encoder, decoder, likelihood),
        "five, data probe": lambda: FiveGuide(encoder, decoder, likelihood, probe="data"),
        "fif": lambda: FiveGuide(encoder, decoder, likelihood, objective="fif"),
        "laplace": lambda: LaplaceGuide(encoder, decoder, likelihood),
    }
    return Program(model, guides[kind]())
