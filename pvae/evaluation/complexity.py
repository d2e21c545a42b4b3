"""How many bits a lossless compressor needs for an image (Serrà et al. 2020, arXiv:1909.11480)."""

import zlib
from typing import Any

import torch
from torch import Tensor

from pvae.data import Split

__all__ = ["compressed_bits", "pixel_levels"]

_FILTERS = 5
_MOST = 256


def pixel_levels(x: Tensor | Split) -> tuple[Tensor, int]:
    """Return the levels of the pixels that are scored, as whole numbers from 0, and their number.

    Those of a split are the values that :attr:`Split.x` holds: the bits of binarised data, and the levels
    that dequantised ones come from (fewer than 256 of them spread over as many, in their order).

    Args:
        x: A split, or a tensor of zeros and ones, shape ``(N, *x_shape)``.

    Returns:
        Levels, shape ``(N, *x_shape)``, uint8, on the CPU; and their number, 2 to 256.

    Raises:
        ValueError: If the data have no levels, more than 256 of them, or a tensor holds other values than 0
            and 1.
    """
    if isinstance(x, Tensor):
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("complexity needs levels: x must be a split, or hold zeros and ones alone")
        return x.detach().cpu().to(torch.uint8), 2
    protocol = x.protocol
    levels = 2 if protocol.values == "binary" else protocol.levels
    if protocol.dequantize:
        # (k + 1/2) / L, of which no two have one place among 256, whatever L up to there.
        found = (x.clean * (1 if protocol.scale == "count" else _MOST)).floor()
        levels = _MOST
    elif levels == 2 or protocol.scale == "count":
        found = x.x.round()
        levels = levels or _MOST
    elif levels is not None:
        found = (x.x * (levels - 1)).round()
    if levels is None or levels > _MOST or not bool(((found >= 0) & (found < levels)).all()):
        raise ValueError(f"complexity needs at most {_MOST} levels of the data, got {protocol}")
    return found.detach().cpu().to(torch.uint8), levels


def compressed_bits(levels: Tensor, num_levels: int = 256) -> Tensor:
    """Return the length of each image under a lossless compressor, in bits.

    The shortest of seven zlib streams (deflate, level 9): of the pixels as they are, of the pixels under each
    of PNG's five filters, and under the filter that makes each row smallest. Images of two levels are packed
    to a bit a pixel, as PNG does. No header counts but zlib's six bytes.

    Args:
        levels: Levels of images, shape ``(N, C, H, W)``, or of data without a second dimension, shape
            ``(N, ...)``, each of which counts as one row; uint8.
        num_levels: Number of levels; bits are packed where it is 2.

    Returns:
        Shape ``(N,)``, float64.

    Raises:
        ValueError: If the levels are not uint8, or there are others than ``num_levels``.
    """
    if levels.dtype != torch.uint8 or levels.ndim < 2:
        raise ValueError(f"levels must be uint8 of shape (N, ...), got {levels.dtype} {tuple(levels.shape)}")
    if not 2 <= num_levels <= 256 or (levels.numel() and int(levels.max()) >= num_levels):
        raise ValueError(f"num_levels must lie between 2 and 256 and above all levels, got {num_levels}")
    rows, step = _rows(levels.cpu(), num_levels == 2)
    return torch.tensor([min(map(_bits, _streams(image, step))) for image in rows], dtype=torch.float64)


def _rows(levels: Tensor, binary: bool) -> tuple[Any, int]:
    """Bytes of the rows of every image, ``(N, H, B)``, and how many bytes a pixel has."""
    import numpy as np

    if levels.ndim == 3:
        levels = levels.unsqueeze(1)
    if levels.ndim != 4:
        levels = levels.reshape(len(levels), 1, 1, -1)
    channels = levels.shape[1]
    if binary:
        # The channels of bits stand one under another.
        bits = levels.reshape(len(levels), -1, levels.shape[-1]).numpy()
        return np.packbits(bits, axis=-1), 1
    return levels.permute(0, 2, 3, 1).reshape(len(levels), levels.shape[2], -1).numpy(), channels


def _streams(image: Any, step: int) -> list[bytes]:
    """The image under no filter, each filter, and the best filter of each row, as PNG writes them."""
    import numpy as np

    value = image.astype(np.int16)
    left = np.zeros_like(value)
    left[:, step:] = value[:, :-step]
    above = np.zeros_like(value)
    above[1:] = value[:-1]
    corner = np.zeros_like(value)
    corner[1:, step:] = value[:-1, :-step]
    guess = left + above - corner
    apart = [np.abs(guess - near) for near in (left, above, corner)]
    paeth = np.where(
        (apart[0] <= apart[1]) & (apart[0] <= apart[2]),
        left,
        np.where(apart[1] <= apart[2], above, corner),
    )
    predictions = np.stack([np.zeros_like(value), left, above, (left + above) // 2, paeth])
    filtered = ((value - predictions) % 256).astype(np.uint8)
    # Each row is led by the number of its filter.
    number = np.arange(_FILTERS, dtype=np.uint8).reshape(-1, 1, 1)
    led = np.concatenate([np.broadcast_to(number, (*filtered.shape[:2], 1)), filtered], -1)
    size = np.abs(filtered.astype(np.int8).astype(np.int16)).sum(-1)
    best = led[size.argmin(0), np.arange(len(value))]
    return [image.tobytes(), *(part.tobytes() for part in led), best.tobytes()]


def _bits(stream: bytes) -> int:
    return 8 * len(zlib.compress(stream, 9))
