"""Programs that tempt an estimator: training terms, a variance with a state, a guide good on some data."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from .linear_gaussian import LinearGaussianGuide, LinearGaussianModel

__all__ = [
    "AlignedGuide",
    "AlignedModel",
    "PartlyNarrowGuide",
    "RefittingModel",
    "ScaledGuide",
    "ScaledModel",
]


class AlignedModel(nn.Module):
    """A model with a training-only factor inside its plate, marked as such or not.

    Args:
        model: The model without it.
        marked: Whether the site says ``infer={"training_only": True}``; else it is a plain ``pyro.factor``.
    """

    def __init__(self, model: LinearGaussianModel, marked: bool) -> None:
        super().__init__()
        self.model = model
        self.marked = marked

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program of the model and its factor."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.model.prior())
            bonus = 3 - z.square().sum(-1)
            if self.marked:
                unit = dist.Unit(bonus)
                pyro.sample("alignment", unit, obs=unit.sample(), infer={"training_only": True})
            else:
                pyro.factor("alignment", bonus)
            return pyro.sample("x", self.model.decode(z, y), obs=x)


class AlignedGuide(nn.Module):
    """A guide with a training-only factor inside its plate."""

    def __init__(self, guide: LinearGaussianGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program of the guide and its factor."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.guide.posterior(x, y))
            pyro.factor("alignment_of_guide", z.sum(-1) - 2, has_rsample=True)
            return z


class ScaledModel(nn.Module):
    """A model whose latent and data terms carry training weights."""

    def __init__(self, model: LinearGaussianModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program of the model under weights."""
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", self.model.prior())
            with poutine.scale(scale=2.5):
                return pyro.sample("x", self.model.decode(z, y), obs=x)


class ScaledGuide(nn.Module):
    """A guide whose latent carries a training weight."""

    def __init__(self, guide: LinearGaussianGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program of the guide under a weight."""
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=0.1):
            return pyro.sample("z", self.guide.posterior(x, y))


class RefittingModel(nn.Module):
    r"""A linear-Gaussian model whose noise is refitted to every batch in training and stored for evaluation.

    In training mode :math:`\sigma^2` is the mean squared error of the batch, as in the optimal-sigma VAE
    (Rybkin et al. 2021, arXiv:2006.13202); in evaluation mode it is the buffer ``scale``.
    """

    scale: Tensor

    def __init__(self, model: LinearGaussianModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", model.scale.detach().clone())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program, refitting the noise first in training mode."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.model.prior())
            loc = self.model.decode(z, y).mean
            if self.training:
                self.scale.copy_((x - loc).detach().square().mean().sqrt())
            return pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


class PartlyNarrowGuide(nn.Module):
    r"""A guide that is too wide for some data and far too narrow for others.

    With the exact means and :math:`s^2` times the exact covariance, the weights of a datum have tail
    index :math:`1 - s^2`: none for :math:`s > 1`, close to 1 for a small :math:`s`.

    Args:
        guide: The exact guide.
        wide: Factor :math:`s` of data whose last coordinate is not positive.
        narrow: Factor of the others.
    """

    def __init__(self, guide: LinearGaussianGuide, wide: float = 1.2, narrow: float = 0.25) -> None:
        super().__init__()
        self.guide = guide
        self.factors = (wide, narrow)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``z``; which data are narrow is told by the last coordinate of ``x`` being positive."""
        factor = torch.where(x[..., -1] > 0, self.factors[1], self.factors[0]).to(x.dtype)
        with pyro.plate("data", len(x), dim=-1):
            scale_tril = factor[..., None, None] * self.guide.scale
            return pyro.sample("z", dist.MultivariateNormal(self.guide.loc(x, y), scale_tril=scale_tril))
