r"""Density of a variance-preserving diffusion, bounded or estimated (Kingma et al. 2021, arXiv:2107.00630v6;
the chain and its calibrated variances are worked out in the class's docstring).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

__all__ = ["Diffusion", "DiffusionEstimator", "DiffusionPrediction"]

DiffusionEstimator = Literal["vlb", "chain"]
DiffusionPrediction = Literal["v", "eps"]

# Rows of y, one for each datum and step, in one pass of the denoiser: few data take many steps at once.
_PASS_ROWS = 4096


class Diffusion(TorchDistribution):
    r"""The u that a denoiser makes out of noise in :math:`T` steps, and what is known of its density.

    **Noising.** With :math:`\gamma_t = \gamma_0 + (\gamma_1 - \gamma_0) t` for :math:`t \in [0, 1]`,
    :math:`\alpha_t^2 = \mathrm{sigmoid}(-\gamma_t)` and :math:`\sigma_t^2 = \mathrm{sigmoid}(\gamma_t)`,
    :math:`q(y_t \mid u) = \mathcal N(\alpha_t u, \sigma_t^2 I)`. Written as
    :math:`y_t = \alpha_t u + \sigma_t \epsilon_t`, the noise along a path is the stationary process

    .. math:: \epsilon_s = e^{-\Delta/2} \epsilon_t + \sqrt{1 - e^{-\Delta}} \, \xi, \qquad
              \Delta = \gamma_t - \gamma_s > 0, \quad \xi \sim \mathcal N(0, I)

    and :math:`q(y_s \mid y_t, u)` has the standard deviation
    :math:`\sigma_Q = \sqrt{1 - e^{-\Delta}} \, \sigma_s`. So a path needs no denoiser.

    **The model**, which :meth:`sample` simulates on the grid :math:`t_i = i / T`, from
    :math:`y_{t_T} \sim \mathcal N(0, I)` down, with the denoiser's
    :math:`\hat u = (y_t - \sigma_t \hat\epsilon(y_t, \gamma_t)) / \alpha_t`:

    .. math::
        p(y_s \mid y_t) &= \mathcal N\!\left(\alpha_s \left[e^{-\Delta} y_t / \alpha_t
                           + (1 - e^{-\Delta}) \hat u\right],\; \sigma_Q^2 r_i\right), \qquad
        p(u \mid y_0) = \mathcal N(y_0 / \alpha_0, e^{\gamma_0} I) \\
        r_i &= 1 + (e^\Delta - 1) m_i, \qquad m_i = \mathbb E (\epsilon_{t_i} - \hat\epsilon_{t_i})^2

    where :math:`m`, of the shape of u for each step, is measured on training data (``mse``), or zero.
    Those :math:`r_i` minimise the KL of each step, which becomes :math:`\tfrac12 \sum \log r_i`. For
    normal u with independent entries and the optimal denoiser that sum telescopes: the model's bound is
    the continuous one, and its density exact but for the two ends, at any T.

    **Its density** :math:`p_T(u)` is an integral over paths; there are two stochastic stand-ins for its
    logarithm, with fresh noise at every call of :meth:`log_prob`. They are valid in different places, and
    the attribute ``density`` says which.

    ``"vlb"`` (``density = "bound"``): :math:`\mathbb E[\texttt{log\_prob}] \le \log p_\infty(u)`, the
    evidence bound of the model in continuous time (:math:`T \to \infty`, :math:`m = 0`),

    .. math::
        -\mathbb E[\texttt{log\_prob}] = \tfrac D2 (\log 2\pi + \gamma_0 + 1)
        + \tfrac12 \int_0^1 \gamma_t' \, \mathbb E \Vert \epsilon - \hat\epsilon(y_t, \gamma_t) \Vert^2 dt
        + \tfrac12 \sum_j \left(\alpha_1^2 u_j^2 + \sigma_1^2 - \log \sigma_1^2 - 1\right)

    with the integral estimated at ``num_times`` times for each datum, stratified within a datum and over
    the batch, where they are handed out in random order. The weight :math:`\gamma_t'` is that of the
    likelihood, and no other. It may enter any objective that is linear in it, an ELBO above all. It must not
    be exponentiated: :math:`\mathbb E e^{\texttt{log\_prob}}` has no relation to any density, and is usually
    far above.

    ``"chain"`` (``density = "unbiased"``): one noising path from u,

    .. math::
        \texttt{log\_prob} = \log \frac{p(y_1)}{q(y_1 \mid u)}
        + \sum_{i=1}^T \log \frac{p(y_s \mid y_t)}{q(y_s \mid y_t, u)} + \log p(u \mid y_0), \qquad
        \mathbb E \, e^{\texttt{log\_prob}} = p_T(u)

    exactly. In a weight :math:`p(x, u) / q(u \mid x)` it makes importance sampling on the space of u and its
    path, with the guide :math:`q(u \mid x) q(y \mid u)`: every bound of the ELBO's family holds for the
    T-step model, monotone in the number of particles. With
    :math:`\delta = \sqrt{e^\Delta - 1} \, (\hat\epsilon - \epsilon_t)` a step's term is
    :math:`-\tfrac12 \sum [(\xi + \delta)^2 / r - \xi^2 + \log r]`: no small variance is ever divided by.

    The mathematics is done in single precision at least, under autocast too, whatever the denoiser computes
    in. Neither mean nor variance is known.

    Args:
        denoise: Called with y, shape ``(*batch, *u_shape)``, and :math:`\gamma`, whose shape broadcasts
            against ``batch``; returns the prediction, shape of y.
        schedule: :math:`(\gamma_0, \gamma_1)`, increasing scalars: minus the logarithm of the signal-to-noise
            ratio at both ends.
        u_shape: Event shape.
        estimator: What :meth:`log_prob` is, see above.
        num_steps: T, of :meth:`sample` and ``"chain"``.
        num_times: Times for each datum of ``"vlb"``.
        prediction: What the denoiser predicts: :math:`\epsilon`, or :math:`v = \alpha_t \epsilon -
            \sigma_t u`, so that :math:`\hat\epsilon = \sigma_t y + \alpha_t \hat v`.
        mse: :math:`m_1, \dots, m_T`, non-negative, shape ``(num_steps, *u_shape)``; zero if ``None``.
        validate_args: Whether arguments and values are checked; Pyro's setting if ``None``.

    Attributes:
        density: ``"bound"`` or ``"unbiased"``; distributions without the attribute have an exact density.

    Raises:
        ValueError: If a word is unknown, a number is not positive, ``u_shape`` is empty, ``mse`` has another
            shape, or (where arguments are checked) the schedule does not increase.

    Example:
        >>> schedule = torch.tensor(-6.0), torch.tensor(7.0)
        >>> p = Diffusion(lambda y, gamma: torch.zeros_like(y), schedule, (1, 7, 7), num_steps=25)
        >>> p.log_prob(p.sample((3,))).shape
        torch.Size([3])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        schedule: tuple[Tensor, Tensor],
        u_shape: Sequence[int],
        estimator: DiffusionEstimator = "chain",
        num_steps: int = 100,
        num_times: int = 1,
        prediction: DiffusionPrediction = "v",
        mse: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        for name, word, known in (
            ("estimator", estimator, get_args(DiffusionEstimator)),
            ("prediction", prediction, get_args(DiffusionPrediction)),
        ):
            if word not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")
        for name, size in (("num_steps", num_steps), ("num_times", num_times)):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if not len(u_shape):
            raise ValueError("u_shape must have at least one dimension, got ()")
        if mse is not None and mse.shape != (num_steps, *u_shape):
            raise ValueError(f"mse must have shape {(num_steps, *u_shape)}, got {tuple(mse.shape)}")
        self.denoise, self.schedule, self.mse = denoise, schedule, mse
        self.estimator, self.prediction = estimator, prediction
        self.num_steps, self.num_times = num_steps, num_times
        super().__init__(torch.Size(), torch.Size(u_shape), validate_args=validate_args)
        if self._validate_args and not bool(schedule[0] < schedule[1]):
            raise ValueError(f"schedule must increase, got {float(schedule[0])} to {float(schedule[1])}")

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All real tensors of the event shape."""
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def density(self) -> Literal["bound", "unbiased"]:
        """What :meth:`log_prob` may be used for: linearly alone, or in a log-mean-exp as well."""
        return "bound" if self.estimator == "vlb" else "unbiased"

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Diffusion":
        """Return the same distribution for a wider batch of independent u, each with a path of its own."""
        new = self._get_checked_instance(Diffusion, _instance)
        for name in ("denoise", "schedule", "mse", "estimator", "prediction", "num_steps", "num_times"):
            setattr(new, name, getattr(self, name))
        super(Diffusion, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = (), temperature: float = 1.0) -> Tensor:
        r"""Draw u from the T-step model.

        Args:
            sample_shape: Shape of independent draws, put in front.
            temperature: Factor of every variance on the way, :math:`p(u \mid y_0)` included. At 1 the draws
                follow the density; 0 gives the path without noise.

        Returns:
            Shape ``(*sample_shape, *batch_shape, *u_shape)``.

        Raises:
            ValueError: If ``temperature`` is negative.
        """
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        with torch.no_grad():
            dtype = _wide(self.schedule[0].dtype)
            gamma, ratio = self._grid(dtype), self._ratio(dtype)
            alpha, sigma = _signal(gamma), _signal(-gamma)
            fresh = -torch.expm1(gamma[:-1] - gamma[1:])
            shape, scale = self._extended_shape(torch.Size(sample_shape)), math.sqrt(temperature)

            def noise() -> Tensor:
                return scale * torch.randn(shape, dtype=dtype, device=gamma.device)

            y = noise()
            for i in range(self.num_steps, 0, -1):
                predicted = self._predicted_noise(y, gamma[i])
                mean = alpha[i - 1] / alpha[i] * (y - sigma[i] * fresh[i - 1] * predicted)
                y = mean + sigma[i - 1] * (fresh[i - 1] * ratio[i - 1]).sqrt() * noise()
            return y / alpha[0] + (0.5 * gamma[0]).exp() * noise()

    def log_prob(self, value: Tensor) -> Tensor:
        """Estimate the log-density of u in nats, with new noise at every call.

        Args:
            value: Shape ``(*batch, *u_shape)``.

        Returns:
            Shape ``(*batch)``, broadcast against the batch shape; differentiable in the value, and in what
            the denoiser and the schedule stand on.
        """
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[: value.ndim - self.event_dim], self.batch_shape)
        u = value.to(_wide(value.dtype)).expand(*batch, *self.event_shape)
        return self._bound(u) if self.estimator == "vlb" else self._along_a_path(u)

    def squared_errors(self, u: Tensor) -> Tensor:
        r"""Mean over a batch of :math:`(\epsilon_{t_i} - \hat\epsilon_{t_i})^2`: an estimate of ``mse``.

        Args:
            u: Shape ``(*batch, *u_shape)``; one draw of noise for each datum and step.

        Returns:
            Shape ``(num_steps, *u_shape)``, without gradient.
        """
        with torch.no_grad():
            u = u.to(_wide(u.dtype)).reshape(-1, *self.event_shape)
            gamma = self._grid(u.dtype)[1:].unsqueeze(-1)
            parts = []
            for steps in _passes(self.num_steps, len(u)):
                eps = torch.randn(len(steps), *u.shape, dtype=u.dtype, device=u.device)
                # From the last step to the first, as the path of a chain goes.
                parts.append(self._error(u, eps, gamma[steps[-1] : steps[0] + 1].flip(0)).square().mean(1))
            return torch.cat(parts).flip(0)

    def _bound(self, u: Tensor) -> Tensor:
        """Draw the stochastic evidence bound of the model in continuous time."""
        low, high = (end.to(u.dtype) for end in self.schedule)
        batch = u.shape[: u.ndim - self.event_dim]
        gamma = low + (high - low) * self._times(batch, u)
        eps = torch.randn(self.num_times, *u.shape, dtype=u.dtype, device=u.device)
        diffusion = (high - low) * self._summed(self._error(u, eps, gamma).square()).mean(0)
        prior = self._summed(torch.sigmoid(-high) * u.square() + torch.sigmoid(high) - F.logsigmoid(high) - 1)
        reconstruction = self.event_shape.numel() * (math.log(2 * math.pi) + low + 1)
        return -0.5 * (reconstruction + diffusion + prior)

    def _times(self, batch: torch.Size, like: Tensor) -> Tensor:
        """Times in [0, 1), each uniform, spread evenly within a datum and over the data."""
        count, device = batch.numel(), like.device
        order = torch.rand(count, device=device).argsort()  # a permutation, without a host sync
        first = (torch.rand((), dtype=like.dtype, device=device) + order.to(like.dtype) / count) % 1
        strata = torch.arange(self.num_times, dtype=like.dtype, device=device).unsqueeze(-1)
        return ((first + strata) / self.num_times).reshape(self.num_times, *batch)

    def _along_a_path(self, u: Tensor) -> Tensor:
        """Draw a noising path and return its log-weight under the T-step model."""
        rows = u.shape[: u.ndim - self.event_dim]
        gamma, ratio = self._grid(u.dtype), self._ratio(u.dtype)
        step = (gamma[-1] - gamma[0]) / self.num_steps
        grown, kept, fresh = torch.expm1(step).sqrt(), (-0.5 * step).exp(), (-torch.expm1(-step)).sqrt()
        eps = torch.randn_like(u)
        y = _signal(gamma[-1]) * u + _signal(-gamma[-1]) * eps
        total = self._summed(eps.square() - y.square() + F.logsigmoid(gamma[-1]))
        for steps in _passes(self.num_steps, rows.numel()):
            path, noise = [], []
            for _ in steps:
                path.append(eps)
                noise.append(torch.randn_like(u))
                eps = kept * eps + fresh * noise[-1]
            at = slice(steps[-1] + 1, steps[0] + 2)
            levels = gamma[at].flip(0).reshape(-1, *(1 for _ in rows))
            xi = torch.stack(noise)
            delta = grown * -self._error(u, torch.stack(path), levels)
            spread = ratio[steps[-1] : steps[0] + 1].flip(0)
            spread = spread.reshape(len(steps), *(1 for _ in rows), *ratio.shape[1:])
            total = total - self._summed((xi + delta).square() / spread - xi.square()).sum(0)
        # The weight of the last step, and log r of all of them.
        total = total - self._summed(eps.square() + gamma[0] + math.log(2 * math.pi))
        return 0.5 * (total - ratio.expand(self.num_steps, *self.event_shape).log().sum())

    def _error(self, u: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
        r""":math:`\epsilon - \hat\epsilon` at noise levels ``gamma`` that broadcast against the batch."""
        wide = gamma.reshape(*gamma.shape, *(1 for _ in self.event_shape))
        return eps - self._predicted_noise(_signal(wide) * u + _signal(-wide) * eps, gamma)

    def _predicted_noise(self, y: Tensor, gamma: Tensor) -> Tensor:
        predicted = self.denoise(y, gamma).to(y.dtype)
        if self.prediction == "eps":
            return predicted
        wide = gamma.reshape(*gamma.shape, *(1 for _ in self.event_shape))
        return _signal(-wide) * y + _signal(wide) * predicted

    def _grid(self, dtype: torch.dtype) -> Tensor:
        r""":math:`\gamma_{t_0}, \dots, \gamma_{t_T}`, shape ``(num_steps + 1,)``."""
        low, high = (end.to(dtype) for end in self.schedule)
        return low + (high - low) * torch.linspace(0, 1, self.num_steps + 1, dtype=dtype, device=low.device)

    def _ratio(self, dtype: torch.dtype) -> Tensor:
        r""":math:`r_1, \dots, r_T`, shape ``(num_steps, *u_shape)``, or of as many dimensions if all ones."""
        low, high = (end.to(dtype) for end in self.schedule)
        if self.mse is None:
            return low.new_ones(self.num_steps, *(1 for _ in self.event_shape))
        return 1 + torch.expm1((high - low) / self.num_steps) * self.mse.to(dtype)

    def _summed(self, terms: Tensor) -> Tensor:
        return terms.sum(tuple(range(-self.event_dim, 0)))


def _signal(gamma: Tensor) -> Tensor:
    r""":math:`\alpha`, the factor of the signal; that of the noise, :math:`\sigma`, is the same at minus
    gamma.
    """
    return torch.sigmoid(-gamma).sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Single precision at least: half has no digits left for what cancels here."""
    return torch.promote_types(dtype, torch.float32)


def _passes(num_steps: int, rows: int) -> Iterator[list[int]]:
    """Places of steps in a table, from the last one down, as many at once as one pass takes."""
    size = max(1, _PASS_ROWS // max(1, rows))
    for last in range(num_steps - 1, -1, -size):
        yield list(range(last, max(-1, last - size), -1))
