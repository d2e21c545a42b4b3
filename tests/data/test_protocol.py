"""The protocol's hash is stable, and moves with everything that makes two numbers incomparable."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from pvae.data import Protocol

BASE = Protocol(
    name="digits",
    split="stratified",
    sizes=(("train", 1297), ("valid", 200), ("test", 300)),
    x_shape=(1, 8, 8),
    binarize="dynamic",
    scale="unit",
    dequantize=False,
    values="binary",
    levels=2,
    seed=0,
    sha256="ab" * 32,
    part="test",
)

CHANGES: dict[str, Any] = {
    "name": "mnist",
    "split": "other",
    "sizes": (("train", 1297), ("valid", 200), ("test", 299)),
    "x_shape": (64,),
    "binarize": "static",
    "scale": "count",
    "dequantize": True,
    "values": "unit",
    "levels": 17,
    "seed": 1,
    "sha256": "ac" * 32,
    "part": "valid",
    "subset": "0:100",
}


def test_hash_is_pinned() -> None:
    # Written into results on disk: a change of this value makes them all unreadable as comparisons.
    assert BASE.hash == "2c2279449666"


def test_every_field_but_the_note_is_covered() -> None:
    assert {field.name for field in fields(Protocol)} == {*CHANGES, "note"}
    assert replace(BASE, note="a remark").hash == BASE.hash


@pytest.mark.parametrize("field", CHANGES)
def test_hash_moves_with_each_field(field: str) -> None:
    assert replace(BASE, **{field: CHANGES[field]}).hash != BASE.hash


def test_dictionary_survives_json_and_holds_the_hash() -> None:
    stored = json.loads(json.dumps(BASE.to_dict()))
    assert stored == BASE.to_dict()
    assert stored["hash"] == BASE.hash
    assert stored["sizes"] == {"train": 1297, "valid": 200, "test": 300}


def test_str_is_one_line_that_says_what_matters() -> None:
    text = str(replace(BASE, subset="0:100"))
    assert "\n" not in text
    for word in ("digits/test[0:100]", "dynamic", "seed 0", "train 1297", "test 300", "protocol"):
        assert word in text
    grey = str(replace(BASE, binarize=None, values="unit", levels=256, dequantize=True, seed=None))
    assert "unit values, 256 levels, dequantized;" in grey
