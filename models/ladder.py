r"""Ladder of latents, plain or under a prior of pseudoinputs (Kuzina & Tomczak 2024, arXiv:2412.01373v1)."""

import inspect
import math
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.likelihoods import Likelihood
from pvae.nn import Descent, LadderSpec, Pseudoinput, TopDown

__all__ = ["Ladder"]

Draw = Callable[[str, dist.TorchDistribution], Tensor]


class Ladder(nn.Module):
    r"""Latents :math:`z_L, \ldots, z_1` on ever finer planes, the topmost under a pseudoinput u or alone.

    .. math:: p(x, z, u) = p(u) \, \prod_{l=L}^{1} p(z_l \mid z_{>l}, u) \; p(x \mid z_{1:L})

    u is a low-pass picture of x; :math:`p(u) \int p(z \mid u)` is the continuous form of a VampPrior, whose
    p(u) is a number of points. Priors see u as an image; p(x | z) sees the latents alone. Without a prior of
    u this is the plain ladder, :math:`\prod_l p(z_l \mid z_{>l}) \, p(x \mid z)`.

    Args:
        top_down: Network of all conditional priors and of p(x | z).
        likelihood: Maps the network's output to a distribution with ``event_shape x_shape``.
        prior: Called without arguments, returns p(u) with ``event_shape pseudoinput.u_shape``, such as
            :class:`pvae.priors.DiffusionPrior`; ``None`` for the plain ladder.
        pseudoinput: What u is, and its way back to a low-pass image.

    Raises:
        ValueError: If one of ``prior`` and ``pseudoinput`` is given without the other, or the network's
            priors see a low-pass image and there is none, or the reverse, or pseudoinputs are those of
            other images.

    Example:
        >>> from pvae.likelihoods import Bernoulli
        >>> spec = LadderSpec((1, 8, 8), scales=((4, 1), (2, 1)), channels=8)
        >>> model = Ladder(TopDown(spec, (1, 8, 8), context=False), Bernoulli())
        >>> model.sample(5).shape
        torch.Size([5, 1, 8, 8])
    """

    conditional = False

    def __init__(
        self,
        top_down: TopDown,
        likelihood: nn.Module,
        prior: nn.Module | None = None,
        pseudoinput: Pseudoinput | None = None,
    ) -> None:
        super().__init__()
        if (prior is None) != (pseudoinput is None):
            given, missing = ("pseudoinput", "prior") if prior is None else ("prior", "pseudoinput")
            raise ValueError(f"prior and pseudoinput must come together, got a {given} and no {missing}")
        if (prior is None) != (top_down.context_channels == 0):
            raise ValueError(
                "top_down must be built with context=False where there is no prior of u, got True"
                if prior is None
                else "top_down must be built with context=True where there is a prior of u, got False"
            )
        if pseudoinput is not None and pseudoinput.x_shape != top_down.spec.x_shape:
            raise ValueError(
                f"pseudoinput must be that of images of shape {top_down.spec.x_shape}, "
                f"got {pseudoinput.x_shape}"
            )
        if isinstance(likelihood, Likelihood):
            likelihood.event_dim = len(top_down.out_shape)
        self.prior = prior
        self.pseudoinput = pseudoinput
        self.top_down = top_down
        self.likelihood = likelihood

    @property
    def spec(self) -> LadderSpec:
        """Shapes of the ladder."""
        return self.top_down.spec

    @property
    def z_dim(self) -> int:
        """Number of latent numbers of a datum, without those of u."""
        return self.spec.z_dim

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the generative program on ``x``, shape ``(B, *x_shape)``; ``y`` is passed over."""
        with pyro.plate("data", len(x), dim=-1):
            u = None if self.prior is None else pyro.sample("u", self.prior())
            kept = self.top_down.kept(u)
            params = self._descend(_from_pyro, self._descent(u) if kept is None else kept.again())
            return pyro.sample("x", self.observation(params, x), obs=x)

    def observation(self, params: Tensor, x: Tensor) -> dist.TorchDistribution:
        """Return :math:`p(x | z)` from the network's output; a profiled likelihood trains with ``x`` too."""
        if getattr(self.likelihood, "profiled", False):
            return self.likelihood(params, x)
        return self.likelihood(params)

    def decode(self, latents: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return :math:`p(x | z)`.

        Args:
            latents: Every latent by its name, ``"z_L"`` to ``"z_1"``, each ``(*batch, z_channels, side,
                side)``; also ``"u"``, ``(*batch, *u_shape)``, where the network does not aggregate and there
                is one.

        Raises:
            ValueError: If a latent is missing.
        """
        needed = [
            *self.spec.names,
            *(["u"] if self.prior is not None and not self.top_down.aggregate else []),
        ]
        missing = [name for name in needed if name not in latents]
        if missing:
            raise ValueError(f"latents must hold {', '.join(needed)}, {missing[0]!r} is missing")
        if self.top_down.aggregate:
            z = [latents[name] for name in self.spec.names]
            return self.likelihood(self.top_down.read_out(z, self.top_down.start()))
        params = self._descend(lambda name, _: latents[name], self._descent(latents.get("u")))
        return self.likelihood(params)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, mean: bool = False, temperature: float = 1.0) -> Tensor:
        """Draw from the model, or from one with narrower or wider priors.

        Args:
            n: Number of draws, positive.
            y: Not used; the model is unconditional.
            mean: Return the mean of :math:`p(x | z)` instead of a draw from it.
            temperature: Factor on the variances of all priors, at least 0; 1 is the model. Another one needs
                a prior of u that has it too, as :class:`pvae.distributions.Diffusion` does.

        Returns:
            Shape ``(n, *x_shape)``, in the units of ``x``.

        Raises:
            ValueError: If ``n`` is not positive, ``temperature`` is negative, or it is not 1 and the prior of
                u has none.
        """
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        _check_temperature(temperature)
        u = None if self.prior is None else self._draw_u(n, temperature)
        return self._sample((n,), u, mean, temperature)

    @torch.no_grad()
    def sample_given(self, u: Tensor, n_each: int, mean: bool = False, temperature: float = 1.0) -> Tensor:
        """Draw images that share a pseudoinput: a low-pass picture in, many images out.

        Args:
            u: Pseudoinputs, shape ``(M, *u_shape)``, such as ``model.pseudoinput(x)``.
            n_each: Number of draws of each, positive.
            mean: Return the mean of :math:`p(x | z)` instead of a draw from it.
            temperature: Factor on the variances of the priors of z, at least 0; 1 is the model.

        Returns:
            Shape ``(M, n_each, *x_shape)``, in the units of ``x``.

        Raises:
            ValueError: If the model has no pseudoinput, ``u`` has another shape, ``n_each`` is not positive,
                or ``temperature`` is negative.
        """
        if self.pseudoinput is None:
            raise ValueError("this ladder has no pseudoinput to be given")
        shape = self.pseudoinput.u_shape
        if u.ndim != 4 or tuple(u.shape[1:]) != shape:
            wanted = ", ".join(map(str, ("M", *shape)))
            raise ValueError(f"u must have shape ({wanted}), got {tuple(u.shape)}")
        if n_each < 1:
            raise ValueError(f"n_each must be positive, got {n_each}")
        _check_temperature(temperature)
        batch = (len(u), n_each)
        return self._sample(batch, u.unsqueeze(1).expand(*batch, *shape), mean, temperature)

    def _descent(self, u: Tensor | None, batch: tuple[int, ...] = ()) -> Descent:
        image = None if u is None or self.pseudoinput is None else self.pseudoinput.context(u)
        return self.top_down.descent(image, batch)

    def _descend(self, draw: Draw, descent: Descent) -> Tensor:
        """Go down, each latent as ``draw`` has it from its prior; return the likelihood's parameters."""
        z = []
        for name in self.spec.names:
            loc, scale = descent.prior()
            z.append(draw(name, dist.Normal(loc, scale).to_event(3)))
            descent.go_on(z[-1])
        return self.top_down.read_out(z, descent.h)

    def _sample(self, batch: tuple[int, ...], u: Tensor | None, mean: bool, temperature: float) -> Tensor:
        def draw(name: str, prior: dist.TorchDistribution) -> Tensor:
            loc, scale = prior.base_dist.loc, prior.base_dist.scale
            return loc + math.sqrt(temperature) * scale * torch.randn_like(loc)

        params = self._descend(draw, self._descent(u, batch))
        x = self.likelihood(params)
        return x.mean if mean else x.sample()

    def _draw_u(self, n: int, temperature: float) -> Tensor:
        assert self.prior is not None
        p = self.prior()
        if temperature == 1:
            return p.sample((n,))
        if "temperature" not in inspect.signature(p.sample).parameters:
            raise ValueError(
                f"temperature must be 1 under a prior of u that has none, {type(p).__name__}, got "
                f"{temperature:g}"
            )
        return p.sample((n,), temperature=temperature)


def _from_pyro(name: str, prior: dist.TorchDistribution) -> Tensor:
    return pyro.sample(name, prior)


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature}")
