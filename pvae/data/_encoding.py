"""How stored levels become ``x``: scale, binarisation, dequantisation, drawn afresh or once and for all."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._seeds import derive_seed
from .protocol import Binarize, Scale

__all__ = ["Encoding"]

# Noise that is drawn once comes in blocks of this many data, each with a seed of its own: the draw of a datum
# depends on its position in the part alone, so a subset is binarised as the whole is, at the subset's cost.
_BLOCK = 16


@dataclass(frozen=True)
class Encoding:
    """The map from stored levels to ``x`` for one part.

    Args:
        part: Name of the part; noise is drawn again for each batch in ``"train"`` only.
        binarize: As in :class:`~pvae.data.Protocol`.
        scale: As in :class:`~pvae.data.Protocol`.
        dequantize: As in :class:`~pvae.data.Protocol`.
        levels: Number of levels of the stored whole numbers; ``None`` where floats or open counts are stored.
        seed: Seed of what is drawn once.
    """

    part: str
    binarize: Binarize | None
    scale: Scale
    dequantize: bool
    levels: int | None
    seed: int

    @property
    def redraws(self) -> bool:
        """Whether training batches are drawn anew from the stored levels."""
        return self.part == "train" and (self.binarize == "dynamic" or self.dequantize)

    @property
    def keeps(self) -> bool:
        """Whether the stored levels are what is evaluated, up to their scale."""
        return self.binarize is None and not self.dequantize

    def draw(self, stored: Tensor) -> Tensor:
        """Encode a training batch, with noise of torch's global generator of the tensor's device.

        Free of host synchronisation and of data-dependent shapes, so it can be traced, captured and replayed.

        Args:
            stored: Levels, shape ``(B, *x_shape)``.

        Returns:
            ``x``, float32, shape ``(B, *x_shape)``.
        """
        noise = torch.rand(stored.shape, dtype=torch.float32, device=stored.device)
        if self.binarize is not None:
            # A comparison costs a quarter of torch.bernoulli on the CPU.
            return (noise < self._grey(stored)).to(torch.float32)
        return self._dequantized(stored, noise)

    def fix(self, stored: Tensor, positions: Tensor) -> Tensor:
        """Encode once and for all, in the most compact type: uint8 bits, the stored levels, or floats.

        Args:
            stored: Levels, shape ``(B, *x_shape)``, on the CPU, so that every device sees the same draw.
            positions: Position of each datum in its whole part, shape ``(B,)``, on the CPU.

        Returns:
            A tensor of shape ``(B, *x_shape)`` from which :meth:`finish` makes ``x``.
        """
        if self.binarize == "threshold":
            return (self._grey(stored) >= 0.5).to(torch.uint8)
        if self.binarize is not None:
            bits = torch.empty(stored.shape, dtype=torch.uint8)
            for rows, noise in self._noise(positions, stored.shape[1:]):
                bits[rows] = (noise < self._grey(stored[rows])).to(torch.uint8)
            return bits
        if self.dequantize:
            x = torch.empty(stored.shape, dtype=torch.float32)
            for rows, noise in self._noise(positions, stored.shape[1:]):
                x[rows] = self._dequantized(stored[rows], noise)
            return x
        return stored

    def finish(self, fixed: Tensor) -> Tensor:
        """Return ``x``, float32, from what :meth:`fix` gave (or from rows of it)."""
        return self._grey(fixed) if self.keeps and self.scale == "unit" else fixed.to(torch.float32)

    def clean(self, stored: Tensor) -> Tensor:
        """Return what the noise is drawn around: its mean, float32, in the units of ``x``."""
        if self.binarize is not None:
            return self._grey(stored)
        return self._dequantized(stored, torch.tensor(0.5)) if self.dequantize else self.finish(stored)

    def _grey(self, stored: Tensor) -> Tensor:
        """Stored levels as grey values in [0, 1], k / (levels - 1)."""
        grey = stored.to(torch.float32)
        return grey if self.levels is None else grey / (self.levels - 1)

    def _dequantized(self, stored: Tensor, noise: Tensor) -> Tensor:
        x = stored.to(torch.float32) + noise
        return x if self.levels is None or self.scale == "count" else x / self.levels

    def _noise(self, positions: Tensor, shape: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, uniform noise for them): a pure function of (seed, part, position)."""
        blocks = positions // _BLOCK
        numbers, counts = blocks.unique(return_counts=True)
        groups = torch.argsort(blocks, stable=True).split(counts.tolist())
        for number, rows in zip(numbers.tolist(), groups, strict=True):
            generator = torch.Generator().manual_seed(derive_seed("noise", self.seed, self.part, number))
            noise = torch.rand(_BLOCK, *shape, dtype=torch.float32, generator=generator)
            yield rows, noise[positions[rows] % _BLOCK]
