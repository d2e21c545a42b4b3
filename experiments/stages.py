"""The first stage of an X-VAE (arXiv:2607.01275v1): an autoencoder, its codes, and a prior of them."""

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data import Data
from pvae.guides import PointGuide
from pvae.inference import Run, fit
from pvae.likelihoods import Likelihood
from pvae.models import XVAE, Autoencoder
from pvae.nn import Encoder, WhitenedDecoder, WhitenedEncoder, standardise_
from pvae.priors import CodeShift, CodeStats, collect_codes

from .program import Program
from .spec import AutoencoderKeys, Spec

__all__ = ["LARGE_SHIFT", "FirstStage", "fit_autoencoder", "install", "pretrain"]

LARGE_SHIFT = 0.2
"""Difference between held-out and training codes, in standard deviations, that is worth a note."""


@dataclass(frozen=True)
class FirstStage:
    """A trained autoencoder and what its codes are like.

    Attributes:
        encoder: Its encoder; the location is the code.
        decoder: Its decoder.
        likelihood: What its reconstruction was measured by.
        stats: Statistics of the codes of the training data.
        held_out: Statistics of the codes of the validation data, if there are any.
        run: Its training.
        shift: How the codes of validation data differ from those of training data, if there are any.
    """

    encoder: Encoder
    decoder: nn.Module
    likelihood: nn.Module
    stats: CodeStats
    held_out: CodeStats | None
    run: Run
    shift: CodeShift | None

    def summary(self) -> dict[str, Any]:
        """What a manifest says of it: number of codes, dimensions without spread, shift of held-out codes."""
        return {
            "codes": self.stats.n,
            "dead": self.stats.scale().dead.nonzero().flatten().tolist(),
            "held_out_shift": None if self.shift is None else round(self.shift.largest, 4),
            "steps": self.run.steps,
        }

    def notes(self) -> list[str]:
        """Say where the codes of held-out data are not those the prior is made of."""
        if self.shift is None or self.shift.largest <= LARGE_SHIFT:
            return []
        return [
            f"codes of validation data differ from those of training data by {self.shift.largest:.2f} "
            "standard deviations in one dimension: the autoencoder may have overfitted"
        ]


def fit_autoencoder(
    encoder: Encoder,
    decoder: nn.Module,
    likelihood: Likelihood,
    data: Data,
    *,
    code_l2: float = 0.0,
    noise: float = 0.0,
    **settings: Any,
) -> Run:
    """Train a deterministic autoencoder in place, with the engine that trains everything else.

    Args:
        encoder: Its location is the code.
        decoder: Maps codes back.
        likelihood: What the reconstruction is measured by; with a ``Normal`` the squared error.
        data: Where the training and validation data come from.
        code_l2: Weight of the squared code in the loss, nats.
        noise: Standard deviation of noise on the code in training.
        **settings: Arguments of :func:`pvae.fit`.
    """
    return fit(Autoencoder(decoder, likelihood, code_l2), PointGuide(encoder, noise), data, **settings)


def pretrain(
    spec: Spec,
    program: Program,
    data: Data,
    *,
    folder: Path | None = None,
    device: torch.device | None = None,
    progress: bool | None = None,
) -> FirstStage:
    """Train the autoencoder of a spec, collect its codes, and put both into the program.

    Args:
        spec: A spec whose model is an X-VAE.
        program: Its program, as built; its prior is fitted here, and its networks started where the spec
            says so.
        data: Its data.
        folder: Where the autoencoder's run is kept, and gone on with if it was interrupted; ``None`` for
            nowhere.
        device: Where to train.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        ValueError: If the spec's model has no first stage.
        pvae.inference.NonFiniteLoss: If the autoencoder's training diverges.
    """
    settings = spec.autoencoder
    if settings is None:
        raise ValueError(f"model.kind = '{spec.model.kind}' has no first stage")
    stage = _train(settings, program, data, spec.seed, folder, device, progress)
    install(stage, spec, program)
    return stage


def install(stage: FirstStage, spec: Spec, program: Program) -> None:
    """Put a first stage into a program: the prior of codes, the encoder of codes, and the start of the
    networks.

    Args:
        stage: The first stage; it is left as it is.
        spec: The program's spec.
        program: The program, as built.
    """
    model, guide = program.model, _opened(program.guide)
    assert isinstance(model, XVAE)
    device = next(stage.encoder.parameters()).device
    model.to(device)
    guide.to(device)
    model.prior.fit_(stage.stats, seed=spec.seed)
    assert model.code_encoder is not None
    model.code_encoder.load_state_dict(stage.encoder.state_dict())
    keys = spec.model.arguments()
    encoder, decoder = guide.encoder, _opened(model.decoder)
    if keys["warm_start"]:
        _warm_start(stage, encoder, decoder, model.prior.loc, model.prior.scale)
    if isinstance(encoder, WhitenedEncoder) and isinstance(decoder, WhitenedDecoder):
        encoder.set_(model.prior.loc, model.prior.scale)
        decoder.set_(model.prior.loc, model.prior.scale)


def _train(
    settings: AutoencoderKeys,
    program: Program,
    data: Data,
    seed: int,
    folder: Path | None,
    device: torch.device | None,
    progress: bool | None,
) -> FirstStage:
    """Train copies of the program's networks as an autoencoder."""
    model, guide = _opened(program.model), _opened(program.guide)
    encoder = copy.deepcopy(_bare(guide.encoder))
    decoder = copy.deepcopy(_bare(model.decoder)).requires_grad_(True)
    likelihood = copy.deepcopy(model.likelihood)
    arguments = settings.arguments()
    run = fit_autoencoder(
        encoder,
        decoder,
        likelihood,
        data,
        **arguments,
        seed=seed,
        device=device,
        out=folder,
        resume=folder is not None,
        progress=progress,
    )
    stats, held_out, shift = collect_codes(encoder, data.train), None, None
    if "valid" in data.parts:
        held_out = collect_codes(encoder, data.valid)
        with warnings.catch_warnings():  # said by a note instead
            warnings.simplefilter("ignore")
            shift = stats.compare(held_out)
    return FirstStage(encoder, decoder, likelihood, stats, held_out, run, shift)


@torch.no_grad()
def _warm_start(stage: FirstStage, encoder: Encoder, decoder: nn.Module, loc: Tensor, scale: Tensor) -> None:
    """Copy the autoencoder, and let the posterior start at a tenth of the codes' scale."""
    theirs, back = copy.deepcopy(stage.encoder), copy.deepcopy(stage.decoder)
    if isinstance(encoder, WhitenedEncoder):
        standardise_(theirs, back, loc, scale)  # type: ignore[arg-type]  # a decoder of ours
        scale = torch.ones_like(scale)
    # The log-variance head: nearly constant, at the square of a tenth of the scale.
    theirs.head.weight[theirs.z_dim :] *= 0.1
    theirs.head.bias[theirs.z_dim :] = 2 * (scale.log() + math.log(0.1))
    _bare(encoder).load_state_dict(theirs.state_dict())
    _bare(decoder).load_state_dict(back.state_dict())


def _opened(module: nn.Module) -> Any:
    """The same module, whose parts a checker cannot know."""
    return module


def _bare(network: Any) -> Any:
    """The network under a :class:`WhitenedEncoder` or :class:`WhitenedDecoder`, or itself."""
    if isinstance(network, WhitenedEncoder):
        return network.encoder
    return network.decoder if isinstance(network, WhitenedDecoder) else network
