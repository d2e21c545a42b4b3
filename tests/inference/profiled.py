"""A linear model with a sigma that is fitted to each batch, for the tests of training it."""

from typing import Any

import torch

from pvae.guides import NormalGuide
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal

__all__ = ["ProfiledVAE", "profiled_programs"]


class ProfiledVAE(VAE):
    """x of 5 numbers, z of 3."""

    likelihood: Normal

    def __init__(self, **likelihood: Any) -> None:
        super().__init__(StandardNormal(3), MLPDecoder(3, (5,), hidden=()), Normal("batch", **likelihood))


def profiled_programs(seed: int = 0, **likelihood: Any) -> tuple[ProfiledVAE, NormalGuide]:
    """Model and guide; keywords are arguments of the likelihood."""
    torch.manual_seed(seed)
    return ProfiledVAE(**likelihood), NormalGuide(MLPEncoder((5,), 3, hidden=()))
