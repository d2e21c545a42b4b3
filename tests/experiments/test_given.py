"""How near images are to a pseudoinput: against loops over pairs, and which images are shown."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.data import from_tensors
from pvae.experiments.given import evenly, low_pass

from ..ladders import LinearU


def _means_of_blocks(x: Tensor) -> Tensor:
    """What ``LinearU`` of side 2 does to images of 4 x 4."""
    return torch.stack(
        [0.2 * x[..., i : i + 2, j : j + 2].mean((-1, -2)) for i in (0, 2) for j in (0, 2)], -1
    )


@pytest.mark.usefixtures("float64")
def test_distances_equal_those_of_loops() -> None:
    held = from_tensors(torch.rand(7, 1, 4, 4)).train
    u = [torch.randn(1, 2, 2) for _ in range(3)]
    means, draws = ([torch.rand(5, 1, 4, 4) for _ in u] for _ in range(2))
    found = low_pass(LinearU((1, 4, 4), 2), u, means, draws, held)

    def rms(images: list[Tensor]) -> list[float]:
        return [
            float(np.sqrt(np.mean([(_means_of_blocks(x)[0] - each.flatten()).square().tolist() for x in of])))
            for each, of in zip(u, images, strict=True)
        ]

    pairs = [
        (_means_of_blocks(a) - _means_of_blocks(b)).square().mean().item()
        for a, b in itertools.combinations(held.x, 2)
    ]
    assert found.rows == pytest.approx(rms(draws), rel=1e-9)
    assert found.rms == pytest.approx(np.sqrt(np.mean(np.square(rms(draws)))), rel=1e-9)
    assert found.means == pytest.approx(np.sqrt(np.mean(np.square(rms(means)))), rel=1e-9)
    assert found.between == pytest.approx(np.sqrt(np.mean(pairs)), rel=1e-6)  # data are single


def test_images_that_ignore_what_they_were_given_are_as_far_as_any() -> None:
    data = from_tensors(torch.rand(600, 1, 4, 4))
    reduce, given, others = LinearU((1, 4, 4), 2), data.train.x[:300], list(data.train.x[300:].split(1))
    near = low_pass(reduce, list(reduce(given)), list(given.split(1)), others, data.train)
    assert near.rms == pytest.approx(near.between, rel=0.05)
    assert near.means == 0
    assert str(near) == (
        f"u of the drawn images is {near.rms:.3g} from the given one, of their means 0; "
        f"u of different held-out images {near.between:.3g} from one another (RMS per coefficient)"
    )


@pytest.mark.parametrize(("size", "num"), [(10, 10), (11, 4), (7, 5), (1000, 6), (3, 1)])
def test_positions_are_spread_evenly(size: int, num: int) -> None:
    drawn = [evenly(size, num, seed) for seed in range(200)]
    for at in drawn:
        for k, position in enumerate(at.tolist()):
            assert k * size // num <= position < (k + 1) * size // num
    assert torch.equal(drawn[3], evenly(size, num, 3))
    assert len({position for at in drawn for position in at.tolist()}) > min(0.9 * size, 500)


def test_choosing_positions_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    evenly(100, 5, 3)
    assert torch.equal(torch.get_rng_state(), before)
