"""Programs and targets for the tests of alignment: every prior and every guide, in the default dtype."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.guides import FiveGuide, FlowGuide, FullCovarianceGuide, LaplaceGuide, NormalGuide
from pvae.likelihoods import Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import (
    CodePrior,
    CodeStats,
    ConditionalFlowPrior,
    CouplingFlow,
    GaussianMixture,
    StandardNormal,
    VampPrior,
    ZukoFlow,
)

X_DIM, Z_DIM, NUM_DATA, BATCH = 5, 2, 40, 8
PRIORS = ("normal", "gmm", "vamp", "flow", "zuko", "diag", "full", "code-gmm", "kde", "marginal")
GUIDES = ("normal", "analytic", "full", "flow", "five", "laplace")


@dataclass
class Density:
    """What alignment takes, made by hand."""

    log_density: Any
    standard_error: Any
    embedding: Any = None


def density(n: int = NUM_DATA, seed: int = 3) -> Density:
    generator = torch.Generator().manual_seed(seed)
    rho = torch.randn(n, generator=generator, dtype=torch.float64) - 3
    sigma = 0.2 + torch.rand(n, generator=generator, dtype=torch.float64)
    u = torch.randn(n, Z_DIM, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.5]) + 1
    return Density(rho, sigma, u)


def data(n: int = NUM_DATA) -> Tensor:
    return torch.randn(n, X_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.get_default_dtype())


def labels(n: int = NUM_DATA) -> Tensor:
    return torch.arange(n) % 3


def programs(prior: str = "normal", guide: str = "normal", seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A model and its guide; the model is conditional where its prior is."""
    torch.manual_seed(seed)
    encoder = MLPEncoder((X_DIM,), Z_DIM, hidden=(7,), activation="silu")
    decoder = MLPDecoder(Z_DIM, (X_DIM,), hidden=(7,), activation="silu")
    likelihood = Normal(value=0.7)
    p = _prior(prior, encoder)
    kind = ConditionalVAE if getattr(p, "conditional", False) else VAE
    guides: dict[str, Any] = {
        "normal": lambda: NormalGuide(encoder),
        "analytic": lambda: NormalGuide(encoder, entropy="analytic"),
        "full": lambda: FullCovarianceGuide(encoder),
        "flow": lambda: FlowGuide(encoder, num_flows=2, hidden=5),
        "five": lambda: FiveGuide(encoder, decoder, likelihood),
        "laplace": lambda: LaplaceGuide(encoder, decoder, likelihood),
    }
    return kind(p, decoder, likelihood), guides[guide]()


def arguments(model: nn.Module, index: Tensor) -> tuple[Tensor, ...]:
    x = data()[index]
    return (x, labels()[index]) if getattr(model, "conditional", False) else (x,)


def _prior(name: str, encoder: nn.Module) -> nn.Module:
    embedding = LabelEmbedding(LabelSpace("class", 3), 4)
    if name == "normal":
        return StandardNormal(Z_DIM)
    if name == "gmm":
        return GaussianMixture(Z_DIM, 3)
    if name == "vamp":
        return VampPrior(encoder, torch.randn(4, X_DIM), bounds=None)
    if name == "flow":
        return ConditionalFlowPrior(Z_DIM, embedding, CouplingFlow(Z_DIM, 2, embedding.dim, 5))
    if name == "zuko":
        flow = ZukoFlow(Z_DIM, embedding.dim, "NSF", transforms=1, hidden=(5,))
        return ConditionalFlowPrior(Z_DIM, embedding, flow)
    stats = CodeStats(Z_DIM, covariance="full")
    stats.update(torch.randn(50, Z_DIM) * 1.3 + 0.2)
    variant: Any = name.removeprefix("code-")
    return CodePrior(Z_DIM, variant, components=2, num_codes=20).fit_(stats)


class SubsampledModel(nn.Module):
    """z under a prior, x normal around a linear map of it; the plate, over all data, says which these are."""

    def __init__(self, prior: nn.Module, size: int = NUM_DATA) -> None:
        super().__init__()
        self.prior, self.size = prior, size
        self.decoder = nn.Linear(Z_DIM, X_DIM)

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", self.size, subsample=index, dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class SubsampledGuide(nn.Module):
    """Normal posteriors, linear in x."""

    def __init__(self, size: int = NUM_DATA) -> None:
        super().__init__()
        self.size = size
        self.encoder = nn.Linear(X_DIM, 2 * Z_DIM)

    def forward(self, x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", self.size, subsample=index, dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
