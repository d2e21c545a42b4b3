r"""The amortised pseudoinput r(u | x) (Kuzina & Tomczak 2024, arXiv:2412.01373v1)."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .pseudoinput import Pseudoinput

__all__ = ["PseudoinputPosterior"]


class PseudoinputPosterior(nn.Module):
    r"""A Gaussian around a pseudoinput, with one variance for each coefficient and none for a datum.

    .. math:: r(u \mid x) = \mathcal N(u \mid f(x), \mathrm{diag}\, e^{\rho}), \qquad
              \rho \in [\rho_\min, \rho_\max]

    The paper has one fixed :math:`\sigma^2`; the authors' code learns :math:`\rho` within (-12, -5), from the
    prior's :math:`\gamma_\min` on. The rate of u is paid for whether u is used or not, and too low an upper
    end costs nats: ``share_at_bounds`` tells.

    Args:
        pseudoinput: :math:`f`. Held, not owned: it belongs to the model, whose priors see its ``context``, so
            that it is moved, saved and (where it learns) trained with the model.
        log_variance: :math:`\rho`, or where it starts, for all coefficients.
        learned: Whether :math:`\rho` is a parameter; a buffer if not.
        bounds: Range of :math:`\rho`.

    Attributes:
        rho: The raw :math:`\rho`, shape ``(C, k, k)``; a step of an optimiser may take it a little beyond its
            bounds.

    Raises:
        ValueError: If ``bounds`` are not in order, or ``log_variance`` lies outside.
    """

    rho: Tensor

    def __init__(
        self,
        pseudoinput: Pseudoinput,
        log_variance: float = -6.0,
        learned: bool = True,
        bounds: tuple[float, float] = (-12.0, -3.0),
    ) -> None:
        super().__init__()
        low, high = bounds
        if not low < high:
            raise ValueError(f"bounds must be in order, got {tuple(bounds)}")
        if not low <= log_variance <= high:
            raise ValueError(f"log_variance must lie in bounds {tuple(bounds)}, got {log_variance:g}")
        # Held in a tuple, as the model owns it: registered here too, it would have two names.
        self._pseudoinput = (pseudoinput,)
        self.bounds = (float(low), float(high))
        rho = torch.full(pseudoinput.u_shape, float(log_variance))
        if learned:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    @property
    def pseudoinput(self) -> Pseudoinput:
        """:math:`f`, the model's."""
        return self._pseudoinput[0]

    @property
    def u_shape(self) -> tuple[int, int, int]:
        """Shape of u, ``(C, k, k)``."""
        return self.pseudoinput.u_shape

    @property
    def log_variance(self) -> Tensor:
        r""":math:`\rho` within its bounds, shape ``(C, k, k)``.

        Its gradient passes inside and, beyond an end, where a step against it leads back.
        """
        clamped: Tensor = _Bounded.apply(self.rho, *self.bounds)
        return clamped

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        r"""Return :math:`r(u \mid x)`, with ``batch_shape batch`` and ``event_shape (C, k, k)``.

        Args:
            x: Images, shape ``(*batch, C, H, W)``.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not those of the pseudoinput.
        """
        return dist.Normal(self.pseudoinput(x), torch.exp(0.5 * self.log_variance)).to_event(3)

    def share_at_bounds(self) -> Tensor:
        r"""Share of the coefficients whose :math:`\rho` is at an end of its range, shape ``()``."""
        low, high = self.bounds
        return ((self.rho <= low) | (self.rho >= high)).to(self.rho.dtype).mean()


class _Bounded(torch.autograd.Function):
    """Clamp, with the gradient of a projected descent.

    The gradient of a plain clamp is zero beyond an end: a variance that one step took there would stay for
    ever. With the identity's in its place it would be driven ever further.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rho: Tensor, low: float, high: float) -> Tensor:
        return rho.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        rho, low, high = inputs
        ctx.save_for_backward(rho)
        ctx.low, ctx.high = low, high

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (rho,) = ctx.saved_tensors
        # At an end itself too, a step outwards is refused.
        stays = ((rho > ctx.low) | (gradient < 0)) & ((rho < ctx.high) | (gradient > 0))
        return gradient * stays, None, None
