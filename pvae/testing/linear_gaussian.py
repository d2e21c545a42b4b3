r"""Linear-Gaussian VAE, exact throughout: probabilistic PCA (Tipping & Bishop 1999) and factor analysis."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["LinearGaussianGuide", "LinearGaussianModel", "LinearGaussianVAE"]


class LinearGaussianModel(nn.Module):
    r"""The model program of :class:`LinearGaussianVAE`.

    .. math:: z \sim \mathcal N(0, I), \qquad
              x \mid z, y \sim \mathcal N(W z + b + V y, \mathrm{diag}\,\sigma^2)

    Args:
        weight: :math:`W`, shape ``(x_dim, z_dim)``.
        bias: :math:`b`, shape ``(x_dim,)``.
        scale: :math:`\sigma`, shape ``()`` (probabilistic PCA) or ``(x_dim,)`` (factor analysis), positive.
        label_weight: :math:`V`, shape ``(x_dim, y_dim)``, or ``None`` for a model without ``y``.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, scale: Tensor, label_weight: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.log_scale = nn.Parameter(scale.log())
        self.label_weight = None if label_weight is None else nn.Parameter(label_weight.clone())

    @property
    def scale(self) -> Tensor:
        r""":math:`\sigma`, in the units of ``x``."""
        return self.log_scale.exp()

    def prior(self) -> dist.TorchDistribution:
        """Return :math:`p(z)`, with ``event_shape (z_dim,)``."""
        loc = self.weight.new_zeros(self.weight.shape[1])
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)

    def offset(self, y: Tensor | None) -> Tensor:
        """Return :math:`b + V y`, shape ``(x_dim,)`` or ``(B, x_dim)``."""
        if self.label_weight is None:
            return self.bias
        if y is None:
            raise ValueError(f"y must have shape (B, {self.label_weight.shape[1]}), got None")
        return self.bias + y @ self.label_weight.T

    def decode(self, z: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`p(x | z, y)` for ``z`` of shape ``(*batch, z_dim)``."""
        return dist.Normal(z @ self.weight.T + self.offset(y), self.scale).to_event(1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program on ``x``, shape ``(B, x_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z, y), obs=x)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        """Draw ``x``, shape ``(n, x_dim)``, or its mean given ``z``."""
        x = self.decode(self.prior().sample((n,)), y)
        return x.mean if mean else x.sample()


class LinearGaussianGuide(nn.Module):
    r"""A Gaussian guide whose mean is affine in ``x``.

    .. math:: q(z \mid x, y) = \mathcal N(A (x - V y) + c, \Sigma)

    Args:
        weight: :math:`A`, shape ``(z_dim, x_dim)``.
        bias: :math:`c`, shape ``(z_dim,)``.
        scale: Standard deviations, shape ``(z_dim,)``, or the Cholesky factor of :math:`\Sigma`, shape
            ``(z_dim, z_dim)``.
        label_weight: :math:`V`, shape ``(x_dim, y_dim)``, or ``None``.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, scale: Tensor, label_weight: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.scale = nn.Parameter(scale.clone())
        self.label_weight = None if label_weight is None else nn.Parameter(label_weight.clone())

    def loc(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the means, shape ``(B, z_dim)``."""
        if self.label_weight is not None:
            if y is None:
                raise ValueError(f"y must have shape (B, {self.label_weight.shape[1]}), got None")
            x = x - y @ self.label_weight.T
        return x @ self.weight.T + self.bias

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return :math:`q(z | x, y)`, with ``batch_shape (B,)`` and ``event_shape (z_dim,)``."""
        loc = self.loc(x, y)
        if self.scale.ndim == 1:
            return dist.Normal(loc, self.scale).to_event(1)
        return dist.MultivariateNormal(loc, scale_tril=self.scale)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z`` for ``x``, shape ``(*particles, B, z_dim)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x, y))


class LinearGaussianVAE:
    r"""A model and its guides in double precision, with posterior, log-likelihood and bounds known exactly.

    .. math:: p(x \mid y) = \mathcal N(b + V y, W W^\top + \mathrm{diag}\,\sigma^2)

    Exact values are computed in NumPy from the parameters the model has when asked, so they follow a
    model in training; the guides are those of the parameters at construction. Parameters that are not
    given are drawn with ``seed``.

    Args:
        x_dim: Dimensions of a datum.
        z_dim: Dimensions of the latent.
        scale: Standard deviation of the noise, positive: one number (probabilistic PCA) or shape
            ``(x_dim,)`` (factor analysis).
        y_dim: Number of attributes that shift the mean; 0 for a model without ``y``.
        weight: :math:`W`, shape ``(x_dim, z_dim)``.
        bias: :math:`b`, shape ``(x_dim,)``.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size or the noise is not positive, or a shape does not fit.

    Example:
        >>> import pvae
        >>> oracle = LinearGaussianVAE(x_dim=3, z_dim=2, scale=0.5)
        >>> x = oracle.model.sample(4)
        >>> estimate = pvae.log_likelihood(oracle.model, oracle.exact_guide, x, num_particles=10)
        >>> bool((estimate.log_prob - oracle.log_prob(x)).abs().max() < 1e-10)
        True
    """

    def __init__(
        self,
        x_dim: int = 3,
        z_dim: int = 2,
        scale: float | Tensor = 0.5,
        *,
        y_dim: int = 0,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if x_dim < 1 or z_dim < 1 or y_dim < 0:
            raise ValueError(
                f"x_dim and z_dim must be positive, y_dim not negative: got {x_dim}, {z_dim}, {y_dim}"
            )
        noise = torch.as_tensor(scale, dtype=torch.float64)
        if noise.shape not in ((), (x_dim,)) or not (noise > 0).all():
            raise ValueError(f"scale must be positive, a number or of shape ({x_dim},), got {scale}")
        random = np.random.default_rng(seed)
        drawn = (random.normal(size=size) for size in ((x_dim, z_dim), (x_dim,), (x_dim, y_dim)))
        default_weight, default_bias, label_weight = (torch.from_numpy(array) for array in drawn)
        weight = default_weight if weight is None else weight.double()
        bias = default_bias if bias is None else bias.double()
        if weight.shape != (x_dim, z_dim) or bias.shape != (x_dim,):
            raise ValueError(
                f"weight and bias must have shapes {(x_dim, z_dim)} and {(x_dim,)}, "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        self.model = LinearGaussianModel(weight, bias, noise, label_weight if y_dim else None)
        gain, covariance = self._gain()
        self._gain_at_start = torch.from_numpy(gain)
        self._covariance_at_start = covariance
        self.exact_guide = self._guide(torch.from_numpy(np.linalg.cholesky(covariance)))

    def __repr__(self) -> str:
        x_dim, z_dim = self.model.weight.shape
        noise = "diagonal noise" if self.model.log_scale.ndim else "isotropic noise"
        labels = "" if self.model.label_weight is None else ", labels"
        return f"LinearGaussianVAE({x_dim} <- {z_dim}, {noise}{labels})"

    @property
    def mean_field_guide(self) -> LinearGaussianGuide:
        """The diagonal Gaussian guide with the highest ELBO: exact means, variances ``1 / precision_jj``."""
        return self.widened_guide(1.0)

    @property
    def imperfect_guide(self) -> LinearGaussianGuide:
        r"""A diagonal guide with ``z_dim`` times the posterior's variances, so that weights are bounded.

        For a covariance with diagonal :math:`D`, the precision is at least :math:`D^{-1} / z_{dim}`.
        """
        variance = len(self._covariance_at_start) * self._covariance_at_start.diagonal()
        return self._guide(torch.from_numpy(variance**0.5))

    def widened_guide(self, factor: float) -> LinearGaussianGuide:
        """Return the mean-field guide with its standard deviations multiplied by ``factor``."""
        precision = np.linalg.inv(self._covariance_at_start).diagonal()
        return self._guide(factor * torch.from_numpy(precision**-0.5))

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact log-likelihood in nats, shape ``(B,)``."""
        weight, variance = self._weight(), self._variance()
        residual = self._residual(x, y)
        covariance = weight @ weight.T + np.diag(variance)
        _, log_det = np.linalg.slogdet(covariance)
        distance = (residual * np.linalg.solve(covariance, residual.T).T).sum(-1)
        return torch.from_numpy(-0.5 * (distance + log_det + len(variance) * np.log(2 * np.pi)))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact posterior: means ``(B, z_dim)`` and the covariance ``(z_dim, z_dim)`` all data share."""
        gain, covariance = self._gain()
        return torch.from_numpy(self._residual(x, y) @ gain.T), torch.from_numpy(covariance)

    def elbo(self, loc: Tensor, covariance: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        r"""Exact ELBO of Gaussian posteriors :math:`\mathcal N(\mu, \Sigma)` in nats, shape ``(B,)``.

        The identity used is :math:`\log p(x) - KL(q \,\|\, p(z \mid x))`.

        Args:
            loc: Means, shape ``(B, z_dim)``.
            covariance: Covariance, shape ``(z_dim, z_dim)`` or ``(B, z_dim, z_dim)``.
            x: Data, shape ``(B, x_dim)``.
            y: Attributes, shape ``(B, y_dim)``, or ``None``.
        """
        mean, exact = (part.numpy() for part in self.posterior(x, y))
        sigma = covariance.detach().double().numpy()
        distance = loc.detach().double().numpy() - mean
        precision = np.linalg.inv(exact)
        kl = 0.5 * (
            np.einsum("ij,...ji->...", precision, sigma)
            + np.einsum("bi,ij,bj->b", distance, precision, distance)
            - len(exact)
            + np.linalg.slogdet(exact)[1]
            - np.linalg.slogdet(sigma)[1]
        )
        return self.log_prob(x, y) - torch.from_numpy(kl)

    def guide_elbo(self, guide: LinearGaussianGuide, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact ELBO of a :class:`LinearGaussianGuide` in nats, shape ``(B,)``."""
        scale = guide.scale.detach()
        covariance = scale.square().diag() if scale.ndim == 1 else scale @ scale.T
        return self.elbo(guide.loc(x, y), covariance, x, y)

    def _guide(self, scale: Tensor) -> LinearGaussianGuide:
        model = self.model
        label_weight = None if model.label_weight is None else model.label_weight.detach()
        bias = -self._gain_at_start @ model.bias.detach()
        return LinearGaussianGuide(self._gain_at_start, bias, scale, label_weight)

    def _gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        weight = self._weight()
        scaled = weight / self._variance()[:, None]
        covariance = np.linalg.inv(np.eye(weight.shape[1]) + weight.T @ scaled)
        covariance = (covariance + covariance.T) / 2
        return covariance @ scaled.T, covariance

    def _weight(self) -> NDArray[np.float64]:
        return np.asarray(self.model.weight.detach().double())

    def _variance(self) -> NDArray[np.float64]:
        variance = np.exp(2 * np.asarray(self.model.log_scale.detach().double()))
        return np.broadcast_to(variance, (len(self.model.weight),))

    def _residual(self, x: Tensor, y: Tensor | None) -> NDArray[np.float64]:
        return np.asarray(x.detach().double() - self.model.offset(y).detach())
