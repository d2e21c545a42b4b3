"""Programs whose alignment with their prior is known: Gaussian everywhere, wrong where they are told to."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["Encoding", "Latent", "Layers"]


class Latent(nn.Module):
    """z ~ N(loc, scale^2 I), or N(label_weight y, scale^2 I); x ~ N(z, noise^2 I)."""

    def __init__(
        self, z_dim: int = 3, loc: float = 0.0, scale: float = 1.0, label_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.z_dim, self.loc, self.scale, self.label_weight = z_dim, loc, scale, label_weight
        self.conditional = label_weight != 0
        self.noise = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc = x.new_full((self.z_dim,), self.loc)
            if y is not None:
                loc = loc + self.label_weight * y.to(x).unsqueeze(-1)
            z = pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))
            return pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)


class Encoding(nn.Module):
    """q(z | x) = N(gain x + shift, scale^2 I)."""

    def __init__(self, gain: float = 1.0, shift: float = 0.0, scale: float = 0.1) -> None:
        super().__init__()
        self.gain, self.shift, self.scale = gain, shift, scale
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc = self.gain * self.dropout(x) + self.shift
            return pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


class Layers(nn.Module):
    """Two latents, the lower one scalar: z_2 ~ N(0, I_2), z_1 ~ N(z_2 . 1, 1), x ~ N((z_2, z_1), 1).

    As a guide: z_2 ~ N(x_1:2 / 2, 0.5^2), then z_1 ~ N(x_3 / 2 + z_2 . 1, 0.5^2).
    """

    def __init__(self, guide: bool = False) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.guide:
                above = pyro.sample("z_2", dist.Normal(x[..., :2] / 2, 0.5).to_event(1))
                pyro.sample("z_1", dist.Normal(x[..., 2] / 2 + above.sum(-1), 0.5))
                return
            above = pyro.sample("z_2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            below = pyro.sample("z_1", dist.Normal(above.sum(-1), 1.0))
            both = torch.cat([above, below.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(both, 1.0).to_event(1), obs=x)
