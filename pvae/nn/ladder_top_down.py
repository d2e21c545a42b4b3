r"""Generative network of a ladder of latents (Kuzina & Tomczak 2024, arXiv:2412.01373v1, and its code)."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ladder_block import LadderBlock, over_images, pointwise, scales_of
from .ladder_spec import LadderSpec
from .leading import check_event, check_sizes

__all__ = ["Descent", "TopDown"]


class TopDown(nn.Module):
    r"""The way down a ladder: a state of features, from which each latent's prior is read in turn.

    For each latent from the top, with c the low-pass image of u, pooled to the latent's plane:

    .. math:: (\mu, \log \sigma^2, d) = P_l([h, c]), \qquad z_l \sim \mathcal N(\mu, \sigma^2), \qquad
              h \leftarrow \mathrm{block}_l(h + d + W_l z_l)

    and bilinear upsampling where a scale ends. The state starts as ones. With aggregation, p(x | z) sees the
    latents alone,

    .. math:: a = \frac{1}{\sqrt L} \sum_l \mathrm{up}(z_l),

    so that every one of them reaches x; without, it sees the state below :math:`z_1`. At the start, priors
    are linear functions of their inputs, and the last convolution of each block and :math:`W_l` are scaled by
    :math:`1 / \sqrt L`, which keeps the state's size whatever the depth.

    What the authors' code holds and never uses is left out: with aggregation, d, W and block of :math:`z_1`.

    Args:
        spec: Shapes of the ladder.
        out_shape: Shape ``(C_out, H, H)`` of what the likelihood needs, ``likelihood.param_shape(x_shape)``.
        context: Whether priors see the low-pass image of a pseudoinput.
        postprocess: Residual blocks between the latents (or the state) and x. With none, and aggregation,
            p(x | z) has parameters that are linear in z (the paper's configurations).
        aggregate: Whether p(x | z) sees the latents alone.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If ``postprocess`` is negative, or ``out_shape`` is not that of an image as large as x.
    """

    def __init__(
        self,
        spec: LadderSpec,
        out_shape: Sequence[int],
        context: bool = True,
        postprocess: int = 1,
        aggregate: bool = True,
    ) -> None:
        super().__init__()
        self.out_shape = check_sizes("out_shape", out_shape, length=3)
        if self.out_shape[1:] != spec.x_shape[1:]:
            raise ValueError(
                f"out_shape must have the height and width of x, {spec.x_shape[1:]}, got {self.out_shape}"
            )
        if postprocess < 0:
            raise ValueError(f"postprocess must not be negative, got {postprocess}")
        self.spec, self.aggregate = spec, aggregate
        self.context_channels = spec.x_shape[0] if context else 0
        channels, hidden, width = spec.channels, spec.hidden, spec.z_width
        gain = math.sqrt(1.0 / spec.num_latents)
        # Layers whose state is read further down.
        self._passed_on = spec.num_latents - (1 if aggregate else 0)
        self.priors = nn.ModuleList(
            LadderBlock(
                channels + self.context_channels,
                hidden,
                2 * width + (channels if layer < self._passed_on else 0),
                gain=0.0,
            )
            for layer in range(spec.num_latents)
        )
        self.lifts = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in range(self._passed_on))
        self.blocks = nn.ModuleList(
            LadderBlock(channels, hidden, channels, gain=gain) for _ in range(self._passed_on)
        )
        with torch.no_grad():
            for lift in self.lifts:
                assert isinstance(lift, nn.Conv2d)
                lift.weight *= gain
        self.read_z = nn.Conv2d(width, channels, 1) if aggregate else None
        self._kept: tuple[Descent, Tensor | None, tuple[int, int]] | None = None
        self.read = nn.Sequential(
            *(LadderBlock(channels, hidden, channels, gain=0.0) for _ in range(postprocess)),
            nn.Conv2d(channels, self.out_shape[0], 3, padding=1),
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not a way down, whose tensors have gradients."""
        return {**self.__dict__, "_kept": None}

    def descent(self, image: Tensor | None, batch: tuple[int, ...] = ()) -> "Descent":
        """Begin a way down.

        Args:
            image: Low-pass images, shape ``(*batch, C, H, H)``, or none; errors as in :meth:`contexts`.
            batch: Shape of independent latents at the top; of one latent that broadcasts by default.
        """
        start = self.start()
        return Descent(self, self.contexts(image), start.expand(*batch, *start.shape))

    def keep(self, descent: "Descent", u: Tensor | None) -> None:
        """Keep a way down, made under ``u``, for the one who goes the same way next.

        A guide of this ladder walks where the model, replayed on its draws, will walk again. Only where there
        are gradients, so in training: elsewhere parameters might change in between. Of such a change one
        parameter stands for all: an optimiser's step and an exchange of parameters for a call touch each.
        """
        self._kept = (descent, u, self._mark()) if torch.is_grad_enabled() else None

    def kept(self, u: Tensor | None) -> "Descent | None":
        """Hand out the way down that was kept, once, if it was made under ``u`` with these parameters."""
        kept, self._kept = self._kept, None
        return kept[0] if kept is not None and kept[1] is u and kept[2] == self._mark() else None

    def _mark(self) -> tuple[int, int]:
        """Changes when an optimiser takes a step, and when parameters are exchanged for a call."""
        weight: Tensor = self.read[-1].weight  # type: ignore[assignment]
        return id(weight), weight._version

    def start(self) -> Tensor:
        """Return the state at the top, ``(channels, side, side)``; it broadcasts against any batch."""
        side = self.spec.scales[-1][0]
        weight: Tensor = self.read[-1].weight  # type: ignore[assignment]
        return weight.new_ones(self.spec.channels, side, side)

    def contexts(self, image: Tensor | None) -> list[Tensor] | None:
        """Pool low-pass images ``(*batch, C, H, H)``, centred as x is, to every scale, fine to coarse.

        Raises:
            ValueError: If there is no image where the priors see one, one where they do not, or its shape is
                not that of x.
        """
        if (image is None) != (self.context_channels == 0):
            raise ValueError(
                "this ladder's priors see no low-pass image, got one"
                if image is not None
                else "this ladder's priors see a low-pass image, got none"
            )
        if image is None:
            return None
        check_event("image", image, self.spec.x_shape)
        centred = (image - self.spec.centre) / self.spec.spread
        side = self.spec.x_shape[1]
        return [
            over_images(functools.partial(F.avg_pool2d, kernel_size=side // target), centred)
            for target, _ in self.spec.scales
        ]

    def prior(
        self, layer: int, h: Tensor, contexts: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the prior of a latent off the state.

        Args:
            layer: Which latent, counted from the top.
            h: State, shape ``(*batch, channels, side, side)``.
            contexts: What :meth:`contexts` returned.

        Returns:
            ``loc`` and ``scale``, each ``(*batch, z_channels, side, side)``, and the state with the prior's
            features d added, shape ``(*batch, channels, side, side)``.
        """
        seen = h
        if contexts is not None:
            c = contexts[self.spec.scale_of[layer]]
            batch = torch.broadcast_shapes(h.shape[:-3], c.shape[:-3])
            seen = torch.cat([t.expand(*batch, *t.shape[-3:]) for t in (h, c)], dim=-3)
        out = over_images(self.priors[layer], seen)
        width = self.spec.z_width
        loc, log_var, *d = out.split([width, width, *([self.spec.channels] * (layer < self._passed_on))], -3)
        return loc, scales_of(log_var), h + d[0] if d else h

    def below(self, layer: int, h: Tensor, z: Tensor) -> Tensor:
        """Return the state of the layer below; the same state where nothing below reads it.

        Args:
            layer: Which latent, counted from the top.
            h: State that :meth:`prior` returned, shape ``(*batch, channels, side, side)``.
            z: The latent, shape ``(*batch, z_channels, side, side)``; leading dimensions broadcast.
        """
        if layer >= self._passed_on:
            return h
        lift: nn.Conv2d = self.lifts[layer]  # type: ignore[assignment]
        h = over_images(self.blocks[layer], h + pointwise(lift, z))
        scale_of = (*self.spec.scale_of, -1)
        if scale_of[layer + 1] == scale_of[layer]:
            return h
        finer = scale_of[layer + 1]
        return self._upsampled(h, self.spec.x_shape[1] if finer < 0 else self.spec.scales[finer][0])

    def read_out(self, z: Sequence[Tensor], h: Tensor) -> Tensor:
        """Return the likelihood's parameters, shape ``(*batch, *out_shape)``.

        Args:
            z: All latents from the top, each ``(*batch, z_channels, side, side)``.
            h: State below the last of them; seen without aggregation alone.
        """
        if self.read_z is not None:
            side = self.spec.x_shape[1]
            planes = []
            for scale in range(len(self.spec.scales)):
                # Upsampling is linear: one for all latents of a scale.
                of_scale = [t for t, i in zip(z, self.spec.scale_of, strict=True) if i == scale]
                planes.append(self._upsampled(functools.reduce(operator.add, of_scale), side))
            a = functools.reduce(operator.add, planes) / math.sqrt(self.spec.num_latents)
            h = pointwise(self.read_z, a)
        return over_images(self.read, h)

    def _upsampled(self, planes: Tensor, side: int) -> Tensor:
        if planes.shape[-1] == side:
            return planes
        return over_images(
            functools.partial(F.interpolate, size=(side, side), mode="bilinear", align_corners=False), planes
        )


class Descent:
    """A way down a ladder, latent by latent.

    Args:
        ladder: The network.
        contexts: What its :meth:`TopDown.contexts` returned.
        h: State at the top.
        before: An earlier way down from the same state under the same contexts: as long as the latents are
            the very same tensors, its states are taken over, and with them what their gradients need.
    """

    def __init__(
        self, ladder: TopDown, contexts: list[Tensor] | None, h: Tensor, before: "Descent | None" = None
    ) -> None:
        self.contexts = contexts
        self._ladder, self._before = ladder, before
        self._states, self._z = [h], list[Tensor]()
        self._priors = list[tuple[Tensor, Tensor, Tensor]]()

    def again(self) -> "Descent":
        """Begin the same way down once more."""
        return Descent(self._ladder, self.contexts, self._states[0], self)

    @property
    def h(self) -> Tensor:
        """State at the latent that comes next, shape ``(*batch, channels, side, side)``."""
        return self._states[-1]

    def prior(self) -> tuple[Tensor, Tensor]:
        """Return ``loc`` and ``scale`` of the latent that comes next."""
        return self._prior()[:2]

    def go_on(self, z: Tensor) -> None:
        """Pass the next latent, shape ``(*batch, z_channels, side, side)``."""
        layer, before = len(self._z), self._before
        passed = self._prior()[2]
        if before is not None and (layer >= len(before._z) or before._z[layer] is not z):
            self._before = before = None
        self._z.append(z)
        self._states.append(
            self._ladder.below(layer, passed, z) if before is None else before._states[layer + 1]
        )

    def _prior(self) -> tuple[Tensor, Tensor, Tensor]:
        layer = len(self._z)
        if len(self._priors) == layer:
            before = self._before
            known = before is not None and layer < len(before._priors)
            self._priors.append(
                before._priors[layer] if known else self._ladder.prior(layer, self.h, self.contexts)  # type: ignore[union-attr]
            )
        return self._priors[layer]
