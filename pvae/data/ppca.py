"""Data of probabilistic PCA (Tipping and Bishop 1999), with their exact Gaussian density."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from ._synthetic import affordable, known_source, positive
from .dataset import Source

__all__ = ["PPCA", "ppca"]


@dataclass(frozen=True)
class PPCA:
    r"""The linear Gaussian latent variable model.

    .. math:: z \sim \mathcal N(0, I), \quad x \mid z \sim \mathcal N(W z + b, \sigma^2 I), \quad
              x \sim \mathcal N(b, W W^\top + \sigma^2 I)

    Args:
        W: Loadings, shape ``(x_dim, z_dim)``, float64.
        b: Mean, shape ``(x_dim,)``, float64.
        noise: Standard deviation of the noise.
    """

    W: Tensor
    b: Tensor
    noise: float

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats, ``(*batch, x_dim) -> (*batch,)``.

        Raises:
            ValueError: If the last dimension of ``x`` is not ``x_dim``.
        """
        if x.shape[-1:] != self.b.shape:
            raise ValueError(f"x must have shape (*batch, {len(self.b)}), got {tuple(x.shape)}")
        variance = torch.full_like(self.b, self.noise**2)
        return torch.distributions.LowRankMultivariateNormal(
            self.b.to(x), self.W.to(x), variance.to(x), validate_args=False
        ).log_prob(x)

    def draw(self, generator: np.random.Generator, n: int) -> tuple[NDArray[np.float64], None]:
        """Draw ``n`` points, ``(n, x_dim)``."""
        x_dim, z_dim = self.W.shape
        z = generator.standard_normal((n, z_dim))
        noise = generator.standard_normal((n, x_dim))
        return z @ self.W.numpy().T + self.b.numpy() + self.noise * noise, None


def ppca(
    request: Request,
    *,
    x_dim: int = 10,
    z_dim: int = 2,
    noise: float = 0.5,
    num_train: int = 10_000,
    num_test: int = 5_000,
) -> Source:
    """Draw from a linear Gaussian latent variable model, ``x_shape (x_dim,)``, without labels.

    Loadings and mean are standard normal, drawn by ``seed``; ``data.truth`` holds them.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (2,000).
        x_dim: Dimension of the data.
        z_dim: Dimension of the latent variable.
        noise: Standard deviation of the noise.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    positive(x_dim=x_dim, z_dim=z_dim, noise=noise)
    affordable(x_dim=x_dim, z_dim=z_dim)
    for name, size in {"num_train": num_train, "num_test": num_test, "valid": request.valid or 0}.items():
        affordable(**{name: size}, z_dim=z_dim)
    generator = np.random.default_rng(derive_seed(request.name, request.seed, "parameters"))
    W = torch.from_numpy(generator.standard_normal((x_dim, z_dim)))
    truth = PPCA(W, torch.from_numpy(generator.standard_normal(x_dim)), noise)
    return known_source(request, truth, num_train=num_train, num_test=num_test)
