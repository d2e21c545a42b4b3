r"""Guide of a ladder of latents, from the top down (Kuzina & Tomczak 2024, arXiv:2412.01373v1)."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.nn import BottomUp, PseudoinputPosterior, TopDown

__all__ = ["LadderGuide"]


class LadderGuide(nn.Module):
    r"""Posteriors in the order of the model, each given the latents above it.

    .. math:: q(u, z \mid x) = r(u \mid x) \prod_{l=L}^{1} q(z_l \mid z_{>l}, u, x)

    Each posterior of z sees features of x and the state of the model's way down, so that the latents above
    and u reach it through the model's own network; the topmost does not depend on u. That network is held,
    not owned: the parameters of this guide are those of ``bottom_up`` and ``posterior_u``.

    Given the parents, every KL of z is one of two diagonal Gaussians, and no parent of a site in the model
    descends from it in the guide: the objective ``"mean_field"`` takes them in closed form, and r(u | x)
    against p(u) at the draw.

    Args:
        bottom_up: Inference network.
        top_down: The model's ``top_down``.
        posterior_u: r(u | x), around the model's pseudoinput; ``None`` for a ladder without u.

    Attributes:
        shares_parameters: True: the density depends on the model's parameters. The objective "dreg", which
            holds the parameters of the guide constant, refuses such a guide.

    Raises:
        ValueError: If the two networks are of different ladders, or the model's priors see a low-pass image
            and there is no ``posterior_u``, or the reverse.
    """

    shares_parameters = True

    def __init__(
        self, bottom_up: BottomUp, top_down: TopDown, posterior_u: PseudoinputPosterior | None = None
    ) -> None:
        super().__init__()
        if bottom_up.spec != top_down.spec:
            raise ValueError(
                f"bottom_up and top_down must be of one ladder, got {bottom_up.spec} and {top_down.spec}"
            )
        if (posterior_u is None) != (top_down.context_channels == 0):
            raise ValueError(
                "posterior_u must be given where the model's priors see a low-pass image, got none"
                if posterior_u is None
                else "posterior_u must be None where the model's priors see no low-pass image, got one"
            )
        self.bottom_up = bottom_up
        self.posterior_u = posterior_u
        # Held in a tuple, as the model owns it: registered here too, its parameters would have two names.
        self._model = (top_down,)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw ``u`` and ``z_L`` to ``z_1`` for ``x`` ``(B, *x_shape)``; return ``z_1``, shape ``(*particles,
        B, z_channels, side, side)``.
        """
        ladder = self._model[0]
        names = ladder.spec.names
        with pyro.plate("data", len(x), dim=-1):
            u, image = None, None
            if self.posterior_u is not None:
                u = pyro.sample("u", self.posterior_u(x))
                image = self.posterior_u.pseudoinput.context(u)
            descent, features = ladder.descent(image), self.bottom_up(x)
            for layer, name in enumerate(names):
                loc, scale = self.bottom_up.heads(layer, descent.h, features)
                z: Tensor = pyro.sample(name, dist.Normal(loc, scale).to_event(3))
                if layer + 1 < len(names):
                    descent.go_on(z)
            # The model, replayed on these draws, goes the same way: half of a training step.
            ladder.keep(descent, u)
            return z
