# ruff: noqa: RUF001  (mathematical symbols)
"""The parts that a spec may name. A new one is a class in its room and one entry here."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pvae.data import Data
from pvae.guides import FlowGuide, FullCovarianceGuide, NormalGuide
from pvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    NegativeBinomial,
    Normal,
    Poisson,
)
from pvae.models import VAE
from pvae.nn import ConvDecoder, ConvEncoder, Encoder, MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal, VampPrior

from .registry import register

__all__ = ["mixture", "vamp"]

_NUM_CODES = 2000

Positive = Annotated[int, Field(gt=0)]
Widths = tuple[Positive, ...]
Activation = Literal["relu", "tanh", "silu", "elu", "gelu", "softplus"]


def mixture(
    z_dim: int,
    encoder: Encoder,
    data: Data,
    components: int = 10,
    init: Literal["random", "codes"] = "random",
) -> GaussianMixture:
    """Start a Gaussian mixture at random, or at a fit to the untrained encoder's codes of training data."""
    if init == "random":
        return GaussianMixture(z_dim, components)
    with torch.no_grad():
        loc, scale = encoder(data.train[: max(_NUM_CODES, 4 * components)].x)
        codes = loc + scale * torch.randn_like(scale)
    return GaussianMixture.from_codes(codes, components)


def vamp(
    encoder: Encoder,
    data: Data,
    bounds: tuple[float, float] | None,
    components: int = 500,
    init: Literal["data", "constant"] = "data",
    init_mean: float = 0.05,
    init_scale: float = 0.01,
) -> VampPrior:
    """Start the pseudoinputs at training data or at one level, both with a little noise, as the authors do.

    Clipping has no gradient at and beyond the bounds, where binary data lie: pseudoinputs start inside.

    Args:
        encoder: The guide's encoder.
        data: Where pseudoinputs are drawn from.
        bounds: Range of the data, ``None`` for the whole line.
        components: Number of pseudoinputs.
        init: ``"data"`` for training data, ``"constant"`` for ``init_mean`` everywhere.
        init_mean: Level of a constant start, in the units of x.
        init_scale: Standard deviation of the noise, in the units of x.

    Raises:
        ValueError: If there are fewer training data than pseudoinputs to be drawn from them.
    """
    if init == "data":
        if components > len(data.train):
            raise ValueError(
                f"components must be at most {len(data.train)} (the training data) with init = 'data', "
                f"got {components}"
            )
        u = data.train[torch.randperm(len(data.train))[:components]].x
    else:
        u = torch.full((components, *data.x_shape), init_mean)
    u = u + init_scale * torch.randn_like(u)
    return VampPrior(encoder, u if bounds is None else _inside(u, *bounds), bounds)


def _inside(u: Tensor, low: float, high: float) -> Tensor:
    """Reflect at the bounds, and keep off them by a hair."""
    margin = 1e-3 * (high - low)
    u = low + (u - low).abs()
    u = high - (high - u).abs()
    return u.clamp(low + margin, high - margin)


register("model", "vae", VAE, about="one latent vector per datum", symbols="p(x, z) = p(z) p(x | z)")

register(
    "prior", "normal", StandardNormal, about="standard normal, no parameters", symbols="p(z) = N(z; 0, I)"
)
register(
    "prior",
    "mixture",
    mixture,
    about="mixture of diagonal Gaussians, learned",
    symbols="p(z) = Σₖ πₖ N(z; mₖ, diag sₖ²),  k = 1 … {components}",
    components=Positive,
)
register(
    "prior",
    "vamp",
    vamp,
    about="mixture of encodings of learned pseudoinputs (VampPrior, Tomczak & Welling 2018)",
    symbols="p(z) = 1/K Σₖ N(z; μ(uₖ), diag σ²(uₖ)),  K = {components} pseudoinputs u, learned",
    components=Positive,
    init_scale=Annotated[float, Field(ge=0)],
)

register(
    "posterior",
    "normal",
    NormalGuide,
    about="independent Gaussians",
    symbols="q(z | x) = N(z; μ(x), diag σ²(x))",
)
register(
    "posterior",
    "full_covariance",
    FullCovarianceGuide,
    about="Gaussian with an amortised Cholesky factor",
    symbols="q(z | x) = N(z; μ(x), L(x) L(x)ᵀ),  L = diag σ (I + U), U strictly lower triangular",
)
register(
    "posterior",
    "flow",
    FlowGuide,
    about="diagonal Gaussian through conditional affine couplings",
    symbols="q(z | x) = N(z₀; μ(x), diag σ²(x)) |det ∂z/∂z₀|⁻¹,  z = {num_flows} couplings of z₀ given x",
)

_ENCODER, _DECODER = "μ, σ: {x} → {z}", "θ: {z} → parameters of p(x | z)"
_MLP = {"hidden": Widths, "activation": Activation}
_CONV = {"channels": Widths, "h_dim": Positive, "activation": Activation}
register(
    "encoder", "mlp", MLPEncoder, about="fully connected", symbols=f"{_ENCODER}, fully connected", **_MLP
)
register("encoder", "conv", ConvEncoder, about="convolutional", symbols=f"{_ENCODER}, convolutional", **_CONV)
register(
    "decoder", "mlp", MLPDecoder, about="fully connected", symbols=f"{_DECODER}, fully connected", **_MLP
)
register("decoder", "conv", ConvDecoder, about="convolutional", symbols=f"{_DECODER}, convolutional", **_CONV)

register(
    "likelihood",
    "bernoulli",
    Bernoulli,
    about="binary data",
    symbols="p(x | z) = ∏ᵢ Bernoulli(xᵢ; sigmoid θᵢ(z))",
)
register(
    "likelihood",
    "continuous_bernoulli",
    ContinuousBernoulli,
    about="grey values in [0, 1], a density",
    symbols="p(x | z) = ∏ᵢ C(λᵢ) λᵢ^xᵢ (1 − λᵢ)^(1 − xᵢ),  λ = sigmoid θ(z)",
)
register(
    "likelihood",
    "normal",
    Normal,
    about="real data, sigma fixed or learned",
    symbols="p(x | z) = ∏ᵢ N(xᵢ; θᵢ(z), σ²)",
)
register(
    "likelihood",
    "discretized_logistic_mixture",
    DiscretizedLogisticMixture,
    about="grey levels or RGB, exact mass of each level (PixelCNN++, Salimans et al. 2017)",
    symbols="p(x | z) = ∏ᵢ Σₖ πᵢₖ ∫ Logistic(t; mᵢₖ, sᵢₖ) dt over the level of xᵢ,  {levels} levels",
)
register(
    "likelihood",
    "categorical",
    Categorical,
    about="levels without an order",
    symbols="p(x | z) = ∏ᵢ Categorical(xᵢ; softmax θᵢ(z)),  {levels} levels",
)
register("likelihood", "poisson", Poisson, about="counts", symbols="p(x | z) = ∏ᵢ Poisson(xᵢ; λᵢ(z))")
register(
    "likelihood",
    "negative_binomial",
    NegativeBinomial,
    about="overdispersed counts",
    symbols="p(x | z) = ∏ᵢ NegativeBinomial(xᵢ; mean μᵢ(z), dispersion {dispersion})",
)
