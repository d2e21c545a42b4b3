"""Normal likelihood with one variance, or one for each channel: fixed, learned, or fitted to each batch
(Rybkin, Daniilidis & Levine 2021, arXiv:2006.13202).
"""

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.ops import batch_mean

from .base import Likelihood

__all__ = ["Normal"]

# Decay, per training step, of the moving average that stands in for sigma until it is measured.
_DECAY = 0.99


class Normal(Likelihood):
    r"""Independent normals around the decoder's output, which is the mean of x.

    .. math:: p(x \mid z) = \prod_i \mathcal N(x_i \mid \hat x_i, \sigma^2)

    With ``sigma="batch"`` each training batch is scored at the :math:`\sigma` that it likes best,

    .. math:: \sigma_*^2 = \frac1n \sum_{i=1}^n (x_i - \hat x_i)^2

    over its n entries (particles, data, channels and pixels), which needs no learning rate. The gradient with
    respect to :math:`\sigma` vanishes there, so it is held constant. Held-out data refitted that way
    would score too well, by :math:`\frac12 (\rho - 1 - \log \rho)` nats an entry for a ratio :math:`\rho` of
    their mean squared error to that of the training data: outside training no batch is looked at. Training
    is what the modules say, ``training`` true and ``x`` given, whatever the data: a score taken in that mode
    is fitted to them.

    :func:`pvae.fit` measures :math:`\sigma` on the training data when it is done, and
    :func:`pvae.inference.measure_sigma` does on request; any further training step discards the measured
    value. Until then a moving average of the training batches' squared errors stands in, good for validation
    and refused by :func:`pvae.log_likelihood`.

    Every particle has the same weight in :math:`\sigma_*`, in an importance-weighted objective too.

    Args:
        sigma: ``"fixed"``: :math:`\sigma` is ``value``. ``"learned"``: it is a parameter,
            :math:`\sigma = \mathrm{floor} + e^{\rho}`, that starts at ``value``. ``"batch"``: it is
            :math:`\sigma_*` of each training batch. ``"frozen"``: it is ``value`` until :meth:`freeze` puts
            another in its place.
        value: :math:`\sigma`, or where it starts, in the units of x.
        channels: Where given, each channel of x ``(channels, ...)`` has a :math:`\sigma` of its own.
        floor: Infimum of a learned or fitted :math:`\sigma`: data with a constant background have unbounded
            density.
        clamp: How :math:`\sigma_*` is kept above the floor. ``"hard"``: the larger of the two. ``"soft"``:
            the sum of the two, not quite the optimum anywhere; it is the authors'
            :math:`\log \sigma = l + \mathrm{softplus}(\log \sigma_* - l)`, :math:`l = \log \mathrm{floor}`,
            written out.

    Attributes:
        mode: The argument ``sigma``.
        profiled: Whether ``sigma`` is ``"batch"``.

    Raises:
        ValueError: If ``sigma`` or ``clamp`` is another word, ``value`` is not positive or not above the
            floor, ``floor`` is negative (with ``"batch"``: not positive), ``clamp`` is soft without
            ``"batch"``, or ``channels`` is not positive or is given for a fixed sigma.
    """

    values = frozenset({"unit", "count", "real"})

    measured_sigma: Tensor
    average_mse: Tensor
    average_weight: Tensor

    def __init__(
        self,
        sigma: Literal["fixed", "learned", "batch", "frozen"] = "fixed",
        value: float = 1.0,
        channels: int | None = None,
        floor: float = 1e-3,
        clamp: Literal["hard", "soft"] = "hard",
    ) -> None:
        super().__init__()
        if sigma not in ("fixed", "learned", "batch", "frozen"):
            raise ValueError(f"sigma must be 'fixed', 'learned', 'batch' or 'frozen', got {sigma!r}")
        if clamp not in ("hard", "soft") or (clamp == "soft" and sigma != "batch"):
            raise ValueError(f"clamp must be 'hard', or 'soft' for sigma = 'batch', got {clamp!r}")
        if channels is not None and (sigma == "fixed" or channels < 1):
            raise ValueError(f"channels must be positive, and None for a fixed sigma, got {channels}")
        least = floor if sigma in ("learned", "batch") else 0.0
        if floor < 0 or not value > least:
            raise ValueError(
                f"value must be above {least:g} and floor at least 0, got {value:g} and {floor:g}"
            )
        if sigma == "batch" and not floor > 0:
            raise ValueError(f"floor must be positive for sigma = 'batch', got {floor:g}")
        self.mode = sigma
        self.profiled = sigma == "batch"
        self.channels = channels
        self.floor = floor
        self.clamp = clamp
        self.value = float(value)
        size = () if channels is None else (channels,)
        if sigma == "learned":
            self.log_sigma = nn.Parameter(torch.full(size, math.log(value - floor)))
        elif sigma == "fixed":
            self.register_buffer("fixed_sigma", torch.tensor(self.value))
        else:
            # No sigma is zero: there it says that none was measured.
            self.register_buffer("measured_sigma", torch.full(size, 0.0 if self.profiled else self.value))
        if self.profiled:
            self.register_buffer("average_mse", torch.zeros(size))
            self.register_buffer("average_weight", torch.zeros(()))

    @property
    def sigma(self) -> Tensor:
        r""":math:`\sigma` of an evaluation in the units of x, shape ``()`` or ``(channels,)``.

        With ``sigma="batch"``: the measured one; before that the one of the moving average over training;
        before that ``value``.
        """
        if self.mode == "learned":
            return self.floor + self.log_sigma.exp()
        if self.mode == "fixed":
            return self.get_buffer("fixed_sigma")
        if self.mode == "frozen":
            return self.measured_sigma
        # The weights of the average so far add up to less than 1. Chosen on the device: no waiting.
        average = self.optimum(self.average_mse / self.average_weight)
        running = torch.where(self.average_weight > 0, average, self.value)
        return torch.where(self.measured_sigma > 0, self.measured_sigma, running)

    @torch.no_grad()
    def freeze(self, sigma: Tensor | float) -> None:
        r"""Store a measured :math:`\sigma`, which every evaluation then uses. Synchronises with the host.

        Args:
            sigma: In the units of x, shape ``()`` or ``(channels,)``.

        Raises:
            ValueError: If this sigma is fixed or learned, or the given one has another shape, or is not
                positive and finite.
        """
        if self.mode not in ("batch", "frozen"):
            raise ValueError(f"freeze needs sigma = 'batch' or 'frozen', got {self.mode!r}")
        stored = self.measured_sigma
        # In the precision in which it is stored, where a small number may be none.
        new = torch.as_tensor(sigma, dtype=stored.dtype, device=stored.device)
        if new.shape not in (torch.Size(()), stored.shape):
            raise ValueError(f"sigma must have shape {tuple(stored.shape)}, got {tuple(new.shape)}")
        if not bool((new.isfinite() & (new > 0)).all()):
            raise ValueError(f"sigma must be positive and finite, got {new.tolist()}")
        stored.copy_(new.expand_as(stored))

    def check_held_out(self) -> None:
        """Refuse to score held-out data before sigma is measured. Synchronises with the host.

        Raises:
            ValueError: If sigma is fitted to each batch and was not measured since.
        """
        if self.profiled and not bool((self.measured_sigma > 0).all()):
            raise ValueError(
                "sigma = 'batch' is fitted to each training batch and must be measured before held-out data "
                "are scored: train with pvae.fit, or call pvae.inference.measure_sigma on the training data"
            )

    def mean_squared_error(self, params: Tensor, x: Tensor) -> Tensor:
        """Mean of the squared residuals over all entries, or over all of each channel.

        Args:
            params: Means, shape ``(*batch, *x_shape)``.
            x: Data, in a shape that broadcasts against that of ``params``.

        Returns:
            In the squared units of x, shape ``()`` or ``(channels,)``.

        Raises:
            ValueError: If sigma is per channel and x has another number of channels.
        """
        squares = (x - params).square()
        if self.channels is None:
            return squares.mean()
        event_dim = self._event_dim(params)
        self.param_shape(params.shape[params.ndim - event_dim :])
        return squares.mean([dim for dim in range(-squares.ndim, 0) if dim != -event_dim])

    def optimum(self, mse: Tensor) -> Tensor:
        r"""The :math:`\sigma` that residuals of this mean square like best, kept above the floor.

        Args:
            mse: In the squared units of x, any shape.

        Returns:
            In the units of x, shape of ``mse``.
        """
        if self.clamp == "hard":
            return mse.sqrt().clamp(min=self.floor)
        # exp(l + log(1 + exp(log sigma - l))) = exp(l) + sigma
        return mse.sqrt() + self.floor

    def param_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of x.

        Raises:
            ValueError: If sigma is per channel and x has another number of channels.
        """
        if self.channels not in (None, x_shape[0]):
            raise ValueError(f"x_shape must begin with channels = {self.channels}, got {tuple(x_shape)}")
        return tuple(x_shape)

    def forward(self, params: Tensor, x: Tensor | None = None) -> dist.TorchDistribution:
        r"""Return p(x | z) for means ``params``, shape ``(*batch, *x_shape)``.

        Args:
            params: Means.
            x: With ``sigma="batch"`` in training mode, the data that :math:`\sigma_*` is fitted to, in a
                shape that broadcasts against that of ``params``; where gradients are taken, the moving
                average sees them too. Not used otherwise.
        """
        event_dim = self._event_dim(params)
        fits = self.profiled and self.training
        sigma = self._fitted(params, x) if fits and x is not None else self.sigma
        if self.channels is not None:
            self.param_shape(params.shape[params.ndim - event_dim :])
            sigma = sigma.reshape(self.channels, *(1,) * (event_dim - 1))
        return dist.Normal(params, sigma).to_event(event_dim)

    def _fitted(self, params: Tensor, x: Tensor) -> Tensor:
        r""":math:`\sigma_*` of a batch, without gradient."""
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            mse = batch_mean(self.mean_squared_error(params, x))
            if learning:
                # In place, so that a traced graph does it to the module's own tensors.
                self.average_mse.mul_(_DECAY).add_(mse, alpha=1 - _DECAY)
                self.average_weight.mul_(_DECAY).add_(1 - _DECAY)
                self.measured_sigma.zero_()
            return self.optimum(mse)

    def _supports(self, x: Tensor) -> Tensor:
        return x.isfinite()

    def _refusal(self, value: float) -> str:
        return f"Normal needs finite x, got {value}"
