# ruff: noqa: RUF001  (mathematical symbols)
"""The parts that a spec may name. A new one is a class in its room and one entry here."""

import copy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pvae.data import Data
from pvae.guides import FiveGuide, FlowGuide, FullCovarianceGuide, LaplaceGuide, NormalGuide
from pvae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
)
from pvae.models import VAE, XVAE, ConditionalVAE
from pvae.nn import (
    BottomUp,
    ConvDecoder,
    ConvEncoder,
    Encoder,
    LabelEmbedding,
    LabelSpace,
    MLPDecoder,
    MLPEncoder,
    WhitenedDecoder,
    WhitenedEncoder,
)
from pvae.priors import (
    CodePrior,
    ConditionalFlowPrior,
    CouplingFlow,
    GaussianMixture,
    StandardNormal,
    VampPrior,
    ZukoFlow,
)

from .registry import register

__all__ = [
    "code_prior",
    "conditional_flow",
    "conditional_spline",
    "conv_decoder",
    "conv_encoder",
    "laplace",
    "mixture",
    "mlp_decoder",
    "mlp_encoder",
    "vamp",
    "x_vae",
]

_NUM_CODES = 2000

Positive = Annotated[int, Field(gt=0)]
Widths = tuple[Positive, ...]
Size = Annotated[int, Field(ge=0)]
Activation = Literal["relu", "tanh", "silu", "elu", "gelu", "softplus"]
Embedding = Literal["mlp", "table"]


def mlp_encoder(
    x_shape: tuple[int, ...],
    z_dim: int,
    label_space: LabelSpace | None,
    hidden: Widths = (256,),
    activation: Activation = "relu",
    gated: bool = False,
    label_dim: Size = 0,
    label_embedding: Embedding = "mlp",
) -> MLPEncoder:
    """Build a fully connected encoder, which sees labels if ``label_dim`` is positive."""
    labels = _labels(label_space, label_dim, label_embedding)
    return MLPEncoder(x_shape, z_dim, hidden, activation, gated, labels)


def conv_encoder(
    x_shape: tuple[int, ...],
    z_dim: int,
    label_space: LabelSpace | None,
    channels: Widths = (32, 64),
    h_dim: Positive = 256,
    activation: Activation = "silu",
    label_dim: Size = 0,
    label_embedding: Embedding = "mlp",
) -> ConvEncoder:
    """Build a convolutional encoder, which sees labels if ``label_dim`` is positive."""
    labels = _labels(label_space, label_dim, label_embedding)
    return ConvEncoder(x_shape, z_dim, channels, h_dim, activation, labels)


def mlp_decoder(
    z_dim: int,
    out_shape: tuple[int, ...],
    label_space: LabelSpace | None,
    hidden: Widths = (256,),
    activation: Activation = "relu",
    gated: bool = False,
    label_dim: Size = 0,
    label_embedding: Embedding = "mlp",
) -> MLPDecoder:
    """Build a fully connected decoder, which sees labels if ``label_dim`` is positive."""
    labels = _labels(label_space, label_dim, label_embedding)
    return MLPDecoder(z_dim, out_shape, hidden, activation, gated, labels)


def conv_decoder(
    z_dim: int,
    out_shape: tuple[int, ...],
    label_space: LabelSpace | None,
    channels: Widths = (64, 32),
    h_dim: Positive = 256,
    activation: Activation = "silu",
    label_dim: Size = 0,
    label_embedding: Embedding = "mlp",
) -> ConvDecoder:
    """Build a convolutional decoder, which sees labels if ``label_dim`` is positive."""
    labels = _labels(label_space, label_dim, label_embedding)
    return ConvDecoder(z_dim, out_shape, channels, h_dim, activation, labels)


def _labels(space: LabelSpace | None, dim: int, kind: Embedding) -> LabelEmbedding | None:
    if not dim:
        return None
    if space is None:
        raise ValueError("label_dim must be 0: these data have no labels, or none of a known number")
    return LabelEmbedding(space, dim, kind)


def _needed(space: LabelSpace | None) -> LabelSpace:
    if space is None:
        raise ValueError(
            "a conditional prior needs labels, and these data have none, or none of a known number"
        )
    return space


def x_vae(
    prior: CodePrior,
    decoder: MLPDecoder | ConvDecoder | WhitenedDecoder,
    likelihood: Likelihood,
    encoder: Encoder,
    parametrisation: Literal["raw", "whitened"] = "raw",
    warm_start: bool = False,
    freeze_decoder: bool = False,
) -> XVAE:
    """Put an X-VAE together around an untrained autoencoder; the first stage of training fills it in.

    Args:
        prior: Prior of codes.
        decoder: The decoder.
        likelihood: The likelihood.
        encoder: The guide's encoder, whose architecture is the autoencoder's too.
        parametrisation: ``"raw"``: the networks see z in the units of the codes. ``"whitened"``:
            standardised by the codes' mean and scale.
        warm_start: Whether encoder and decoder start from the autoencoder's.
        freeze_decoder: Whether the decoder stays the autoencoder's.

    Raises:
        ValueError: If the prior is not one of codes, or a decoder is to be frozen that was not trained.
    """
    if not isinstance(prior, CodePrior):
        raise ValueError("an X-VAE needs a prior of codes: set prior.kind = 'codes'")
    if freeze_decoder and not warm_start:
        raise ValueError("freeze_decoder needs warm_start: a decoder at its random start would be frozen")
    code_encoder = copy.deepcopy(encoder.encoder if isinstance(encoder, WhitenedEncoder) else encoder)
    if freeze_decoder:
        decoder.requires_grad_(False)
    return XVAE(prior, decoder, likelihood, code_encoder)


def conditional_flow(
    z_dim: int,
    label_space: LabelSpace | None,
    num_flows: Size = 4,
    context: bool = True,
    hidden: Positive = 64,
    bound: Annotated[float, Field(gt=0)] | None = 2.0,
    masks: Literal["alternating", "halves"] = "alternating",
    label_dim: Positive = 64,
    label_embedding: Embedding = "mlp",
) -> ConditionalFlowPrior:
    """Build a conditional prior with affine couplings; without any, a Gaussian that depends on y."""
    labels = LabelEmbedding(_needed(label_space), label_dim, label_embedding)
    flow = None
    if num_flows:
        flow = CouplingFlow(z_dim, num_flows, label_dim if context else 0, hidden, bound, masks)
    return ConditionalFlowPrior(z_dim, labels, flow, flow_context=context)


def conditional_spline(
    z_dim: int,
    label_space: LabelSpace | None,
    transforms: Positive = 3,
    context: bool = True,
    hidden: Widths = (64, 64),
    label_dim: Positive = 64,
    label_embedding: Embedding = "mlp",
) -> ConditionalFlowPrior:
    """Build a conditional prior with neural splines (zuko)."""
    labels = LabelEmbedding(_needed(label_space), label_dim, label_embedding)
    flow = ZukoFlow(z_dim, label_dim if context else 0, "NSF", transforms, hidden)
    return ConditionalFlowPrior(z_dim, labels, flow, flow_context=context)


def laplace(
    encoder: Encoder, decoder: MLPDecoder | ConvDecoder | WhitenedDecoder, likelihood: Likelihood
) -> LaplaceGuide:
    """Build a Laplace guide for a prior of unit scale."""
    return LaplaceGuide(encoder, decoder, likelihood)


def code_prior(
    z_dim: int,
    data: Data,
    variant: Literal["diag", "full", "gmm", "kde", "marginal", "paired"] = "diag",
    components: Positive = 10,
    covariance: Literal["diag", "full"] = "diag",
    kl: Literal["mc", "variational", "nearest", "convex", "subset"] = "mc",
    num_subset: Positive = 32,
    num_codes: Positive = 2000,
    bandwidth: Annotated[float, Field(gt=0)] | Literal["loo"] | None = None,
    preserve_moments: bool = True,
    robust: bool = False,
    learn: bool = False,
) -> CodePrior:
    """Build a prior of codes, to be fitted after the first stage, with no more codes than there are data.

    Variants other than ``"gmm"`` have no components with a ``covariance`` and pass it over, so that one word
    exchanges the variant of a recipe.
    """
    return CodePrior(
        z_dim,
        variant,
        components=components,
        covariance=covariance if variant == "gmm" else "diag",
        kl=kl,
        num_subset=num_subset,
        num_codes=min(num_codes, len(data.train)),
        bandwidth=bandwidth,
        preserve_moments=preserve_moments,
        robust=robust,
        learn=learn,
    )


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
    _needs_codes(encoder)
    with torch.no_grad():
        some = data.train[: max(_NUM_CODES, 4 * components)]
        loc, scale = encoder(some.x, some.y)
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
        ValueError: If there are fewer training data than pseudoinputs to be drawn from them, or the encoder
            sees labels, which pseudoinputs lack.
    """
    _needs_codes(encoder)
    if encoder.labels is not None:
        raise ValueError("pseudoinputs have no labels: set encoder.label_dim = 0")
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


def _needs_codes(encoder: object) -> None:
    if isinstance(encoder, BottomUp):
        raise ValueError(
            "a ladder's encoder gives features, not codes that this prior could start from or mix"
        )


def _inside(u: Tensor, low: float, high: float) -> Tensor:
    """Reflect at the bounds, and keep off them by a hair."""
    margin = 1e-3 * (high - low)
    u = low + (u - low).abs()
    u = high - (high - u).abs()
    return u.clamp(low + margin, high - margin)


register("model", "vae", VAE, about="one latent vector per datum", symbols="p(x, z) = p(z) p(x | z)")
register(
    "model",
    "conditional",
    ConditionalVAE,
    about="one latent vector per datum, given its label",
    symbols="p(x, z | y) = p(z) p(x | z)",
)
register(
    "model",
    "x_vae",
    x_vae,
    about="prior from the codes of an autoencoder that is trained first (X-VAE)",
    symbols="p(x, z) = p(z) p(x | z),  p(z) fitted to codes a(x),  z in {parametrisation} units",
)

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
    "prior",
    "conditional_flow",
    conditional_flow,
    about="Gaussian given y behind affine couplings (CVAE-NF)",
    symbols="p(z | y) = N(f(z); μ(y), diag σ²(y)) |det ∂f/∂z|,  f = {num_flows} couplings",
)
register(
    "prior",
    "conditional_spline",
    conditional_spline,
    about="Gaussian given y behind neural splines (extra: flows)",
    symbols="p(z | y) = N(f(z); μ(y), diag σ²(y)) |det ∂f/∂z|,  f = {transforms} autoregressive splines",
)
register(
    "prior",
    "codes",
    code_prior,
    about="fitted to the codes of an autoencoder (X-VAE): Gaussian, mixture, kernel density, paired",
    symbols="p(z) = {variant} fit to the codes a(x) of the training data",
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

register(
    "posterior",
    "five",
    FiveGuide,
    about="full covariance implied by the encoder's Jacobian (FIVE)",
    symbols="q(z | x) = N(z; f(x), σ² f′(x) f′(x)ᵀ)\n"
    "f the encoder's location, σ the likelihood's, g the decoder's mean of x",
)
register(
    "posterior",
    "laplace",
    laplace,
    about="full covariance implied by the decoder's Jacobian (Laplace)",
    symbols="q(z | x) = N(z; f(x), Σ),  Σ⁻¹ = I + g′(f(x))ᵀ g′(f(x)) / σ²,  g the decoder's mean",
)

_ENCODER, _DECODER = "μ, σ: {x} → {z}", "θ: {z} → parameters of p(x | z)"
register("encoder", "mlp", mlp_encoder, about="fully connected", symbols=f"{_ENCODER}, fully connected")
register("encoder", "conv", conv_encoder, about="convolutional", symbols=f"{_ENCODER}, convolutional")
register("decoder", "mlp", mlp_decoder, about="fully connected", symbols=f"{_DECODER}, fully connected")
register("decoder", "conv", conv_decoder, about="convolutional", symbols=f"{_DECODER}, convolutional")

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
    about="real data, sigma fixed, learned, or the optimum of the batch",
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
