"""Independent binary entries as one distribution, instead of a Bernoulli inside an Independent."""

from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

__all__ = ["IndependentBernoulli"]


class IndependentBernoulli(dist.TorchDistribution):
    r"""Product of Bernoullis over the last dimensions.

    .. math:: \log p(x) = \sum_i \bigl( x_i \log \mathrm{sigmoid}(l_i)
              + (1 - x_i) \log (1 - \mathrm{sigmoid}(l_i)) \bigr)

    The density of ``Bernoulli(logits=logits).to_event(event_dim)``, which takes the sign of every entry
    before it sums, forwards and backwards; here the sum comes first, and a training step on 784 pixels is
    some hundredths cheaper. Without gradients it is formed as :math:`\log \mathrm{sigmoid}(l_i) - (1 - x_i)
    l_i`, the same to the bit for bits, in fewer passes over memory.

    Args:
        logits: Log-odds, shape ``(*batch, *event_shape)``.
        event_dim: Number of dimensions of ``event_shape``, at least 1.
        validate_args: Whether to check arguments; by default as Pyro is set.

    Raises:
        ValueError: If ``event_dim`` is not between 1 and the number of dimensions of ``logits``.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012

    def __init__(self, logits: Tensor, event_dim: int, validate_args: bool | None = None) -> None:
        if not 1 <= event_dim <= logits.ndim:
            raise ValueError(f"event_dim must lie in 1 ... {logits.ndim}, got {event_dim}")
        self.logits = logits
        super().__init__(logits.shape[:-event_dim], logits.shape[-event_dim:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        """Entries of 0 and 1."""
        return constraints.independent(constraints.boolean, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Return this distribution with another batch shape, without a copy."""
        new: Self = self._get_checked_instance(IndependentBernoulli, _instance)
        new.logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        super(IndependentBernoulli, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``(*sample_shape, *batch_shape, *event_shape)`` of zeros and ones."""
        with torch.no_grad():
            probs = self.mean.expand(self._extended_shape(sample_shape))
            return (torch.rand_like(probs) < probs).to(probs.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass in nats, of the batch shape that ``value`` and the distribution broadcast to."""
        if self._validate_args:
            self._validate_sample(value)
        if not torch.is_grad_enabled():
            # The value stays as small as it is: it mostly lacks the logits' dimension of particles.
            terms = torch.addcmul(F.logsigmoid(self.logits), 1 - value, self.logits, value=-1)
            return terms.flatten(-self.event_dim).sum(-1)
        logits, value = torch.broadcast_tensors(self.logits, value)
        cost = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -cost.flatten(-self.event_dim).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, of the batch shape."""
        cost = F.binary_cross_entropy_with_logits(self.logits, self.mean, reduction="none")
        return cost.flatten(-self.event_dim).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Probabilities of 1."""
        return torch.sigmoid(self.logits)

    @property
    def variance(self) -> Tensor:
        """Variances of the entries."""
        return self.mean * torch.sigmoid(-self.logits)
