r"""Masked affine coupling (Dinh et al. 2017, arXiv:1605.08803v3, sec. 3.4, eq. 9)."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["AffineCoupling"]


class AffineCoupling(Transform):
    r"""Invertible map that rescales the coordinates outside a mask by functions of those inside.

    .. math:: f(z) = b \odot z + (1 - b) \odot \bigl( z \odot e^{s(b \odot z, c)} + t(b \odot z, c) \bigr)

    The log-scale is bounded smoothly, :math:`s = s_{max} \tanh(r / s_{max})` for the network's output
    :math:`r`: unbounded, its exponent overflows in the very direction that a KL rewards.

    Nothing is cached. (A cache keyed by the identity of ``z`` returns the old value when the same tensor is
    scored again after an optimiser step.) The transform is made anew for each context, holds no
    parameters, and its network belongs to the module that made it.

    A batch shape hidden in the context is announced through :meth:`forward_shape`, so that
    ``TransformedDistribution`` has it too.

    Args:
        net: Called as ``net(z_masked, context)``, returns shift and log-scale, each ``(*batch, z_dim)``;
            see :class:`pvae.nn.CouplingNet`. Entries inside the mask are ignored.
        mask: Boolean, shape ``(z_dim,)``: true where z passes unchanged.
        context: Shape ``(*batch, context_dim)``, its leading dimensions broadcast against those of z; or
            ``None``.
        bound: :math:`s_{max}`; ``None`` leaves the log-scale unbounded.

    Raises:
        TypeError: If ``mask`` is not boolean.
        ValueError: If ``mask`` is no vector, or ``bound`` is not positive.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        net: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        mask: Tensor,
        context: Tensor | None = None,
        bound: float | None = 2.0,
    ) -> None:
        super().__init__(cache_size=0)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        if mask.ndim != 1:
            raise ValueError(f"mask must have shape (z_dim,), got {tuple(mask.shape)}")
        if bound is not None and bound <= 0:
            raise ValueError(f"bound must be positive or None, got {bound}")
        self.net, self.mask, self.context, self.bound = net, mask, context, bound

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` and return the log absolute Jacobian determinant with it, for one call of the network.

        Args:
            x: Shape ``(*batch, z_dim)``.

        Returns:
            The image, shape ``(*batch, z_dim)``, and the log-determinant in nats, shape ``(*batch)``.
        """
        shift, log_scale = self._conditioner(x)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale.sum(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log absolute Jacobian determinant of the map at ``x``, shape ``(*batch)``; ``y`` is not needed."""
        return self._conditioner(x)[1].sum(-1)

    def with_cache(self, cache_size: int = 1) -> Self:
        """Return this very transform: it never caches."""
        return self

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output: that of z, broadcast against the context's leading dimensions."""
        if not shape or shape[-1] != len(self.mask):
            raise ValueError(f"z must have event_shape ({len(self.mask)},), got shape {tuple(shape)}")
        batch = () if self.context is None else self.context.shape[:-1]
        return torch.Size((*torch.broadcast_shapes(shape[:-1], batch), shape[-1]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the input that goes with an output of ``shape``; see :meth:`forward_shape`."""
        return self.forward_shape(shape)

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        # The masked coordinates are the same on both sides, hence so are shift and scale.
        shift, log_scale = self._conditioner(y)
        return (y - shift) * torch.exp(-log_scale)

    def _conditioner(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(z.masked_fill(~self.mask, 0.0), self.context)
        if self.bound is not None:
            log_scale = self.bound * torch.tanh(log_scale / self.bound)
        # Zeros inside the mask, where z * exp(0) + 0 is z to the bit: the network's outputs there count for
        # nothing, and cannot overflow on their way to nowhere.
        return shift.masked_fill(self.mask, 0.0), log_scale.masked_fill(self.mask, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The context may be the output of an encoder, and torch refuses to copy what is inside a graph.
        # It is a value that nobody changes, so the copy shares it.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__getstate__().items():
            new.__dict__[name] = value if name == "context" else copy.deepcopy(value, memo)
        return new
