r"""A model with two latent dimensions and a curved decoder, its likelihood by quadrature."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .linear_gaussian import LinearGaussianGuide

__all__ = ["QuadratureModel"]


class _CurvedProgram(nn.Module):
    """``x`` given ``z``: a sheet bent through three dimensions, with Gaussian noise."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64).log())
        self.bend = nn.Parameter(torch.tensor([0.6, 1.5, 0.8], dtype=torch.float64))

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(self.bend.new_zeros(2), self.bend.new_ones(2)).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        first, second = z.unbind(-1)
        a, b, c = self.bend
        loc = torch.stack(
            [first + a * second.square(), torch.sin(b * second) + c * first, torch.tanh(first * second)], -1
        )
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        x = self.decode(self.prior().sample((n,)))
        return x.mean if mean else x.sample()


class QuadratureModel:
    r"""A non-linear model whose posterior is bent and sometimes has two modes.

    .. math:: p(x) = \int \mathcal N(z \mid 0, I) \, \mathcal N(x \mid f(z), \sigma^2 I) \, dz, \qquad
              f(z) = (z_1 + a z_2^2, \; \sin b z_2 + c z_1, \; \tanh z_1 z_2)

    The integrand is analytic and falls faster than exponentially, where the trapezoidal rule converges
    geometrically: with the default grid the likelihood is right to about 1e-12 relative.

    Args:
        scale: Standard deviation of the noise, at least 0.2 for the accuracy stated.
        num_nodes: Nodes a dimension on :math:`[-9, 9]`.

    Raises:
        ValueError: If ``scale`` is below 0.2 or there are fewer than 100 nodes.

    Example:
        >>> oracle = QuadratureModel()
        >>> oracle.log_prob(oracle.model.sample(5)).shape
        torch.Size([5])
    """

    def __init__(self, scale: float = 0.5, num_nodes: int = 601) -> None:
        if scale < 0.2 or num_nodes < 100:
            raise ValueError(f"scale must be at least 0.2 and num_nodes 100, got {scale} and {num_nodes}")
        self.model = _CurvedProgram(scale)
        nodes = np.linspace(-9.0, 9.0, num_nodes)
        self._log_area = 2 * np.log(nodes[1] - nodes[0])
        self._z = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
        self.imperfect_guide = self._linear_guide()

    def __repr__(self) -> str:
        return "QuadratureModel(3 <- 2, curved)"

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-likelihood by quadrature in nats, shape ``(B,)``."""
        joint = self._joint(x)
        top = joint.max(-1, keepdims=True)
        return torch.from_numpy(top[:, 0] + np.log(np.exp(joint - top).sum(-1)) + self._log_area)

    def guide_elbo(self, guide: LinearGaussianGuide, x: Tensor, y: Tensor | None = None) -> Tensor:
        """ELBO by quadrature in nats of a :class:`LinearGaussianGuide`, shape ``(B,)``."""
        scale = guide.scale.detach().numpy()
        factor = np.diag(scale) if scale.ndim == 1 else scale
        standard = (self._z[None] - guide.loc(x, y).detach().numpy()[:, None]) @ np.linalg.inv(factor).T
        log_q = -0.5 * (standard**2).sum(-1) - np.log(2 * np.pi) - np.linalg.slogdet(factor)[1]
        terms = np.exp(log_q) * (self._joint(x) - log_q)
        return torch.from_numpy(terms.sum(-1) * np.exp(self._log_area))

    def _joint(self, x: Tensor) -> NDArray[np.float64]:
        values = np.asarray(x.detach().double())
        first, second = self._z.T
        a, b, c = self.model.bend.detach().double().numpy()
        scale = float(self.model.log_scale.detach().double().exp())
        loc = np.stack([first + a * second**2, np.sin(b * second) + c * first, np.tanh(first * second)], -1)
        # |x - f|^2 by its expansion: the grid by data matrix is the only large array.
        squares = (values**2).sum(-1)[:, None] - 2 * values @ loc.T + (loc**2).sum(-1)
        log_x = -0.5 * squares / scale**2 - 3 * np.log(scale)
        return np.asarray(log_x - 0.5 * (self._z**2).sum(-1) - 2.5 * np.log(2 * np.pi))

    def _linear_guide(self) -> LinearGaussianGuide:
        """Regress ``z`` on ``x`` over a fixed draw of the model, and widen the residual."""
        random = np.random.default_rng(0)
        z = torch.from_numpy(random.normal(size=(4096, 2)))
        loc = self.model.decode(z).mean.detach()
        noise = torch.from_numpy(random.normal(size=loc.shape)) * self.model.log_scale.detach().exp()
        design = torch.cat([loc + noise, torch.ones(len(z), 1, dtype=z.dtype)], -1)
        fit = torch.linalg.lstsq(design, z).solution
        residual = z - design @ fit
        return LinearGaussianGuide(fit[:-1].T, fit[-1], 1.3 * residual.std(0))
