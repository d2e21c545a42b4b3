"""The table of parts: keys read off signatures, strict values, one entry per new part."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, create_model
from torch import Tensor, nn

from pvae.experiments import SpecError
from pvae.experiments.registry import PARTS, SUPPLIED, TABLES, Keys, keys_of, nearest, register
from pvae.experiments.spec import Spec, parse
from pvae.priors import StandardNormal


class Shifted(StandardNormal):
    """A prior that later work might add."""

    def __init__(self, z_dim: int, shift: float = 0.5, levels_of: Literal["a", "b"] = "a") -> None:
        super().__init__(z_dim)
        self.shift = shift
        self.levels_of = levels_of


@pytest.fixture
def shifted() -> Iterator[None]:
    register("prior", "shifted", Shifted, about="shifted normal", symbols="p(z) = N(z; {shift}, I)")
    yield
    del PARTS["prior"]["shifted"]


def _model(build: Callable[..., object], **annotations: Any) -> type[Keys]:
    return create_model("Model", __base__=Keys, **keys_of(build, **annotations))


def test_every_default_kind_is_registered() -> None:
    assert all(kind in PARTS[table] for table, kind in TABLES.items())


def test_supplied_arguments_are_no_keys() -> None:
    for kinds in PARTS.values():
        for part in kinds.values():
            assert not set(part.keys.model_fields) & set(SUPPLIED)
            assert set(part.supplied) <= set(SUPPLIED)


@pytest.mark.usefixtures("shifted")
def test_a_new_part_takes_one_entry() -> None:
    spec = parse("[data]\nname = 'digits'\n[prior]\nkind = 'shifted'\n[fit]\nsteps = 1", ["prior.shift=2"])
    assert spec.prior.arguments() == {"shift": 2.0, "levels_of": "a"}
    assert parse(spec.to_toml()) == spec
    assert "shifted" in str(Spec.json_schema())
    with pytest.raises(SpecError, match=r"prior\.levels_of must be 'a' or 'b', got 'c'"):
        parse("[data]\nname = 'digits'\n[prior]\nkind = 'shifted'\nlevels_of = 'c'\n[fit]\nsteps = 1")


def test_a_part_that_is_gone_is_unknown_again(shifted: None) -> None:
    register("prior", "other", Shifted, about="another", symbols="p(z)")
    del PARTS["prior"]["other"]
    with pytest.raises(SpecError, match=r"unknown \[prior\] kind 'other'"):
        parse("[data]\nname = 'digits'\n[prior]\nkind = 'other'\n[fit]\nsteps = 1")


def test_types_of_a_signature() -> None:
    def build(
        a: int,
        b: float = 1.0,
        c: str | Callable[[int], int] = "x",
        d: Sequence[int] = (1, 2),
        e: tuple[float, float] | None = None,
        f: Annotated[int, Field(gt=0)] = 1,
    ) -> None: ...

    keys = _model(build)
    made = keys.model_validate({"a": 3, "b": 2, "d": [4], "e": "none"})
    assert made.arguments() == {"a": 3, "b": 2.0, "c": "x", "d": (4,), "e": None, "f": 1}
    for bad in (
        {"a": True},
        {"a": "3"},
        {"a": 1.5},
        {"a": 1, "b": "2"},
        {"a": 1, "e": [1.0]},
        {"a": 1, "f": 0},
        {},
    ):
        with pytest.raises(ValidationError):
            keys.model_validate(bad)


def test_a_narrower_type_replaces_the_hint() -> None:
    def build(a: str = "x") -> None: ...

    with pytest.raises(ValidationError):
        _model(build, a=Literal["x", "y"]).model_validate({"a": "z"})


def test_arguments_that_toml_cannot_hold_are_refused() -> None:
    def build(u: Tensor) -> None: ...

    with pytest.raises(TypeError, match="argument 'u' of build cannot be a key of a spec"):
        register("prior", "tensor", build, about="", symbols="")
    assert "tensor" not in PARTS["prior"]


def test_tables_are_closed() -> None:
    with pytest.raises(ValueError, match=r"table must be one of model, prior, .*got 'pior'"):
        register("pior", "x", nn.Identity, about="", symbols="")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("componets", ": did you mean 'components'?"), ("qqq", ": choose from components, init")],
)
def test_nearest(name: str, expected: str) -> None:
    assert nearest(name, ["components", "init"]) == expected
