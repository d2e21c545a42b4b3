r"""Flows of the zuko library: neural splines (Durkan et al. 2019, arXiv:1906.04032v2) and others."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor
from torch.distributions import Distribution, Transform, constraints
from torch.distributions import transforms as torch_transforms

__all__ = ["ZukoFlow"]

# Maps of the whole of R^d onto itself. The image of NAF, UNAF, SOSPF and GF is a box, NCSF lives on a torus,
# and CNF is as exact as its solver.
_FLOWS = ("BPF", "MAF", "NICE", "NSF")


class ZukoFlow(ConditionalTransformModule):
    r"""A flow of zuko's in the place of a :class:`CouplingFlow`.

    Unlike that one it does not start as the identity.

    ``MAF``, ``NSF`` and ``BPF`` are autoregressive: each layer is undone, to draw z, in ``z_dim`` passes, or
    in two with the option ``passes=2``, which makes couplings of them; ``BPF`` by bisection, to 1e-6.
    ``NSF`` bends the cube from -5 to 5 only. ``NICE``, as zuko calls affine couplings, reads its masks on the
    host at each use, which stalls a GPU.

    Args:
        z_dim: Size of z, at least two.
        context_dim: Size of the context; 0 for none.
        name: One of BPF, MAF, NICE, NSF: zuko's flows that map all of :math:`\mathbb R^d` onto
            itself, without which the density would not integrate to one.
        transforms: Number of layers.
        hidden: Widths of the hidden layers of each layer's network.
        options: More of zuko's arguments for this flow, such as ``bins``, ``passes`` or ``randperm``.

    Raises:
        ImportError: If zuko is not installed.
        ValueError: If ``name`` is another word, or a size is too small.
    """

    def __init__(
        self,
        z_dim: int,
        context_dim: int = 0,
        name: str = "NSF",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        **options: Any,
    ) -> None:
        super().__init__()
        if name not in _FLOWS:
            raise ValueError(f"name must be one of {', '.join(_FLOWS)}, got {name!r}")
        if z_dim < 2 or context_dim < 0 or transforms < 1:
            raise ValueError(
                "z_dim must be at least 2, context_dim 0 and transforms 1, "
                f"got {z_dim}, {context_dim} and {transforms}"
            )
        self.z_dim, self.context_dim = z_dim, context_dim
        flow = getattr(_zuko().flows, name)(
            z_dim, context_dim, transforms=transforms, hidden_features=tuple(hidden), **options
        )
        # Its base distribution is not needed: the prior brings one.
        self.transform = flow.transform

    def condition(self, context: Tensor | None) -> Transform:
        """Return the transform from z to u.

        Args:
            context: Shape ``(*batch, context_dim)``, its leading dimensions broadcast against those of z;
                ``None`` if ``context_dim`` is 0.

        Raises:
            ValueError: If the context does not have ``context_dim`` entries.
        """
        came = 0 if context is None else context.shape[-1]
        if came != self.context_dim:
            raise ValueError(f"context must have context_dim = {self.context_dim} entries, got {came}")
        batch = torch.Size() if context is None else context.shape[:-1]
        return _Broadcasting(self.transform(context), batch)


class _Broadcasting(Transform):
    """A transform of zuko's for z of any batch shape that goes with the context's."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, transform: Any, batch_shape: torch.Size) -> None:
        super().__init__(cache_size=0)
        self.transform, self.batch_shape = transform, batch_shape

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and log-determinant in one pass, shapes ``(*batch, z_dim)`` and ``(*batch)``."""
        return self.transform.call_and_ladj(self._wide(x))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log absolute Jacobian determinant at ``x``, shape ``(*batch)``."""
        return self.call_and_ladj(x)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output: that of z, broadcast against the context's leading dimensions."""
        return torch.Size((*torch.broadcast_shapes(shape[:-1], self.batch_shape), shape[-1]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the input that goes with an output of ``shape``; see :meth:`forward_shape`."""
        return self.forward_shape(shape)

    def _call(self, x: Tensor) -> Tensor:
        return self.transform(self._wide(x))

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.inv(self._wide(y))

    def _wide(self, z: Tensor) -> Tensor:
        return z.expand(self.forward_shape(z.shape))


def _zuko() -> ModuleType:
    """Import zuko, and undo what its import does to torch for everybody.

    It switches off the validation of all distributions, and gives torch's inverse transform another name. (It
    also gives every transform a ``call_and_ladj``, and distributions empty argument constraints to fall back
    on, which its own classes need.)

    Raises:
        ImportError: If it is not installed.
    """
    validate, inverse = Distribution._validate_args, torch_transforms._InverseTransform
    name = inverse.__name__
    try:
        import zuko
    except ModuleNotFoundError as missing:
        raise ImportError("ZukoFlow needs zuko: pip install 'pyro-pvae[flows]'") from missing
    finally:
        Distribution.set_default_validate_args(validate)
        inverse.__name__ = name
    return zuko
