"""Small programs for the tests of objectives and training: linear, with every branch a contract allows."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class LinearModel(nn.Module):
    """z ~ N(0, I), x ~ N(W z + b, 1), with an optional factor and an optional second latent."""

    def __init__(self, x_dim: int = 5, z_dim: int = 3, factor: float = 0.0, ladder: bool = False) -> None:
        super().__init__()
        self.decoder = nn.Linear(z_dim, x_dim)
        self.top = nn.Linear(z_dim, z_dim)
        self.z_dim, self.factor, self.ladder = z_dim, factor, ladder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            zero, one = x.new_zeros(self.z_dim), x.new_ones(())
            if self.ladder:
                above = pyro.sample("z_2", dist.Normal(zero, one).to_event(1))
                z = pyro.sample("z_1", dist.Normal(self.top(above), one).to_event(1))
            else:
                z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
            if self.factor:
                pyro.factor("alignment", self.factor * z.square().sum(-1))
            return pyro.sample("x", dist.Normal(self.decoder(z), one).to_event(1), obs=x)


class LinearGuide(nn.Module):
    """q(z | x) Gaussian, diagonal, linear in x; z_1 depends on z_2 where there are two."""

    def __init__(self, x_dim: int = 5, z_dim: int = 3, ladder: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Linear(x_dim, 2 * z_dim)
        self.below = nn.Linear(x_dim + z_dim, 2 * z_dim)
        self.ladder = ladder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            if not self.ladder:
                return pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            above = pyro.sample("z_2", dist.Normal(loc, log_scale.exp()).to_event(1))
            both = torch.cat([x.expand(*above.shape[:-1], x.shape[-1]), above], -1)
            loc, log_scale = self.below(both).chunk(2, -1)
            return pyro.sample("z_1", dist.Normal(loc, log_scale.exp()).to_event(1))


def parameters(model: nn.Module, guide: nn.Module) -> list[nn.Parameter]:
    """All parameters of both."""
    return [*model.parameters(), *guide.parameters()]
