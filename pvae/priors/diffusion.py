r"""Diffusion prior over pseudoinputs (Kuzina & Tomczak 2024, arXiv:2412.01373v1), with the reverse variances
calibrated on training data.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from pvae.distributions import Diffusion, DiffusionEstimator, DiffusionPrediction
from pvae.nn.leading import check_event, check_sizes
from pvae.ops import has_float64

__all__ = ["DiffusionPrior"]


class DiffusionPrior(nn.Module):
    r"""A :class:`pvae.distributions.Diffusion` with its denoiser, schedule and calibration.

    In training mode its density is the stochastic bound ``"vlb"``, which enters an ELBO; in evaluation mode
    the unbiased ``"chain"``, which enters importance weights too. :meth:`using` sets another.

    :math:`\gamma` is linear in time. Learned, its ends are two parameters that keep their order: in
    continuous time the bound depends on nothing else of a schedule. ``gamma_min`` is the logarithm of the
    variance that the last step adds to u: three below the logarithm of u's own noise variance costs little.

    Args:
        denoiser: Maps y ``(*batch, *u_shape)`` and :math:`\gamma`, whose shape broadcasts against ``batch``,
            to a prediction ``(*batch, *u_shape)``.
        u_shape: Shape of u.
        gamma_min: Minus the logarithm of the signal-to-noise ratio at the data.
        gamma_max: The same at the noise.
        learned: Whether both are trained.
        prediction: What the denoiser predicts, ``"v"`` or ``"eps"``.
        num_steps: Steps of the sampler, and of ``"chain"``.

    Attributes:
        mse: Mean squared error of the predicted noise at each step, shape ``(num_steps, *u_shape)``: what
            :meth:`calibrate` measured, zero before.
        estimator: What :meth:`using` set; ``None`` for the choice by mode.
        num_times: Times for each datum of ``"vlb"``.

    Raises:
        ValueError: If ``gamma_min`` is not below ``gamma_max``, ``num_steps`` is not positive, or
            ``prediction`` is unknown.

    Example:
        >>> from pvae.nn import MLPDenoiser
        >>> prior = DiffusionPrior(MLPDenoiser((1, 7, 7)), (1, 7, 7))
        >>> prior().density, prior.eval()().density
        ('bound', 'unbiased')
    """

    conditional = False
    gamma_min: Tensor
    log_span: Tensor
    mse: Tensor

    def __init__(
        self,
        denoiser: nn.Module,
        u_shape: Sequence[int],
        gamma_min: float = -7.0,
        gamma_max: float = 7.0,
        learned: bool = False,
        prediction: DiffusionPrediction = "v",
        num_steps: int = 100,
    ) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise ValueError(f"gamma_min must be below gamma_max, got {gamma_min} and {gamma_max}")
        self.u_shape = check_sizes("u_shape", u_shape)
        self.denoiser, self.prediction, self.learned = denoiser, prediction, learned
        self.num_steps, self.num_times = num_steps, 1
        self.estimator: DiffusionEstimator | None = None
        ends = {
            "gamma_min": torch.tensor(float(gamma_min)),
            "log_span": torch.tensor(float(gamma_max - gamma_min)).log(),
        }
        for name, end in ends.items():
            if learned:
                self.register_parameter(name, nn.Parameter(end))
            else:
                self.register_buffer(name, end)
        self.register_buffer("mse", torch.zeros(max(num_steps, 0), *self.u_shape))
        # On the host: reading the buffer in a step would wait for the device.
        self._calibrated = False
        self()  # the distribution checks the other arguments

    def extra_repr(self) -> str:
        """What ``print`` shows in the brackets."""
        return f"u_shape={self.u_shape}, num_steps={self.num_steps}, calibrated={self.calibrated}"

    @property
    def z_dim(self) -> int:
        """Size of u, for a model whose latent it is."""
        return math.prod(self.u_shape)

    @property
    def gamma_max(self) -> Tensor:
        """Minus the logarithm of the signal-to-noise ratio at the noise, a scalar."""
        return self.gamma_min + self.log_span.exp()

    @property
    def calibrated(self) -> bool:
        """Whether the reverse variances have been measured."""
        return self._calibrated

    def forward(self, y: Tensor | None = None) -> Diffusion:
        """Return :math:`p(u)`, with ``batch_shape ()`` and ``event_shape u_shape``.

        Raises:
            ValueError: If ``y`` is given: this prior is unconditional.
        """
        if y is not None:
            raise ValueError("DiffusionPrior is unconditional: y must be None")
        return self._distribution(self.estimator or ("vlb" if self.training else "chain"))

    @contextmanager
    def using(self, estimator: DiffusionEstimator | None, num_times: int = 1) -> Iterator[Self]:
        """Set the estimator for a while, in whatever mode.

        Args:
            estimator: ``"vlb"``, ``"chain"``, or ``None`` for the choice by mode.
            num_times: Times for each datum of ``"vlb"``; more have less noise, and cost a pass of the
                denoiser each.
        """
        before = self.estimator, self.num_times
        self.estimator, self.num_times = estimator, num_times
        try:
            yield self
        finally:
            self.estimator, self.num_times = before

    def sample(self, sample_shape: Sequence[int] = (), temperature: float = 1.0) -> Tensor:
        """Draw u, shape ``(*sample_shape, *u_shape)``; ``temperature`` is a factor of every variance.

        Raises:
            ValueError: If ``temperature`` is negative.
        """
        return self().sample(sample_shape, temperature)

    def calibrate(self, u: Iterable[Tensor], num_steps: int | None = None) -> Self:
        r"""Measure the variance of each reverse step on training data, and keep it for density and sampler.

        .. math:: m_{ij} = \mathbb E (\epsilon_{ij} - \hat\epsilon_{ij})^2

        With it few steps do: it takes up what the mean of a step cannot know. Dropout is off; one pass of
        the denoiser for each u and step. The noise comes from torch's generator.

        Args:
            u: Batches of u, each ``(*batch, *u_shape)``: draws of :math:`r(u \mid x)` for training data,
                never for those of a test. A generator that draws them as it goes will do.
            num_steps: Another number of steps from here on; a saved state fits a prior of as many.

        Returns:
            This module.

        Raises:
            ValueError: If there is no u, one has another shape, ``num_steps`` is not positive, or an error is
                not finite.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps must be positive, got {steps}")
        p = self._distribution("chain", steps)
        flags = {module: module.training for module in self.modules()}
        total, count = torch.zeros((), dtype=torch.float64), 0
        try:
            for module in flags:
                module.training = False
            for batch in u:
                check_event("u", batch, self.u_shape)
                size = batch.numel() // self.z_dim
                if size:
                    errors = p.squared_errors(batch)
                    wide = errors.double() if has_float64(errors.device) else errors.cpu().double()
                    total, count = total.to(wide.device) + size * wide, count + size
        finally:
            for module, training in flags.items():
                module.training = training
        if not count:
            raise ValueError("u must hold at least one draw, got none")
        if not bool(total.isfinite().all()):
            raise ValueError("u must give finite errors of the denoiser, got NaN or infinite ones")
        self.mse = (total / count).to(self.mse)
        self.num_steps, self._calibrated = steps, True
        return self

    def _distribution(self, estimator: DiffusionEstimator, num_steps: int | None = None) -> Diffusion:
        """The distribution, as calibrated; under another number of steps without that."""
        other = num_steps is not None and num_steps != self.num_steps
        return Diffusion(
            self.denoiser,
            (self.gamma_min, self.gamma_max),
            self.u_shape,
            estimator,
            num_steps if num_steps is not None else self.num_steps,
            self.num_times,
            self.prediction,
            None if other or not self._calibrated else self.mse,
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._calibrated = bool((self.mse != 0).any())
