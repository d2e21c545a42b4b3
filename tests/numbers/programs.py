"""Programs that go wrong at a chosen datum, each in its way."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.data import from_tensors
from pvae.data.dataset import Data
from tests.inference.programs import LinearGuide, LinearModel

__all__ = ["BLACK", "NormGuide", "Overflow", "data", "programs"]

#: The datum that is zero in every entry, as a black image is.
BLACK = 17


class NormGuide(nn.Module):
    """Sees the length of x, whose gradient is 0 / 0 at x = 0, where the loss is finite."""

    def __init__(self, x_dim: int = 5, z_dim: int = 3) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))
        self.linear = LinearGuide(x_dim, z_dim)
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.linear.encoder(x).chunk(2, -1)
            length = (self.w * x).square().sum(-1, keepdim=True).sqrt()
            return pyro.sample("z", dist.Normal(loc + length, log_scale.exp()).to_event(1))


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient where its second argument says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (where,) = ctx.saved_tensors
        return torch.where(where, gradient * torch.inf, gradient), None


def programs(guide: type[nn.Module] = NormGuide) -> tuple[LinearModel, Any]:
    """A model, and a guide of that type."""
    torch.manual_seed(0)
    return LinearModel(), guide()


def data(black: bool = True, valid: Tensor | None = None) -> Data:
    """Forty data of five numbers, one of them black."""
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    if black:
        x[BLACK] = 0
    return from_tensors(x, valid=valid, name="numbers")
