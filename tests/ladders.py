"""Ladders for tests, and a second opinion on them in NumPy that shares no code with the networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pvae.guides import LadderGuide
from pvae.likelihoods import Bernoulli, Likelihood
from pvae.models import Ladder
from pvae.nn import BottomUp, LadderSpec, Pseudoinput, PseudoinputPosterior, TopDown

__all__ = ["ByHand", "GaussianU", "LinearU", "jolted", "ladder", "linear_"]

Array = NDArray[np.float64]


class GaussianU(nn.Module):
    """A normal prior of u, for a density without noise of its own."""

    def __init__(self, u_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full(u_shape, 0.2))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, 0.8).to_event(self.loc.ndim)


class LinearU(Pseudoinput):
    """A fifth of the means of blocks, and back by repetition: linear, and clipped nowhere."""

    def reduce(self, x: Tensor) -> Tensor:
        side = self.x_shape[1] // self.u_shape[1]
        return 0.2 * x.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).mean((-3, -1))

    def restore(self, u: Tensor) -> Tensor:
        side = self.x_shape[1] // self.u_shape[1]
        return u.repeat_interleave(side, -1).repeat_interleave(side, -2)

    def context(self, u: Tensor) -> Tensor:
        return self.restore(u)


def ladder(
    spec: LadderSpec,
    *,
    u: int | None = 1,
    prior: nn.Module | None = None,
    likelihood: Likelihood | None = None,
    aggregate: bool = True,
    postprocess: int = 1,
    stem: str = "full",
    log_variance: float = -3.5,
) -> tuple[Ladder, LadderGuide]:
    """Build a model and its guide, with a pseudoinput of side ``u`` or none."""
    likelihood = likelihood or Bernoulli()
    out_shape = likelihood.param_shape(spec.x_shape)
    top_down = TopDown(spec, out_shape, u is not None, postprocess, aggregate)
    bottom_up = BottomUp(spec, stem=stem)  # type: ignore[arg-type]
    if u is None:
        return Ladder(top_down, likelihood), LadderGuide(bottom_up, top_down)
    pseudoinput = LinearU(spec.x_shape, u)
    model = Ladder(top_down, likelihood, prior or GaussianU(pseudoinput.u_shape), pseudoinput)
    return model, LadderGuide(
        bottom_up, top_down, PseudoinputPosterior(pseudoinput, log_variance, bounds=(-12.0, 3.0))
    )


def jolted(*programs: nn.Module, size: float = 0.3) -> None:
    """Move every parameter away from where it starts, zeros above all."""
    with torch.no_grad():
        for program in programs:
            for parameter in program.parameters():
                parameter.add_(size * torch.randn_like(parameter))


def linear_(model: Ladder, guide: LadderGuide, log_var: float = -0.5) -> None:
    """Make every mean a linear function of what it sees, and every variance constant."""
    width = model.spec.z_width
    with torch.no_grad():
        for program in (model, guide):
            for name, parameter in program.named_parameters():
                if ".net." in name and name.split(".net.")[1].split(".")[0] in ("6", "7"):
                    parameter.zero_()  # the last convolution of a block
        heads = [(head, log_var) for head in model.top_down.priors]
        for part in (*(head.skip for head in model.top_down.priors), *model.top_down.lifts):
            _scaled(part, 0.5)
        # Wider than the exact posteriors and not far from them, so that importance weights are even.
        heads += [(head, 0.0) for head in guide.bottom_up.posteriors]
        for head in guide.bottom_up.posteriors:
            _scaled(head.skip, 0.2)
        for head, value in heads:
            conv: nn.Conv2d = head.skip  # type: ignore[assignment]
            conv.weight[width : 2 * width] = 0
            assert conv.bias is not None
            conv.bias[width : 2 * width] = value


def _scaled(conv: Any, factor: float) -> None:
    conv.weight *= factor


class ByHand:
    """The generative network of a ladder replayed from its saved numbers, one image at a time."""

    def __init__(self, model: Ladder) -> None:
        self.spec = model.spec
        self.numbers = {n: t.detach().double().numpy() for n, t in model.top_down.state_dict().items()}
        self.aggregate = model.top_down.aggregate
        self.postprocess = len(model.top_down.read) - 1

    def walk(
        self, z: Mapping[str, NDArray[Any]], image: NDArray[Any] | None
    ) -> tuple[dict[str, tuple[Array, Array]], Array]:
        """Means and log-variances of all priors, and the likelihood's parameters, given all latents.

        Args:
            z: Latents, each ``(width, side, side)``.
            image: Low-pass image ``(C, H, H)``, or none.
        """
        latents = []  # (name, side, side of the next), from the top
        for number, (side, count) in enumerate(self.spec.scales[::-1]):
            finer = self.spec.scales[::-1][number + 1][0] if number + 1 < len(self.spec.scales) else None
            latents += [(side, finer if i + 1 == count else side) for i in range(count)]
        width, num = self.spec.z_width, len(latents)
        height = self.spec.x_shape[1]
        h = np.ones((self.spec.channels, latents[0][0], latents[0][0]))
        priors = {}
        for layer, (side, after) in enumerate(latents):
            name = f"z_{num - layer}"
            seen = h
            if image is not None:
                pool = height // side
                c = image.reshape(len(image), side, pool, side, pool).mean((2, 4))
                seen = np.concatenate([h, (c - self.spec.centre) / self.spec.spread])
            out = self._block(f"priors.{layer}", seen)
            priors[name] = (out[:width], np.clip(out[width : 2 * width], -10, 1))
            if layer + 1 == num and self.aggregate:
                break
            h = h + out[2 * width :] + self._conv(f"lifts.{layer}", z[name])
            h = self._block(f"blocks.{layer}", h)
            h = _resized(h, height if after is None else after)
        if self.aggregate:
            total = sum(_resized(z[name], height) for name in priors)
            h = self._conv("read_z", total / np.sqrt(num))
        for i in range(self.postprocess):
            h = self._block(f"read.{i}", h)
        return priors, self._conv(f"read.{self.postprocess}", h)

    def _block(self, name: str, x: Array) -> Array:
        h = x
        for i in (0, 2, 4, 6):
            h = _silu(h) if i else h
            h = self._conv(f"{name}.net.{i}", h)
        skip = f"{name}.skip"
        return h + (self._conv(skip, x) if f"{skip}.weight" in self.numbers else x)

    def _conv(self, name: str, x: Array) -> Array:
        weight, bias = self.numbers[f"{name}.weight"], self.numbers[f"{name}.bias"]
        kernel, side = weight.shape[-1], x.shape[-1]
        padded = np.pad(x, ((0, 0), (kernel // 2, kernel // 2), (kernel // 2, kernel // 2)))
        out = np.zeros((len(weight), side, side)) + bias[:, None, None]
        for i in range(kernel):
            for j in range(kernel):
                out += np.einsum("oc,chw->ohw", weight[..., i, j], padded[:, i : i + side, j : j + side])
        return out


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _resized(x: Array, side: int) -> Array:
    """Bilinear interpolation between the centres of pixels, and constant beyond the outer ones."""
    old = x.shape[-1]
    at = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    matrix = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
    return np.asarray(np.einsum("ai,bj,cij->cab", matrix, matrix, x))
