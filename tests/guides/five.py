"""Small pairs of model and guide for the tests of FIVE."""

from typing import Any

import torch
from torch import Tensor, nn

from pvae.guides import FiveGuide
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import StandardNormal


class Linear(nn.Linear):
    """A linear network that knows the size of z."""

    def __init__(self, in_dim: int, out_dim: int, z_dim: int, bias: bool = False) -> None:
        super().__init__(in_dim, out_dim, bias)
        self.z_dim = z_dim


def linear_pair(a: Tensor, w: Tensor, sigma: float, mode: Any = "learned") -> tuple[Any, Any, Any]:
    """Encoder z = A x, decoder x = W z, and a normal likelihood."""
    encoder, decoder = Linear(a.shape[1], a.shape[0], a.shape[0]), Linear(w.shape[1], w.shape[0], w.shape[1])
    with torch.no_grad():
        encoder.weight.copy_(a)
        decoder.weight.copy_(w)
    return encoder, decoder, Normal(mode, sigma, floor=0.0 if mode == "learned" else 1e-3)


def small(kind: Any = FiveGuide, sigma: Any = "learned", channels: int | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    encoder = MLPEncoder((1, 2, 3), 2, (8,), "silu")
    decoder = MLPDecoder(2, (1, 2, 3), (8,), "silu")
    likelihood = Normal(sigma, 0.4, channels=channels)
    return VAE(StandardNormal(2), decoder, likelihood), kind(encoder, decoder, likelihood, **options)


def data(n: int = 5) -> Tensor:
    return torch.randn(n, 1, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Affine(nn.Module):
    """An encoder with a given value and Jacobian at one x."""

    z_dim = 2

    def __init__(self, x: Tensor, z: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.x, self.z, self.rows = x, z, rows

    def forward(self, x: Tensor) -> Tensor:
        return self.z + (x - self.x) @ self.rows.T


def single(**options: Any) -> Any:
    """The same in single precision, as :func:`pvae.fit` feeds it."""
    model, guide = small(**options)
    return model.float(), guide.float()
