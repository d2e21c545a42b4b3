"""Sprites: the attributes are what the pictures show, at the rates of the table."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats
from torch import Tensor

from pvae.data import Data, load
from pvae.data.sprites import ATTRIBUTES, Sprites, sprites

NAMES = tuple(attribute.name for attribute in ATTRIBUTES)


@pytest.fixture(scope="module")
def data() -> Data:
    return load("sprites")


@pytest.fixture(scope="module")
def every() -> tuple[Tensor, NDArray[np.float64]]:
    """All 1,024 combinations three times, with random nuisances, and their pictures in [0, 1]."""
    y = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(NAMES)).repeat(3, 1)
    nuisance = torch.rand(len(y), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return y, Sprites().render(y, nuisance)[:, 0].numpy() / 255.0


def measure(pictures: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What can be read off the pixels, knowing neither attributes nor nuisances, ``(n,)`` each."""
    n = len(pictures)
    rows, columns = np.mgrid[0:32, 0:32]
    background = np.median(pictures.reshape(n, -1), axis=1)[:, None, None]
    ink = np.clip((pictures - background) / (pictures.max((1, 2), keepdims=True) - background), 0, 1)
    seen: dict[str, list[float]] = {
        "light": [],
        "frame": [],
        "dot": [],
        "x": [],
        "y": [],
        "area": [],
        "angle": [],
    }
    seen |= {"box": [], "mean": [], "contrast": []}
    corners = [(5, 5), (5, 26), (26, 5), (26, 26)]
    discs = [np.hypot(rows - r, columns - c) for r, c in corners]
    for picture, image in zip(pictures, ink, strict=True):
        seen["light"].append(picture.max())
        seen["frame"].append(image[0, 5:-5].mean())
        # A dot is full within its radius and has nothing around it.
        dots = [image[disc < 1.6].min() - image[(disc > 3) & (disc < 4)].max() for disc in discs]
        seen["dot"].append(max(dots))
        if max(dots) > 0.5:
            image[discs[int(np.argmax(dots))] < 3] = 0
        image[[0, 1, -2, -1], :] = 0
        image[:, [0, 1, -2, -1]] = 0
        shape = ndimage.binary_fill_holes(image > 0.5)
        d = np.stack([columns[shape] - columns[shape].mean(), rows[shape] - rows[shape].mean()])
        axes = np.linalg.eigh(d @ d.T)[1]
        extent = np.abs(axes.T @ d).max(1)
        seen["x"].append(columns[shape].mean())
        seen["y"].append(rows[shape].mean())
        seen["area"].append(shape.sum())
        seen["angle"].append(abs((math.degrees(math.atan2(axes[1, 1], axes[0, 1])) + 90) % 180 - 90))
        seen["box"].append(np.prod(2 * extent + 1) / shape.sum())
        inside = image[ndimage.binary_erosion(shape, iterations=2)]
        seen["mean"].append(inside.mean())
        seen["contrast"].append(inside.std())
    return {name: np.array(values) for name, values in seen.items()}


def test_pixels_tell_every_attribute(every: tuple[Tensor, NDArray[np.float64]]) -> None:
    y, pictures = every
    seen = measure(pictures)
    large, striped = seen["area"] > 100, seen["contrast"] > 0.15
    read = {
        "light": seen["light"] > 0.78,
        "bordered": seen["frame"] > 0.8,
        "dotted": seen["dot"] > 0.5,
        "left": seen["x"] < 15.5,
        "top": seen["y"] < 15.5,
        "large": large,
        "rotated": seen["angle"] > 24,
        "striped": striped,
        "filled": seen["mean"] > np.where(striped, 0.52, 0.22),
    }
    for name, guess in read.items():
        assert np.array_equal(guess, y[:, NAMES.index(name)].numpy() > 0.5), name
    # Corners of small shapes are finer than a pixel: measured on the large ones.
    is_round = y[:, NAMES.index("round")].numpy() > 0.5
    assert np.mean(is_round[large] == (seen["box"] > 1.25)[large]) > 0.95
    assert set(read) | {"round"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_attribute_changes_the_picture_in_every_combination(name: str) -> None:
    y = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(NAMES))
    on, off = y.clone(), y.clone()
    on[:, NAMES.index(name)], off[:, NAMES.index(name)] = 1, 0
    truth = Sprites()
    change = (truth.render(on).double() - truth.render(off).double()).abs() / 255
    assert int((change > 0.1).sum((1, 2, 3)).min()) >= 4
    assert float(change.sum((1, 2, 3)).min()) > 1.0


def test_nuisances_change_the_picture() -> None:
    truth = Sprites()
    y = torch.tensor([[1.0, 1, 1, 0, 0, 1, 1, 1, 0, 0]])
    middle = truth.render(y).double()
    for i in range(6):
        nuisance = torch.full((1, 6), 0.5, dtype=torch.float64)
        nuisance[0, i] = 0.0
        assert float((truth.render(y, nuisance).double() - middle).abs().sum()) > 100


def test_edges_are_smooth() -> None:
    picture = Sprites().render(torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 1, 0, 0]]))
    assert len(picture.unique()) > 20


class TestTable:
    def test_documented(self) -> None:
        rows = re.findall(
            r"^ *(\w+) +([a-z]\w*)? +(0\.\d+)(?: +(0\.\d+))?$", sprites.__doc__ or "", re.MULTILINE
        )
        table = [(name, parent or None, (float(p), float(q or p))) for name, parent, p, q in rows]
        assert table == [(a.name, a.parent, a.probability) for a in ATTRIBUTES]

    def test_parents_come_first(self) -> None:
        for i, attribute in enumerate(ATTRIBUTES):
            assert attribute.parent is None or attribute.parent in NAMES[:i]

    def test_probabilities_sum_to_one(self) -> None:
        every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(NAMES))
        assert float(Sprites().log_prob(every).exp().sum()) == pytest.approx(1.0, abs=1e-12)

    def test_log_prob_by_hand(self) -> None:
        y = torch.tensor([1.0, 0, 1, 1, 1, 0, 0, 0, 1, 0], dtype=torch.float64)
        by_hand = 0.5 * 0.6 * 0.35 * 0.45 * 0.2 * 0.5 * 0.75 * 0.6 * 0.03 * 0.98
        assert float(Sprites().log_prob(y)) == pytest.approx(math.log(by_hand), abs=1e-12)

    @pytest.mark.parametrize(
        ("values", "rate"),
        [
            ({"bordered": 1, "dotted": 1}, (0.6 * 0.03 + 0.4 * 0.12) * 0.02),
            ({"striped": 1, "filled": 0}, (0.6 * 0.65 + 0.4 * 0.15) * 0.08),
            ({"large": 0, "bordered": 1}, 0.6 * 0.03),
            ({"left": 1, "top": 0}, 0.5 * 0.3),
            ({"filled": 1}, 0.6 * 0.35 + 0.4 * 0.85),
            ({}, 1.0),
        ],
    )
    def test_rates_by_hand(self, data: Data, values: dict[str, int], rate: float) -> None:
        assert data.truth.rate(**values) == pytest.approx(rate, abs=1e-12)

    def test_unknown_attribute(self) -> None:
        with pytest.raises(ValueError, match=r"attributes must be among round, .*, got smiling"):
            Sprites().rate(smiling=1)

    def test_drawn_at_these_rates(self, data: Data) -> None:
        y = data.train.y
        assert y is not None
        for a, b in itertools.combinations(NAMES, 2):
            for values in itertools.product((0, 1), repeat=2):
                hit = (y[:, [NAMES.index(a), NAMES.index(b)]] == torch.tensor(values)).all(1)
                expected = data.truth.rate(**{a: values[0], b: values[1]})
                assert stats.binomtest(int(hit.sum()), len(y), expected).pvalue > 1e-5, (a, b, values)

    def test_rare_combinations_are_there(self, data: Data) -> None:
        y = data.train.y
        assert y is not None
        both = (y[:, NAMES.index("bordered")] == 1) & (y[:, NAMES.index("dotted")] == 1)
        assert 1 <= int(both.sum()) <= 25  # 10.6 expected of 8,000

    def test_correlations(self, data: Data) -> None:
        assert data.train.y is not None
        r = np.corrcoef(data.train.y.numpy().T)
        for child, parent, sign in [("filled", "large", 1), ("top", "left", 1), ("light", "filled", -1)]:
            assert sign * r[NAMES.index(child), NAMES.index(parent)] > 0.3
        assert abs(r[NAMES.index("left"), NAMES.index("round")]) < 0.05


def test_labels_are_the_truth(data: Data) -> None:
    assert data.attribute_names == NAMES
    assert data.num_classes is None
    assert data.log_density is None
    assert data.train.y is not None
    assert (data.train.y.shape, data.train.y.dtype) == ((8000, 10), torch.float32)
    assert data.train.y.unique().tolist() == [0.0, 1.0]
    assert (data.protocol.values, data.protocol.levels) == ("unit", 256)


def test_deterministic_in_the_seed(data: Data) -> None:
    torch.manual_seed(5)
    again = load("sprites", num_train=1000)
    assert torch.equal(again.test.x, data.test.x)
    assert torch.equal(again.valid.x, data.valid.x)
    other = load("sprites", num_train=10, num_test=10, valid=0, seed=1)
    assert other.parts == ("train", "test")
    assert not torch.equal(other.train.x, data.train[:10].x)
    assert load("sprites", num_train=1000).protocol == again.protocol


def test_balanced() -> None:
    balanced = load("sprites", balanced=True, num_train=4000, num_test=10, valid=0)
    assert balanced.train.y is not None
    assert float((balanced.train.y.mean(0) - 0.5).abs().max()) < 5 * 0.5 / 4000**0.5
    r = np.corrcoef(balanced.train.y.numpy().T) - np.eye(10)
    assert np.abs(r).max() < 5 / 4000**0.5
    assert balanced.truth.rate(bordered=1, dotted=1) == pytest.approx(0.25)
    assert "balanced" in balanced.protocol.split


def test_render_refusals() -> None:
    with pytest.raises(ValueError, match=r"y must have shape \(n, 10\) and values 0 or 1, got \(2, 9\)"):
        Sprites().render(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="values 0 or 1"):
        Sprites().render(torch.full((2, 10), 0.5))
    with pytest.raises(ValueError, match=r"nuisance must have shape \(2, 6\), got \(1, 6\)"):
        Sprites().render(torch.zeros(2, 10), torch.zeros(1, 6))
