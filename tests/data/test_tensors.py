"""Data sets from one's own tensors: what the values are taken for, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pvae.data import CorruptData, DataError, MissingData, from_tensors

UNIT = torch.rand(20, 2, 3, generator=torch.Generator().manual_seed(0))
LEVELS = torch.arange(120).reshape(20, 2, 3) % 17


@pytest.mark.parametrize(
    ("x", "options", "values", "levels"),
    [
        (LEVELS.to(torch.uint8), {}, "unit", 256),
        (LEVELS.to(torch.uint8), {"levels": 17}, "unit", 17),
        (LEVELS.to(torch.uint8), {"levels": 17, "scale": "count"}, "count", 17),
        (LEVELS, {"levels": 1000}, "unit", 1000),
        (LEVELS, {}, "count", None),
        (LEVELS.to(torch.float32), {"scale": "count"}, "count", None),
        (LEVELS % 2 == 0, {}, "binary", 2),
        ((LEVELS % 2).to(torch.float64), {}, "binary", 2),
        (UNIT, {}, "unit", None),
        (UNIT, {"scale": "real"}, "real", None),
        (UNIT * 3 - 1, {}, "real", None),
        (UNIT.to(torch.float64), {"binarize": "dynamic"}, "binary", 2),
        (LEVELS.to(torch.float32) / 16, {"levels": 17}, "unit", 17),
        (LEVELS.to(torch.float32) / 16, {"levels": 17, "binarize": "static"}, "binary", 2),
    ],
)
def test_values(x: Tensor, options: dict[str, Any], values: str, levels: int | None) -> None:
    data = from_tensors(x, **options)
    assert (data.protocol.values, data.protocol.levels) == (values, levels)
    assert data.parts == ("train",)
    expected = x.to(torch.float32)
    if values == "unit" and not x.is_floating_point():
        expected = expected / ((levels or 0) - 1)
    if options.get("binarize") is None:
        torch.testing.assert_close(data.train.x, expected, atol=1e-7, rtol=0)
        torch.testing.assert_close(data.train.sample(torch.arange(20)).x, expected, atol=1e-7, rtol=0)
    else:
        assert set(data.train.x.unique().tolist()) == {0.0, 1.0}


def test_float_probabilities_are_drawn() -> None:
    x = torch.full((5000, 4), 0.2)
    data = from_tensors(x, test=x, binarize="dynamic")
    for drawn in (data.train.sample(torch.arange(5000)).x, data.test.x):
        assert float(drawn.mean()) == pytest.approx(0.2, abs=5 * (0.16 / 20_000) ** 0.5)


def test_grid_of_floats_equals_whole_levels() -> None:
    whole = LEVELS.to(torch.uint8)
    a = from_tensors(whole, levels=17, binarize="dynamic")
    b = from_tensors(whole.to(torch.float32) / 16, levels=17, binarize="dynamic")
    assert a.protocol == b.protocol
    assert torch.equal(a.train.x, b.train.x)


def test_missing_parts() -> None:
    data = from_tensors(UNIT, test=UNIT)
    assert data.parts == ("train", "test")
    assert not hasattr(data, "valid")
    with pytest.raises(MissingData, match="custom has no valid part, only train, test"):
        _ = data.valid


def test_protocol_follows_the_content() -> None:
    y = torch.zeros(20, dtype=torch.int64)
    hashes = {
        from_tensors(UNIT).protocol.hash,
        from_tensors(UNIT, name="mine").protocol.hash,
        from_tensors(UNIT, test=UNIT).protocol.hash,
        from_tensors(UNIT, valid=UNIT).protocol.hash,
        from_tensors(UNIT, y=y).protocol.hash,
        from_tensors(UNIT, y=y + 1).protocol.hash,
        from_tensors(UNIT.flip(0)).protocol.hash,
        from_tensors(UNIT.reshape(20, 6)).protocol.hash,
    }
    assert len(hashes) == 8
    assert from_tensors(UNIT.clone()).protocol == from_tensors(UNIT).protocol
    # Nothing is drawn by the seed here, so it tells nothing apart.
    assert from_tensors(UNIT, seed=5).protocol == from_tensors(UNIT).protocol
    a, b = (from_tensors(UNIT, binarize="static", seed=seed).protocol.hash for seed in (0, 1))
    assert a != b


def test_labels() -> None:
    y = torch.arange(20) % 3
    data = from_tensors(UNIT, test=UNIT, y={"train": y, "test": y.to(torch.int32) + 1})
    assert data.num_classes == 4
    assert data.test.y is not None
    assert data.test.y.dtype == torch.int64
    attributes = from_tensors(UNIT, y=torch.ones(20, 2, dtype=torch.bool))
    assert attributes.train.y is not None
    assert attributes.train.y.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": torch.rand(5)}, r"train must have shape \(N, \*x_shape\).*got \(5,\)"),
        ({"train": torch.rand(0, 3)}, r"got \(0, 3\)"),
        ({"train": torch.rand(5, 3, dtype=torch.complex64)}, "got torch.complex64"),
        ({"train": UNIT, "valid": UNIT[:, :1]}, r"valid must be like train.*\(N, 2, 3\).*got.*\(20, 1, 3\)"),
        ({"train": UNIT, "test": UNIT.double()}, "test must be like train, torch.float32"),
        ({"train": UNIT * 2, "scale": "unit"}, r"float values must lie in \[0, 1\]"),
        ({"train": UNIT, "levels": 256}, r"train must hold values k / 255 for levels=256"),
        ({"train": UNIT * 9, "scale": "count"}, "train must hold whole numbers"),
        ({"train": LEVELS, "levels": 16}, r"whole numbers must lie in 0 \.\.\. 15, got 0 \.\.\. 16"),
        ({"train": -LEVELS}, r"whole numbers must lie in 0 \.\.\. any"),
        ({"train": LEVELS * 2**25}, "whole numbers must be at most 16777216, to be exact in float32"),
        ({"train": LEVELS, "levels": 1}, "levels must be at least 2, got 1"),
        ({"train": UNIT * 2, "binarize": "dynamic"}, "binarize must be None for custom"),
        ({"train": LEVELS, "binarize": "static"}, "binarize must be None for custom"),
        ({"train": LEVELS % 2 == 0, "binarize": "static"}, "whose values are binary already, got 'static'"),
        ({"train": UNIT, "binarize": "sometimes"}, "binarize must be 'default', 'dynamic'.*got 'sometimes'"),
        (
            {"train": LEVELS.to(torch.uint8), "binarize": "dynamic", "scale": "count"},
            "None with scale='count'",
        ),
        ({"train": UNIT, "scale": "count1"}, "scale must be 'unit' for the values of custom, got 'count1'"),
        (
            {"train": UNIT, "dequantize": True},
            "dequantize must be False for values that are not whole levels",
        ),
        ({"train": LEVELS % 2 == 0, "dequantize": True}, "dequantize must be False for binary values"),
        ({"train": UNIT, "y": torch.zeros(19).long()}, r"y of train must have shape \(20,\).*got \(19,\)"),
        ({"train": UNIT, "y": torch.zeros(20)}, "y of train must hold class numbers.*got torch.float32"),
        ({"train": UNIT, "y": torch.full((20,), -1)}, "must hold class numbers 0, 1"),
        ({"train": UNIT, "test": UNIT, "y": torch.zeros(20).long()}, r"labels of each part \(train, test\)"),
        (
            {"train": UNIT, "y": torch.zeros(20).long(), "class_names": []},
            "name the 1 classes of y, got 0 names",
        ),
        (
            {"train": UNIT, "y": torch.zeros(20, 2), "attribute_names": ["a"]},
            "the 2 columns of y, got 1 names",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_tensors(**arguments)


def test_attributes_of_different_widths_are_refused() -> None:
    with pytest.raises(DataError, match="y must have one shape in all parts"):
        from_tensors(UNIT, test=UNIT, y={"train": torch.zeros(20, 2), "test": torch.zeros(20, 3)})


def test_not_finite_is_named() -> None:
    x = UNIT.clone()
    x[7, 1, 2] = float("nan")
    with pytest.raises(CorruptData, match="train must be finite, got nan or inf in datum 7"):
        from_tensors(x)
    with pytest.raises(CorruptData, match="y of train must be finite"):
        from_tensors(UNIT, y=torch.full((20, 2), float("inf")))


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="train must be a tensor, got list"):
        from_tensors([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y of train must be a tensor, got list"):
        from_tensors(UNIT, y={"train": [0] * 20})  # type: ignore[dict-item]
