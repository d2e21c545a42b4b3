"""Conditioner of an affine coupling (Dinh et al. 2017, arXiv:1605.08803v3, sec. 3.4)."""

from torch import Tensor, nn

from .activation import activation_layer
from .leading import check_event, check_size
from .mlp import MLP

__all__ = ["CouplingNet"]


class CouplingNet(nn.Module):
    """Shift and log-scale of a coupling as functions of the masked z and of a context.

    The last layer starts at zero, so that the coupling starts as the identity.

    Args:
        z_dim: Size of z.
        context_dim: Size of the context; 0 for none.
        hidden: Width of the two hidden layers.
        activation: One of relu, tanh, silu, elu, gelu, softplus.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is not positive (``context_dim`` may be 0), or ``activation`` is unknown.
    """

    def __init__(self, z_dim: int, context_dim: int = 0, hidden: int = 64, activation: str = "silu") -> None:
        super().__init__()
        self.z_dim = check_size("z_dim", z_dim)
        self.context_dim = context_dim and check_size("context_dim", context_dim)
        check_size("hidden", hidden)
        self.from_z = nn.Linear(self.z_dim, hidden)
        self.from_context = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        self.activate = activation_layer(activation)
        self.mlp = MLP(hidden, 2 * self.z_dim, (hidden,), activation)
        nn.init.zeros_(self.mlp.out.weight)
        nn.init.zeros_(self.mlp.out.bias)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the shift and the unbounded log-scale.

        Args:
            z: Masked latents, shape ``(*batch, z_dim)``.
            context: Shape ``(*batch, context_dim)``; its leading dimensions and those of ``z`` broadcast
                against each other.

        Returns:
            Two tensors of shape ``(*batch, z_dim)``.

        Raises:
            ValueError: If ``z`` or ``context`` has the wrong last dimension, or one of context and
                ``context_dim`` is there without the other.
        """
        check_event("z", z, (self.z_dim,))
        if (context is None) != (self.from_context is None):
            came = None if context is None else tuple(context.shape)
            raise ValueError(f"context must have context_dim = {self.context_dim} entries, got {came}")
        h = self.from_z(z)
        if context is not None and self.from_context is not None:
            check_event("context", context, (self.context_dim,))
            # Two products and a sum, where concatenation would first repeat the context for each particle.
            h = h + self.from_context(context)
        shift, log_scale = self.mlp(self.activate(h)).chunk(2, dim=-1)
        return shift, log_scale
