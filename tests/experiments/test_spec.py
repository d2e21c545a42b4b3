"""The spec: round trip, defaults, overrides, schema, and every refusal in one sentence."""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pvae.experiments import Spec, SpecError, load_spec
from pvae.experiments.registry import PARTS, TABLES
from pvae.experiments.spec import parse, recipes

SMALL = "[data]\nname = 'digits'\n[fit]\nsteps = 2\n"


def test_defaults_are_filled_in() -> None:
    spec = parse(SMALL)
    assert {table: getattr(spec, table).kind for table in TABLES} == TABLES
    assert spec.fit.arguments()["batch_size"] == 128
    assert spec.data.arguments()["binarize"] == "default"
    assert spec.evaluate.limit is None


@pytest.mark.parametrize("name", list(recipes()))
def test_round_trip(name: str) -> None:
    spec = load_spec(name)
    text = spec.to_toml()
    again = parse(text)
    assert again == spec
    assert again.to_toml() == text
    absent = {name for name in ("autoencoder", "align") if getattr(spec, name) is None}
    absent |= {"pseudoinput"} if spec.pseudoinput.kind == "none" else set()
    assert set(tomllib.loads(text)) == set(Spec.model_fields) - absent


def test_round_trip_of_awkward_values() -> None:
    overrides = [
        'description="a \\"quoted\\" \\\\ line — ζ"',
        "prior.kind=vamp",
        "prior.init_mean=1e-30",
        "fit.lr=inf",
        "encoder.hidden=[]",
        "data.binarize=none",
        "evaluate.limit=7",
        "fit.grad_clip=0.1",
    ]
    spec = parse(SMALL, overrides)
    assert parse(spec.to_toml()) == spec
    assert spec.data.arguments()["binarize"] is None
    assert spec.encoder.arguments()["hidden"] == ()
    assert spec.description == 'a "quoted" \\ line — ζ'


def test_none_is_a_word() -> None:
    spec = parse(SMALL, ["data.binarize=none", "fit.schedule=none"])
    assert spec.data.arguments()["binarize"] is None
    assert spec.fit.arguments()["schedule"] is None
    assert 'binarize = "none"' in spec.to_toml()


def test_options_of_one_data_set_are_kept() -> None:
    spec = parse("[data]\nname = 'two_moons'\nnoise = 0.25\nnum_train = 64\n[fit]\nsteps = 2")
    assert spec.data.arguments()["noise"] == 0.25
    assert parse(spec.to_toml()) == spec
    assert len(spec.load_data().train) == 64


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("fit.steps=9", "fit", "steps", 9),
        ("fit.lr=1e-2", "fit", "lr", 0.01),
        ("fit.lr = 1", "fit", "lr", 1.0),
        ("encoder.hidden=[3, 4]", "encoder", "hidden", (3, 4)),
        ("encoder.gated=true", "encoder", "gated", True),
        ("fit.objective=iwae", "fit", "objective", "iwae"),
        ('fit.objective="dreg"', "fit", "objective", "dreg"),
        ("data=mnist", "data", "name", "mnist"),
        ("prior.kind=vamp", "prior", "components", 500),
    ],
)
def test_override(override: str, table: str, key: str, value: object) -> None:
    arguments = getattr(parse(SMALL, [override]), table).arguments()
    assert arguments[key] == value
    assert type(arguments[key]) is type(value)


def test_a_new_kind_starts_its_table_afresh() -> None:
    text = SMALL + "[prior]\nkind = 'vamp'\ncomponents = 7\n"
    assert parse(text, ["prior=mixture"]).prior.arguments() == {"components": 10, "init": "random"}
    assert parse(text, ["prior=vamp"]).prior.arguments()["components"] == 7
    assert parse(text, ["prior=mixture", "prior.components=3"]).prior.arguments()["components"] == 3


def test_epochs_and_steps_exclude_each_other() -> None:
    arguments = parse(SMALL, ["fit.epochs=3"]).fit.arguments()
    assert (arguments["epochs"], arguments["steps"]) == (3, None)
    with pytest.raises(SpecError, match="needs epochs or steps, one of the two"):
        parse("[data]\nname = 'digits'\n[fit]\nsteps = 2\nepochs = 3")
    with pytest.raises(SpecError, match="needs epochs or steps, one of the two"):
        parse("[data]\nname = 'digits'")


REFUSALS = {
    "prior.componets=5": "unknown key prior.componets: kind 'normal' has no keys",
    "prior=vamp prior.componets=5": "unknown key prior.componets: did you mean 'components'?",
    "prior.components=5": "prior.components belongs to kind 'mixture' or 'vamp' or 'codes', not to 'normal'",
    "prior=vamp prior.encoder=mlp": r"prior.encoder is no key: it comes from \[encoder\]",
    "prior=vamp prior.bounds=[0,1]": r"prior.bounds is no key: it comes from \[data\]",
    "likelihood=discretized_logistic_mixture likelihood.levels=17": r"levels is no key",
    "prior=vmap": r"unknown \[prior\] kind 'vmap': did you mean 'vamp'?",
    "prior=zzz": r"unknown \[prior\] kind 'zzz': choose from normal, mixture, vamp",
    "prior=3": r"unknown \[prior\] kind '3'",
    "model=ladderr": r"unknown \[model\] kind 'ladderr'",
    "fit.epoch=5": "unknown key fit.epoch: did you mean 'epochs'?",
    "fitt.epochs=5": "unknown key or table 'fitt': did you mean 'fit'?",
    "zdim=5": "unknown key or table 'zdim': did you mean 'z_dim'?",
    "model.depth=5": "unknown key model.depth: kind 'vae' has no keys",
    "data=minst": "unknown data.name 'minst': did you mean 'mnist'?",
    "data.name=5": "data.name must be a string, got 5",
    "z_dim=0": "z_dim must be greater than 0, got 0",
    "z_dim=2.5": "z_dim must be an integer",
    "z_dim=true": "z_dim must be an integer, got True",
    "fit.epochs=many": "fit.epochs must be an integer or 'none', got 'many'",
    "fit.objective=elbow": "fit.objective must be 'elbo', 'mean_field', 'iwae' or 'dreg', got 'elbow'",
    "encoder.hidden=256": "encoder.hidden must be a list, got 256",
    "encoder.hidden=[8,0]": r"encoder.hidden\[1\] must be greater than 0, got 0",
    "encoder.activation=swish": "encoder.activation must be 'relu', .* got 'swish'",
    "evaluate.split=tset": "evaluate.split must be 'train', 'valid' or 'test', got 'tset'",
    "evaluate.limit=0": "evaluate.limit must be greater than 0 or 'none', got 0",
    "fit=3": "fit must be a table, got 3",
    "description=3": "description must be a string, got 3",
    "fit.epochs": "an override must read key=value, such as fit.epochs=5, got 'fit.epochs'",
    "a.b.c=1": "an override must read key=value",
    ".=1": "an override must read key=value",
    "fit.epochs=[1,": r"the value of an override must be TOML, got 'fit.epochs=\[1,'",
    "z_dim.x=1": "cannot set 'z_dim.x': 'z_dim' is not a table",
}


@pytest.mark.parametrize("overrides", list(REFUSALS))
def test_refusal_in_one_sentence(overrides: str) -> None:
    with pytest.raises(SpecError, match=REFUSALS[overrides]) as caught:
        parse("z_dim = 3\n" + SMALL, overrides.split(" "))
    assert "\n" not in str(caught.value)


def test_an_override_sets_one_key() -> None:
    with pytest.raises(SpecError, match="an override sets one key"):
        parse(SMALL, ["fit.lr=1\nfoo=2"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[data\n", "the spec is not valid TOML: "),
        ("[fit]\nsteps = 1", r"\[data\] needs name"),
        ("prior = 3\n" + SMALL, "prior must be a table, got 3"),
        ("data = 3\n[fit]\nsteps = 1", "data must be a table, got 3"),
    ],
)
def test_damaged_text(text: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        parse(text)


def test_load_spec_reads_recipes_files_and_folders(tmp_path: Path) -> None:
    spec = load_spec("vae", ["z_dim=3"])
    (tmp_path / "spec.toml").write_text(spec.to_toml())
    assert load_spec(tmp_path / "spec.toml") == load_spec(tmp_path) == load_spec(str(tmp_path)) == spec


def test_load_spec_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no recipe 'vae-minst': did you mean 'vae-mnist'\?"):
        load_spec("vae-minst")
    with pytest.raises(SpecError, match=r"cannot read the spec .*x.toml: No such file"):
        load_spec(tmp_path / "x.toml")
    with pytest.raises(SpecError, match=r"cannot read the spec .*spec.toml: No such file"):
        load_spec(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="is not UTF-8 text"):
        load_spec(tmp_path / "b.toml")


def test_a_spec_does_not_change() -> None:
    spec = parse(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        spec.z_dim = 3
    with pytest.raises(ValueError, match="frozen"):
        spec.fit.steps = 3  # type: ignore[attr-defined]


def test_json_schema_names_every_part_and_key() -> None:
    schema: Any = Spec.json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Spec.model_fields)
    prior = schema["properties"]["prior"]
    assert set(prior["discriminator"]["mapping"]) == set(PARTS["prior"])
    vamp = schema["$defs"]["Prior_vamp"]
    assert set(vamp["properties"]) == {"kind", "components", "init", "init_mean", "init_scale"}
    assert vamp["properties"]["components"]["exclusiveMinimum"] == 0
    assert vamp["additionalProperties"] is False
    assert "null" not in json.dumps(schema)
    assert {"const": "none"} in schema["$defs"]["Fit"]["properties"]["grad_clip"]["anyOf"]


def test_random_overrides_are_taken_or_refused_in_one_sentence() -> None:
    chance = random.Random(0)
    tables = ["data", "fit", "evaluate", "z_dim", "description", "nothing", *TABLES]
    keys = [
        "name",
        "kind",
        "components",
        "hidden",
        "steps",
        "epochs",
        "lr",
        "limit",
        "split",
        "sigma",
        "bounds",
    ]
    values = [
        "1",
        "-1",
        "2.5",
        "none",
        "vamp",
        "normal",
        "conv",
        "true",
        "[]",
        "[[1]]",
        "[1.5, 'a']",
        "{a = 1}",
    ]
    refusals: list[str] = []
    for _ in range(400):
        left = (
            f"{chance.choice(tables)}.{chance.choice(keys)}"
            if chance.random() < 0.8
            else chance.choice(tables)
        )
        overrides = [f"{left}={chance.choice(values)}"]
        try:
            parse(SMALL, overrides)
        except SpecError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 400
    assert not any("\n" in sentence for sentence in refusals)
