r"""Stack of masked affine couplings that may see a context (Dinh et al. 2017, arXiv:1605.08803v3,
sec. 3.4-3.5).
"""

from typing import Literal

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform

from pvae.distributions import AffineCoupling
from pvae.nn import CouplingNet

__all__ = ["CouplingFlow"]


class CouplingFlow(ConditionalTransformModule):
    r"""An invertible map made of affine couplings whose masks take turns.

    .. math:: f(z; c) = f_n(\,\cdot\,; c) \circ \dots \circ f_1(z; c)

    It starts as the identity. The literal flow of arXiv:2511.08946 is ``num_flows=1, hidden=16, bound=None,
    masks="halves"`` without a context (the author's code); its shift and scale come from two networks with
    leaky ReLU, here from one with SiLU.

    Pyro's ``ConditionalAffineCoupling`` splits at one place, clamps the log-scale hard and caches. Here z and
    context broadcast both ways, and nothing is cached, so that a used module can be copied, and a tensor
    scored again after an optimiser step.

    Args:
        z_dim: Size of z, at least two: a coupling moves one part of z as the other says.
        num_flows: Number of couplings. With one, half of the coordinates stay as they are.
        context_dim: Size of the context; 0 for none.
        hidden: Width of the two hidden layers of each coupling's network.
        bound: Largest log-scale of a coupling, approached smoothly; ``None`` for no bound.
        masks: What passes unchanged. ``"alternating"``: coordinates of even number, then those of odd number,
            and so on; ``"halves"``: the first ``z_dim // 2`` coordinates, then the others, and so on.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size or ``bound`` is not positive (``context_dim`` may be 0), ``z_dim`` is 1, or
            ``masks`` is another word.
    """

    masks: Tensor

    def __init__(
        self,
        z_dim: int,
        num_flows: int = 4,
        context_dim: int = 0,
        hidden: int = 64,
        bound: float | None = 2.0,
        masks: Literal["alternating", "halves"] = "alternating",
    ) -> None:
        super().__init__()
        if num_flows < 1:
            raise ValueError(f"num_flows must be positive, got {num_flows}")
        if z_dim < 2:
            raise ValueError(f"a coupling needs at least two latent dimensions, got {z_dim}")
        if bound is not None and bound <= 0:
            raise ValueError(f"bound must be positive or None, got {bound}")
        if masks not in ("alternating", "halves"):
            raise ValueError(f"masks must be 'alternating' or 'halves', got {masks!r}")
        self.z_dim, self.context_dim, self.bound = z_dim, context_dim, bound
        self.nets = nn.ModuleList(CouplingNet(z_dim, context_dim, hidden) for _ in range(num_flows))
        coordinate = torch.arange(z_dim)
        first = coordinate % 2 == 0 if masks == "alternating" else coordinate < z_dim // 2
        turns = torch.stack([first if i % 2 == 0 else ~first for i in range(num_flows)])
        self.register_buffer("masks", turns, persistent=False)

    def condition(self, context: Tensor | None) -> ComposeTransform:
        r"""Return :math:`f(\cdot; c)`, one part for each coupling.

        Args:
            context: Shape ``(*batch, context_dim)``, its leading dimensions broadcast against those of z;
                ``None`` if ``context_dim`` is 0.

        Raises:
            ValueError: If the context does not have ``context_dim`` entries.
        """
        came = 0 if context is None else context.shape[-1]
        if came != self.context_dim:
            raise ValueError(f"context must have context_dim = {self.context_dim} entries, got {came}")
        return ComposeTransform(
            [
                AffineCoupling(net, mask, context, self.bound)
                for net, mask in zip(self.nets, self.masks, strict=True)
            ]
        )
