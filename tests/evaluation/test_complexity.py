"""Compressed sizes: decoded again by a PNG reader of our own, and ordered as complexity is."""

import struct
import zlib

import numpy as np
import pytest
import torch

from pvae.data import from_tensors
from pvae.evaluation import compressed_bits, pixel_levels
from pvae.evaluation.complexity import _rows, _streams


def unfiltered(stream: bytes, height: int, width: int, step: int) -> list[list[int]]:
    """Undo PNG's filters byte by byte, from the specification (RFC 2083, sec. 6)."""
    rows: list[list[int]] = []
    for i in range(height):
        line = stream[i * (width + 1) : (i + 1) * (width + 1)]
        kind, data = line[0], line[1:]
        row: list[int] = []
        for j, byte in enumerate(data):
            left = row[j - step] if j >= step else 0
            above = rows[i - 1][j] if i else 0
            corner = rows[i - 1][j - step] if i and j >= step else 0
            estimate = left + above - corner
            near = min((left, above, corner), key=lambda value: abs(estimate - value))
            row.append((byte + (0, left, above, (left + above) // 2, near)[kind]) % 256)
        rows.append(row)
    return rows


@pytest.mark.parametrize("channels", [1, 3])
def test_every_filter_can_be_undone(channels: int) -> None:
    image = torch.randint(0, 256, (1, channels, 6, 7), dtype=torch.uint8)
    rows, step = _rows(image, binary=False)
    streams = _streams(rows[0], step)
    assert step == channels
    assert len(streams) == 7
    wanted = image[0].permute(1, 2, 0).reshape(6, -1).tolist()
    assert list(streams[0]) == [value for row in wanted for value in row]
    for number, stream in enumerate(streams[1:]):
        assert unfiltered(stream, 6, 7 * channels, channels) == wanted
        if number < 5:
            assert set(stream[:: 7 * channels + 1]) == {number}


def test_bits_are_packed_eight_to_a_byte() -> None:
    image = torch.zeros(1, 1, 2, 16, dtype=torch.uint8)
    image[0, 0, 1, 8] = 1
    rows, _ = _rows(image, binary=True)
    assert rows.tolist() == [[[0, 0], [0, 128]]]
    flat, step = _rows(torch.ones(2, 9, dtype=torch.uint8), binary=True)
    assert (flat.shape, step) == ((2, 1, 2), 1)


def test_bits_are_the_shortest_stream_and_no_fewer_than_the_entropy() -> None:
    noise = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    bits = compressed_bits(noise)
    assert bool((bits >= 28 * 28 * 8).all())  # what cannot be compressed is not
    assert bool((bits < 1.05 * 28 * 28 * 8).all())
    coins = torch.randint(0, 2, (20, 1, 28, 28), dtype=torch.uint8)
    assert float(compressed_bits(coins, 2).mean()) == pytest.approx(28 * 32, rel=0.2)
    plain = torch.full((1, 1, 28, 28), 7, dtype=torch.uint8)
    assert compressed_bits(plain).item() == 8 * len(zlib.compress(bytes([7]) * 784, 9))
    ramp = (4 * torch.arange(28)).to(torch.uint8).expand(1, 1, 28, 28)
    raw = 8 * len(zlib.compress(bytes(ramp.flatten().tolist()), 9))
    assert compressed_bits(ramp.contiguous()).item() <= raw
    # A gradient with noise in one bit: filters help where repetition does not.
    slope = (3 * torch.arange(28).unsqueeze(1) + 2 * torch.arange(28)).expand(1, 1, 28, 28)
    rough = (slope + torch.randint(0, 2, (1, 1, 28, 28))).to(torch.uint8)
    whole = 8 * len(zlib.compress(struct.pack("784B", *rough.flatten().tolist()), 9))
    assert compressed_bits(rough).item() < 0.8 * whole


def test_levels_are_those_that_were_stored() -> None:
    grey = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    for dequantize in (True, False):
        split = from_tensors(grey, test=grey, dequantize=dequantize).test
        levels, num = pixel_levels(split)
        assert num == 256
        assert torch.equal(levels, grey)
    few = torch.randint(0, 17, (12, 1, 8, 8), dtype=torch.uint8)
    split = from_tensors(few, test=few, levels=17, dequantize=True).test
    spread, _ = pixel_levels(split)
    assert torch.equal(spread, ((few.double() + 0.5) / 17 * 256).floor().to(torch.uint8))
    assert len(spread.unique()) == len(few.unique())
    bits, two = pixel_levels(from_tensors(grey, test=grey, binarize="threshold").test)
    assert two == 2
    assert torch.equal(bits, (grey.double() / 255 >= 0.5).to(torch.uint8))
    given, two = pixel_levels(bits.float())
    assert (two, given.dtype) == (2, torch.uint8)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x must be a split, or hold zeros and ones alone"):
        pixel_levels(torch.tensor([[0.5]]))
    real = from_tensors(torch.randn(10, 2), test=torch.randn(4, 2)).test
    with pytest.raises(ValueError, match="at most 256 levels of the data, got custom/test: real values"):
        pixel_levels(real)
    with pytest.raises(ValueError, match=r"levels must be uint8 of shape \(N, ...\), got torch.float32"):
        compressed_bits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="num_levels must lie between 2 and 256 and above all levels, got 2"):
        compressed_bits(torch.full((1, 3), 9, dtype=torch.uint8), 2)
    assert np.isfinite(compressed_bits(torch.zeros(1, 3, dtype=torch.uint8)).numpy()).all()
