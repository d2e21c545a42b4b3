r"""A model with few enough latent and observed states that everything can be summed."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["DiscreteModel", "TableGuide"]


class _MixtureProgram(nn.Module):
    """``z`` categorical, ``x`` given ``z`` independent Bernoulli variables."""

    def __init__(self, logits: Tensor, x_logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.x_logits = nn.Parameter(x_logits)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.logits))
            return pyro.sample("x", dist.Bernoulli(logits=self.x_logits[z]).to_event(1), obs=x)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False) -> Tensor:
        x = dist.Bernoulli(logits=self.x_logits[dist.Categorical(logits=self.logits).sample((n,))])
        return x.mean if mean else x.sample()


class TableGuide(nn.Module):
    r"""A guide given as a table: row :math:`i` is :math:`\log q(z \mid x)` of the i-th binary vector.

    Args:
        table: Unnormalised log-probabilities, shape ``(2 ** x_dim, num_states)``.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw the state of each datum, shape ``(*particles, B)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Categorical(logits=self.table[_row(x)]))


class DiscreteModel:
    r"""A mixture of products of Bernoullis, in double precision, with everything exact by enumeration.

    .. math:: p(x) = \sum_z \pi_z \prod_d p_{zd}^{x_d} (1 - p_{zd})^{1 - x_d}

    Its guide is not reparameterised, so it serves evaluation, not pathwise training.

    Args:
        num_states: Number of values of ``z``.
        x_dim: Number of binary dimensions, at most 16.
        seed: Seed of the parameters.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> oracle = DiscreteModel(num_states=4, x_dim=3)
        >>> bool((oracle.log_prob(oracle.all_x).exp().sum() - 1).abs() < 1e-12)
        True
    """

    def __init__(self, num_states: int = 4, x_dim: int = 3, seed: int = 0) -> None:
        if num_states < 1 or not 1 <= x_dim <= 16:
            raise ValueError(f"num_states must be positive and x_dim in 1..16, got {num_states} and {x_dim}")
        random = np.random.default_rng(seed)
        logits = torch.from_numpy(random.normal(size=num_states))
        self.model = _MixtureProgram(logits, torch.from_numpy(2 * random.normal(size=(num_states, x_dim))))
        bits = torch.arange(2**x_dim).unsqueeze(-1) >> torch.arange(x_dim)
        self.all_x = (bits % 2).double()
        self.exact_guide = self.guide(self.log_posterior(self.all_x))

    def __repr__(self) -> str:
        num_states, x_dim = self.model.x_logits.shape
        return f"DiscreteModel({num_states} states, {x_dim} bits)"

    def guide(self, table: Tensor) -> TableGuide:
        """Return a guide with ``table`` of log-probabilities, shape ``(2 ** x_dim, num_states)``."""
        shape = (len(self.all_x), len(self.model.logits))
        if table.shape != shape:
            raise ValueError(f"table must have shape {shape}, got {tuple(table.shape)}")
        return TableGuide(table.clone())

    @property
    def imperfect_guide(self) -> TableGuide:
        """The exact posterior mixed half and half with the uniform distribution."""
        posterior = self.log_posterior(self.all_x).exp()
        return self.guide((0.5 * posterior + 0.5 / posterior.shape[-1]).log())

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact log-likelihood in nats, shape ``(B,)``."""
        return torch.from_numpy(_log_sum_exp(self._joint(x)))

    def log_posterior(self, x: Tensor) -> Tensor:
        """Exact log-posterior of every state, shape ``(B, num_states)``."""
        joint = self._joint(x)
        return torch.from_numpy(joint - _log_sum_exp(joint)[:, None])

    def elbo(self, table: Tensor, x: Tensor) -> Tensor:
        """Exact ELBO in nats of a guide with ``table``, shape ``(B,)``."""
        log_q = table.detach().double().numpy()[_row(x).numpy()]
        log_q = log_q - _log_sum_exp(log_q)[:, None]
        return torch.from_numpy((np.exp(log_q) * (self._joint(x) - log_q)).sum(-1))

    def guide_elbo(self, guide: TableGuide, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact ELBO in nats of a :class:`TableGuide`, shape ``(B,)``."""
        return self.elbo(guide.table, x)

    def _joint(self, x: Tensor) -> NDArray[np.float64]:
        values = np.asarray(x.detach().double())[:, None, :]
        logits = np.asarray(self.model.logits.detach().double())
        x_logits = np.asarray(self.model.x_logits.detach().double())
        log_p = values * x_logits - np.logaddexp(0.0, x_logits)
        return np.asarray(logits - _log_sum_exp(logits[None]) + log_p.sum(-1))


def _row(x: Tensor) -> Tensor:
    """Number of a binary vector: its bits, the lowest first."""
    return (x.long() << torch.arange(x.shape[-1], device=x.device)).sum(-1)


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(-1)
    return np.asarray(top + np.log(np.exp(values - top[:, None]).sum(-1)))
