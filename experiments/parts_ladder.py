# ruff: noqa: RUF001  (mathematical symbols)
"""The parts of hierarchical models: a ladder with its pseudoinputs and diffusion prior, and two levels."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from pvae.data import Data
from pvae.guides import HVAEGuide, LadderGuide
from pvae.likelihoods import Likelihood
from pvae.models import HVAE, Ladder
from pvae.nn import (
    BottomUp,
    DCTPseudoinput,
    DownsampledPseudoinput,
    LadderSpec,
    LinearPseudoinput,
    MLPDenoiser,
    MLPEncoder,
    PairDecoder,
    PairEncoder,
    Pseudoinput,
    PseudoinputPosterior,
    TopDown,
    UNetDenoiser,
)
from pvae.priors import CodePrior, DiffusionPrior, ImagePrior

from .registry import register

__all__ = [
    "dct",
    "diffusion",
    "downsampled",
    "hvae",
    "hvae_posterior",
    "ladder",
    "ladder_decoder",
    "ladder_encoder",
    "ladder_posterior",
    "linear",
    "nothing",
    "pair_decoder",
]

Positive = Annotated[int, Field(gt=0)]
Widths = tuple[Positive, ...]
Size = Annotated[int, Field(ge=0)]
Bounds = tuple[float, float] | None


def nothing() -> None:
    """Leave a table without a part."""


def dct(data: Data, bounds: Bounds, size: Positive = 7) -> DCTPseudoinput:
    """Scale the lowest coefficients by their largest values in the training data."""
    return DCTPseudoinput.from_data(data.train, size, bounds=_range(bounds))


def downsampled(x_shape: tuple[int, ...], bounds: Bounds, size: Positive = 7) -> DownsampledPseudoinput:
    """Average an image to a small one."""
    return DownsampledPseudoinput(x_shape, size, bounds=_range(bounds))


def linear(x_shape: tuple[int, ...], bounds: Bounds, size: Positive = 7) -> LinearPseudoinput:
    """Learn a linear map to as many numbers, and one back."""
    return LinearPseudoinput(x_shape, size, bounds=_range(bounds))


def diffusion(
    z_dim: int,
    pseudoinput: Pseudoinput | None,
    denoiser: Literal["mlp", "unet"] = "mlp",
    hidden: Positive = 192,
    channels: Positive = 16,
    blocks: Positive = 2,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    gamma_min: float = -7.0,
    gamma_max: float = 7.0,
    learned: bool = False,
    prediction: Literal["v", "eps"] = "v",
    num_steps: Positive = 100,
) -> DiffusionPrior:
    """Build a diffusion over pseudoinputs, or over z where there are none.

    Args:
        z_dim: Size of z.
        pseudoinput: What u is, if there is one.
        denoiser: ``"mlp"`` over all numbers at once, or ``"unet"`` over the planes of u.
        hidden: Width of the MLP.
        channels: Channels of the U-Net.
        blocks: Residual blocks of either.
        dropout: Probability that a unit of a block is dropped in training.
        gamma_min, gamma_max: Minus the log of the signal-to-noise ratio at the data and at the noise.
        learned: Whether both are trained.
        prediction: What the denoiser predicts.
        num_steps: Steps of the sampler, and of the density in evaluation.

    Raises:
        ValueError: If a U-Net is asked for without pseudoinputs, which have planes.
    """
    shape = (z_dim,) if pseudoinput is None else pseudoinput.u_shape
    net: nn.Module
    if denoiser == "mlp":
        net = MLPDenoiser(shape, hidden, blocks, dropout)
    elif pseudoinput is None:
        raise ValueError("denoiser = 'unet' needs planes, which z has not: set denoiser = 'mlp'")
    else:
        net = UNetDenoiser(shape, channels, blocks, dropout)
    return DiffusionPrior(net, shape, gamma_min, gamma_max, learned, prediction, num_steps)


def ladder(
    prior: nn.Module | None, pseudoinput: Pseudoinput | None, decoder: TopDown, likelihood: Likelihood
) -> Ladder:
    """Put a ladder together, plain or under a prior of pseudoinputs.

    Raises:
        ValueError: If there are pseudoinputs and no prior of them, or a prior and nothing that it is of, or
            one that is fitted to codes.
    """
    if pseudoinput is None and prior is not None:
        raise ValueError(
            "the plain ladder has its priors in the network: set prior = 'none', or give the prior "
            "pseudoinputs, such as pseudoinput = 'dct'"
        )
    if pseudoinput is not None and prior is None:
        raise ValueError("pseudoinputs need a prior, such as prior = 'diffusion'")
    if isinstance(prior, CodePrior):
        raise ValueError("pseudoinputs are no codes of an autoencoder: set prior = 'diffusion'")
    if pseudoinput is not None and prior is not None and not isinstance(prior, DiffusionPrior):
        prior = ImagePrior(prior, pseudoinput.u_shape)
    return Ladder(decoder, likelihood, prior, pseudoinput)


def ladder_decoder(
    x_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    bounds: Bounds,
    pseudoinput: Pseudoinput | None,
    scales: tuple[tuple[Positive, Positive], ...] = ((14, 2), (7, 2)),
    channels: Positive = 32,
    z_channels: Positive | None = None,
    bottleneck: Annotated[float, Field(gt=0)] = 1.0,
    postprocess: Size = 1,
    aggregate: bool = True,
) -> TopDown:
    """Build the way down: all conditional priors, and p(x | z)."""
    low, high = _range(bounds)
    spec = LadderSpec(
        x_shape, scales, channels, z_channels, bottleneck, centre=(low + high) / 2, spread=(high - low) / 2
    )
    return TopDown(spec, out_shape, pseudoinput is not None, postprocess, aggregate)


def ladder_encoder(
    decoder: TopDown, blocks: Positive = 1, stem: Literal["conv4", "full"] = "conv4"
) -> BottomUp:
    """Build the way up for a ladder of the decoder's shapes."""
    return BottomUp(decoder.spec, blocks, stem)


def ladder_posterior(
    encoder: BottomUp,
    decoder: TopDown,
    pseudoinput: Pseudoinput | None,
    log_variance: float = -6.0,
    learned: bool = True,
    log_variance_range: tuple[float, float] = (-12.0, -3.0),
) -> LadderGuide:
    """Build the guide, with r(u | x) where there are pseudoinputs."""
    posterior_u = None
    if pseudoinput is not None:
        posterior_u = PseudoinputPosterior(pseudoinput, log_variance, learned, log_variance_range)
    return LadderGuide(encoder, decoder, posterior_u)


def hvae(
    z_dim: int,
    prior: nn.Module,
    decoder: PairDecoder,
    likelihood: Likelihood,
    hidden: Widths = (300, 300),
    gated: bool = True,
) -> HVAE:
    """Put a two-level model together; ``hidden`` are the widths of p(z₁ | z₂)."""
    below = MLPEncoder((z_dim,), decoder.z_dims[0], hidden, gated=gated)
    return HVAE(prior, below, decoder, likelihood)


def pair_decoder(
    z_dim: int,
    out_shape: tuple[int, ...],
    z_1_dim: Positive = 40,
    hidden: Positive = 300,
    gated: bool = True,
) -> PairDecoder:
    """Build a decoder of both levels."""
    return PairDecoder((z_1_dim, z_dim), out_shape, hidden, gated=gated)


def hvae_posterior(
    encoder: MLPEncoder,
    decoder: PairDecoder,
    x_shape: tuple[int, ...],
    z_dim: int,
    hidden: Positive = 300,
    gated: bool = True,
) -> HVAEGuide:
    """Build the guide; ``hidden`` is the width of q(z₁ | x, z₂)."""
    return HVAEGuide(encoder, PairEncoder(x_shape, z_dim, decoder.z_dims[0], hidden, gated=gated))


def _range(bounds: Bounds) -> tuple[float, float]:
    if bounds is None:
        raise ValueError("a ladder needs data with a known range, such as images with levels")
    return bounds


register("pseudoinput", "none", nothing, about="none, but in a ladder under a prior of them", symbols="none")
for _kind, _build, _about, _map in (
    (
        "dct",
        dct,
        "lowest DCT coefficients (DVP-VAE)",
        "clip(DᵀxD / S, ±1),  the lowest {size}×{size} of a DCT",
    ),
    ("downsampled", downsampled, "small image of averages", "x averaged to {size}×{size}"),
    ("linear", linear, "learned linear map", "W x + b,  {size}×{size} numbers, learned"),
):
    register(
        "pseudoinput", _kind, _build, about=_about, symbols=f"r(u | x) = N(u; f(x), diag e^ρ),  f(x) = {_map}"
    )

register(
    "prior",
    "none",
    nothing,
    about="none: the network has the priors of a plain ladder",
    symbols="in the decoder",
)
register(
    "prior",
    "diffusion",
    diffusion,
    about="what a denoiser makes of noise, of z or of pseudoinputs (DVP-VAE, Kuzina & Tomczak 2024)",
    symbols="p({over}) = {num_steps} steps of a denoiser from N(0, I),  γ from {gamma_min} to {gamma_max}",
)

register(
    "model",
    "ladder",
    ladder,
    about="latents on ever finer planes, plain or under pseudoinputs (DVP-VAE)",
    symbols="p(x, z{and_u}) = {of_u}∏ₗ p(zₗ | z₍>ₗ₎{and_u}) p(x | z)",
)
register(
    "decoder",
    "ladder",
    ladder_decoder,
    about="way down a ladder: all conditional priors, and the parameters of the likelihood",
    symbols="p(zₗ | z₍>ₗ₎{and_u}) = N(μₗ, diag σₗ²),  θ: z → parameters of p(x | z)",
)
register(
    "posterior",
    "ladder",
    ladder_posterior,
    about="independent Gaussians given the latents above, from the top down",
    symbols="q(z{and_u} | x) = {r_of_u}∏ₗ N(zₗ; μₗ, diag σₗ²),  μₗ, σₗ of z₍>ₗ₎{and_u}, x",
)
register(
    "encoder",
    "ladder",
    ladder_encoder,
    about="way up a ladder: features of x on every plane",
    symbols="e: {x} → features on every plane, convolutional",
)

register(
    "model",
    "hvae",
    hvae,
    about="two latent vectors (Tomczak & Welling 2018)",
    symbols="p(x, z₁, z₂) = p(z₂) p(z₁ | z₂) p(x | z₁, z₂),  z₂ ∈ {z}",
)
register(
    "decoder",
    "pair",
    pair_decoder,
    about="fully connected, of two latent vectors",
    symbols="θ: ℝ^{z_1_dim} × {z} → parameters of p(x | z₁, z₂)",
)
register(
    "posterior",
    "hvae",
    hvae_posterior,
    about="independent Gaussians, the upper latent vector first",
    symbols="q(z₁, z₂ | x) = N(z₂; μ(x), diag σ²(x)) N(z₁; μ(x, z₂), diag σ²(x, z₂))",
)
