"""What is drawn: expressions read, labels chosen, rates counted, options refused where a model lacks them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.data import Data, from_tensors
from pvae.experiments import Program, SpecError, sampling
from pvae.experiments.registry import PARTS
from pvae.experiments.runs import OpenRun, RunFolder
from pvae.experiments.sampling import Plan, Wanted
from pvae.experiments.spec import parse

NAMES = ("red", "green", "blue", "grey")


class StandIn(nn.Module):
    """Has every option of every model."""

    conditional = True

    def __init__(self, conditional: bool = True) -> None:
        super().__init__()
        self.conditional = conditional
        self.prior = nn.Module()
        self.prior.conditional = conditional  # type: ignore[assignment]
        self.prior.base = nn.Identity()

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        mean: bool = False,
        sampling: str = "exact",
        scale: float = 1.0,
        scale_mode: str = "within",
    ) -> Tensor:
        return torch.zeros(n, 2)


def _run(data: Data, model: nn.Module | None = None) -> OpenRun:
    spec = parse("[data]\nname = 'digits'\n[fit]\nsteps = 1\n")
    return OpenRun(RunFolder(Path("run")), spec, data, model or StandIn(), None)


def _classes(names: tuple[str, ...] | None = NAMES) -> Data:
    y = {"train": torch.tensor([0, 0, 1, 3, 3, 3, 2, 1]), "valid": torch.tensor([3, 1, 3, 0])}
    return from_tensors(torch.randn(8, 2), torch.randn(4, 2), y=y, name="paint", class_names=names)


def _attributes(y: Tensor, valid: Tensor | None = None) -> Data:
    held = y if valid is None else valid
    return from_tensors(
        torch.randn(len(y), 2),
        torch.randn(len(held), 2),
        y={"train": y, "valid": held},
        name="faces",
        attribute_names=tuple("abcdefgh"[: y.shape[1]]),
    )


def _bits(*rows: str) -> Tensor:
    return torch.tensor([[float(bit) for bit in row] for row in rows])


def _plan(data: Data, model: nn.Module | None = None, **wanted: Any) -> Plan:
    return sampling.plan(_run(data, model), Wanted(**wanted))


CLASSES = {
    "red": ["red"],
    "0..3": ["red", "green", "blue", "grey"],
    "green..grey": ["green", "blue", "grey"],
    " blue , red ": ["blue", "red"],
    "3,1": ["grey", "green"],
    "blue..3,grey,red..red": ["blue", "grey", "red"],
}


@pytest.mark.parametrize("expression", list(CLASSES))
def test_labels_are_read(expression: str) -> None:
    plan = _plan(_classes(), labels=expression, num=8)
    assert [row.label for row in plan.rows] == CLASSES[expression]
    for row in plan.rows:
        assert row.y is not None
        assert row.y.tolist() == [NAMES.index(row.label)] * 8


def test_labels_without_names_are_numbers() -> None:
    assert [row.label for row in _plan(_classes(None), labels="1..3").rows] == ["1", "2", "3"]


def test_names_that_are_numbers_are_names() -> None:
    data = _classes(("7", "5", "3", "1"))
    rows = _plan(data, labels="5..1", num=2).rows
    assert [(row.label, row.y.tolist()) for row in rows if row.y is not None] == [
        ("5", [1, 1]),
        ("3", [2, 2]),
        ("1", [3, 3]),
    ]
    with pytest.raises(SpecError, match="paint has no label '0': choose from 7 to 1"):
        _plan(data, labels="0")


def test_a_name_may_hold_dots() -> None:
    assert [row.label for row in _plan(_classes(("a..b", "a", "b", "c")), labels="a..b").rows] == ["a..b"]


def test_a_class_has_its_rate_in_training() -> None:
    rates = [row.to_dict()["rate"] for row in _plan(_classes(), labels="0..3").rows]
    assert rates == [2 / 8, 2 / 8, 1 / 8, 3 / 8]


BAD_LABELS = {
    "gren": "paint has no label 'gren': did you mean 'green'?",
    "4": "paint has no label '4': choose from red, green, blue, grey",
    "red..purple": "paint has no label 'purple'",
    "grey..red": "a range of --labels must go upwards, got 'grey..red'",
    "red,,blue": "--labels must read such as red..grey or red,grey, got 'red,,blue'",
    "": "--labels must read such as red..grey or red,grey, got ''",
    "red..": "--labels must read such as red..grey or red,grey, got 'red..'",
}


@pytest.mark.parametrize("expression", list(BAD_LABELS))
def test_bad_labels_are_refused(expression: str) -> None:
    with pytest.raises(SpecError) as refused:
        _plan(_classes(), labels=expression)
    assert BAD_LABELS[expression] in str(refused.value)


def test_attributes_are_set_in_held_out_rows_those_that_match_first() -> None:
    valid = _bits("1011", "0110", "1100", "0001", "1111", "0000")
    plan = _plan(_attributes(_bits("1000", "0100"), valid), attributes=["a=1,c=1"], num=6)
    (row,) = plan.rows
    assert row.y is not None
    assert (row.y[:, [0, 2]] == 1).all()
    # Everything but the named attributes is a row's own, and every row is used once.
    assert sorted(row.y[:, [1, 3]].tolist()) == sorted(valid[:, [1, 3]].tolist())
    assert sorted(row.y[:2].tolist()) == [[1, 0, 1, 1], [1, 1, 1, 1]]  # both match
    assert sorted(row.y[2:4, [1, 3]].tolist()) == [[1, 0], [1, 0]]  # one attribute changed: 0110 and 1100
    assert row.to_dict()["as_found"] == 2


def test_held_out_rows_come_again_when_they_are_used_up() -> None:
    (row,) = _plan(_attributes(_bits("10", "01", "11")), attributes=["a=0"], num=7).rows
    assert row.y is not None
    assert row.y.shape == (7, 2)
    assert row.to_dict()["as_found"] == 3  # 01, and again each third draw


def test_attributes_have_their_rate_in_training() -> None:
    y = (torch.rand(400, 3) < 0.3).float()
    wanted = ["a=1, c=0", "b=1", "a=1,b=1,c=1", " b=1"]
    rows = _plan(_attributes(y), attributes=wanted).rows
    assert [row.label for row in rows] == ["a=1, c=0", "b=1", "a=1, b=1, c=1"]
    counted = [
        sum(1 for a, _, c in y.tolist() if a and not c),
        sum(1 for _, b, _ in y.tolist() if b),
        sum(1 for a, b, c in y.tolist() if a and b and c),
    ]
    assert [row.facts["rate"] for row in rows] == pytest.approx([count / 400 for count in counted])
    assert rows[0].text == f"a=1, c=0\n{100 * counted[0] / 400:.2g} % of training"


def test_a_combination_that_training_lacks_says_so() -> None:
    (row,) = _plan(_attributes(_bits("10", "01")), attributes=["a=1,b=1"]).rows
    assert row.text == "a=1, b=1\nnone in training"
    assert row.facts == {"rate": 0.0, "as_found": 0}


BAD_ATTRIBUTES = {
    "e=1": "faces has no attribute 'e'",
    "a=2": "attribute a must be 0 or 1, got '2'",
    "a=yes": "attribute a must be 0 or 1, got 'yes'",
    "a=1,a=0": "attribute a cannot be both 0 and 1, got 'a=1,a=0'",
    "a": "--attributes must read such as a=1,c=0, got 'a'",
    "a=1,": "--attributes must read such as a=1,c=0, got 'a=1,'",
    "=1": "--attributes must read such as a=1,c=0, got '=1'",
    "rare": "no pair of attributes of faces has a rate below 0.5 % in training: "
    "the rarest is a=1, b=1 with 25 %",
}


@pytest.mark.parametrize("expression", list(BAD_ATTRIBUTES))
def test_bad_attributes_are_refused(expression: str) -> None:
    data = _attributes(torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3))
    with pytest.raises(SpecError) as refused:
        _plan(data, attributes=[expression])
    assert BAD_ATTRIBUTES[expression] in str(refused.value)


def test_rare_pairs_equal_those_counted_by_hand() -> None:
    rates = torch.tensor([0.5, 0.03, 0.9, 0.08, 0.4])
    y = (torch.rand(1000, 5) < rates).float()
    y[:, 4] *= y[:, 0]  # 4 without 0 never occurs
    counted = {}
    for i, j in itertools.combinations(range(5), 2):
        for a, b in itertools.product((0, 1), repeat=2):
            counted[i, a, j, b] = sum(1 for row in y.tolist() if row[i] == a and row[j] == b) / 1000
    expected = {key: rate for key, rate in counted.items() if rate < 0.02}
    found = sampling.rare_pairs(y, below=0.02, most=100)
    assert len(expected) > 3
    read = {(*[part for item in sorted(values.items()) for part in item],): rate for values, rate in found}
    assert read == pytest.approx(expected)
    assert [rate for _, rate in found] == sorted(rate for _, rate in found)
    assert found[0] == ({0: 0, 4: 1}, 0.0)
    assert sampling.rare_pairs(y, below=0.02, most=2) == found[:2]


def test_a_value_that_never_occurs_makes_no_rare_pair() -> None:
    y = _bits("101", "001", "111", "011")
    assert sampling.rare_pairs(y) == []
    assert sampling.rare_pairs(_bits("10", "01")) == [({0: 1, 1: 1}, 0.0), ({0: 0, 1: 0}, 0.0)]


def test_the_rare_pair_of_sprites() -> None:
    spec = parse(
        "[data]\nname = 'sprites'\n[fit]\nsteps = 1\n",
        ["data.num_test=1", "data.valid=200", "likelihood=normal"],
    )
    data = spec.load_data()
    rows = _plan(data, attributes=["rare", "large=1"]).rows
    assert [row.label for row in rows] == ["bordered=1, dotted=1", "large=1"]
    exact = data.truth.rate(bordered=1, dotted=1)
    assert rows[0].facts["rate"] == pytest.approx(exact, abs=4 * (exact / len(data.train)) ** 0.5)


def test_without_rows_labels_are_those_of_held_out_data() -> None:
    data = _classes()
    plan = _plan(data, num=4)
    assert plan.name == "samples"
    (row,) = plan.rows
    assert row.y is not None
    assert row.label == ""
    assert sorted(row.y.tolist()) == [0, 1, 3, 3]
    assert torch.equal(row.y, sampling.held_out_labels(data, 4))
    assert not torch.equal(sampling.held_out_labels(data, 4, seed=1), sampling.held_out_labels(data, 4))
    assert sorted(sampling.held_out_labels(data, 8).tolist()) == [0, 0, 1, 1, 3, 3, 3, 3]
    assert row.to_dict() == {"y": row.y.tolist()}


def test_without_a_validation_part_labels_are_those_of_training() -> None:
    data = from_tensors(torch.randn(3, 2), y=torch.tensor([2, 0, 1]))
    assert sorted(sampling.held_out_labels(data, 3).tolist()) == [0, 1, 2]


def test_choosing_labels_leaves_no_trace() -> None:
    classes, attributes = _classes(), _attributes(_bits("10", "01"))
    before = torch.get_rng_state()
    sampling.held_out_labels(classes, 4)
    _plan(attributes, attributes=["a=1"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_number_of_draws() -> None:
    points = _classes()
    images = from_tensors(torch.rand(8, 1, 4, 4), y=torch.arange(8) % 2, class_names=("red", "green"))
    for data, in_all, in_a_row in ((images, 64, 8), (points, 500, 100)):
        assert _plan(data).num == in_all
        assert _plan(data, labels="red").num == in_a_row
        assert _plan(data, scale_sweep=True).num == in_a_row
        assert _plan(data, labels="red", num=3).num == 3


def test_a_sweep_has_a_row_for_each_scale() -> None:
    plan = _plan(_classes(), StandIn(conditional=False), scale_sweep=True, scale_mode="global")
    assert [row.options for row in plan.rows] == [{"scale": scale} for scale in sampling.SCALES]
    assert [row.label for row in plan.rows] == [
        f"scale {text}" for text in ("0", "0.25", "0.5", "0.75", "1", "1.25", "1.5")
    ]
    assert plan.options == {"scale_mode": "global"}
    assert [row.y for row in plan.rows] == [None] * 7
    assert plan.rows[1].to_dict() == {"label": "scale 0.25", "scale": 0.25}


def test_options_reach_the_plan_and_name_the_picture() -> None:
    plan = _plan(_classes(), labels="red", sampling="paper")
    assert (plan.name, plan.options) == ("labels-paper", {"sampling": "paper"})
    plan = _plan(_classes(), scale=0.5, scale_mode="within")
    assert (plan.name, plan.options) == ("samples-scale-0.5-within", {"scale": 0.5, "scale_mode": "within"})
    assert _plan(_classes(), scale_sweep=True).name == "scale-sweep"


def test_headings_say_what_was_drawn() -> None:
    data, plain = _classes(), StandIn(conditional=False)
    assert _plan(data, plain).panels == ("mean of p(x | z),  z ~ p(z)", "draw  x ~ p(x | z), same z")
    assert _plan(data).panels == ("mean of p(x | z, y),  z ~ p(z | y)", "draw  x ~ p(x | z, y), same z")
    assert _plan(data, plain, scale=0.5).panels[0].endswith("z ~ p(z) at scale 0.5")
    assert (
        _plan(data, plain, scale_sweep=True, scale_mode="global")
        .panels[0]
        .endswith("z ~ p(z), scaled (global)")
    )
    assert _plan(data, sampling="paper").panels[0].endswith("z ~ base of p(z | y)")
    flowless = StandIn()
    del flowless.prior.base
    flowless.prior.conditional = False  # type: ignore[assignment]
    assert _plan(data, flowless, sampling="paper").panels[0].endswith("z ~ p(z)")


@pytest.fixture(scope="module")
def vae() -> tuple[Program, Data]:
    small = ["z_dim=2", "encoder.hidden=[4]", "decoder.hidden=[4]"]
    spec = parse("[data]\nname = 'digits'\n[fit]\nsteps = 1\n", small)
    data = spec.load_data()
    return spec.build(data), data


LACKING = {
    "labels": ("0..9", "--labels needs a model of kind 'conditional', but this run's is 'vae'"),
    "attributes": (["a=1"], "--attributes needs a model of kind 'conditional', but this run's is 'vae'"),
    "sampling": ("paper", "--sampling needs a model of kind 'conditional', but this run's is 'vae'"),
    "scale": (0.5, "--scale needs a model of kind 'x_vae', but this run's is 'vae'"),
    "scale_mode": ("global", "--scale-mode needs a model of kind 'x_vae', but this run's is 'vae'"),
    "scale_sweep": (True, "--scale-sweep needs a model of kind 'x_vae', but this run's is 'vae'"),
}


@pytest.mark.parametrize("option", list(LACKING))
def test_an_option_that_the_model_lacks_names_those_that_have_it(
    option: str, vae: tuple[Program, Data]
) -> None:
    program, data = vae
    value, sentence = LACKING[option]
    with pytest.raises(SpecError) as refused:
        _plan(data, program.model, **{option: value})
    assert str(refused.value) == sentence


def test_a_model_that_is_entered_later_is_named_too(
    vae: tuple[Program, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> StandIn:
        return StandIn()

    part = replace(PARTS["model"]["vae"], kind="mine", build=build)
    monkeypatch.setitem(PARTS["model"], "mine", part)
    with pytest.raises(SpecError, match="--scale needs a model of kind 'x_vae' or 'mine'"):
        _plan(vae[1], vae[0].model, scale=0.5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampling": "papr"}, "unknown --sampling 'papr': did you mean 'paper'?"),
    ({"scale": 1.0, "scale_mode": "xyz"}, "unknown --scale-mode 'xyz': choose from within, global"),
    ({"scale": -0.5}, "--scale must be a finite number of at least 0, got -0.5"),
    ({"scale": float("nan")}, "--scale must be a finite number of at least 0, got nan"),
    ({"scale": 1.0, "scale_sweep": True}, "--scale is one of the rows of --scale-sweep: give one of the two"),
    (
        {"labels": "red", "attributes": ["a=1"]},
        "--labels and --attributes each make the rows of the picture: give one of them",
    ),
    (
        {"labels": "red", "scale_sweep": True},
        "--labels and --scale-sweep each make the rows of the picture: give one of them",
    ),
    ({"attributes": ["a=1"]}, "the labels of paint are classes: use --labels, not --attributes"),
]


@pytest.mark.parametrize(("wanted", "sentence"), REFUSED)
def test_what_cannot_be_drawn_is_refused(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError) as refused:
        _plan(_classes(), **wanted)
    assert str(refused.value) == sentence


def test_labels_of_attributes_are_refused() -> None:
    with pytest.raises(SpecError, match="the labels of faces are attributes: use --attributes, not --labels"):
        _plan(_attributes(_bits("10", "01")), labels="0")


def test_data_without_labels_are_refused() -> None:
    with pytest.raises(SpecError, match="custom has no labels"):
        _plan(from_tensors(torch.randn(5, 2)))
