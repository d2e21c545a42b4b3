"""Specs that somebody else wrote: TOML of any size and depth, names that mean something to Python, sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pvae.data import DataError, load
from pvae.experiments import SpecError, load_spec
from pvae.experiments.allocation import VARIABLE
from pvae.experiments.cli import app
from pvae.experiments.registry import PARTS
from pvae.experiments.spec import parse
from pvae.experiments.toml import LARGEST

from .bombs import MARK
from .confined import MEBIBYTES, confined

SMALL = "z_dim = 3\n[data]\nname = 'digits'\n[fit]\nsteps = 2\n"
DATA = "z_dim = 3\n[fit]\nsteps = 2\n[data]\nname = 'digits'\n"


def refusal(text: str, *overrides: str) -> str:
    """The one line that a spec is refused with."""
    with pytest.raises(SpecError) as caught:
        parse(text, overrides)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 400
    assert said.isprintable()
    return said


TEXTS = {
    "10 MB of a comment": (SMALL + "#" + "x" * 10_000_000, "at most 65536 characters"),
    "10 MB of no TOML": ("x" * 10_000_000, "at most 65536 characters"),
    "10 MB of a list": (SMALL + "[encoder]\nhidden=[" + "1," * 5_000_000 + "]", "at most 65536 characters"),
    "lists within lists": ("x = " + "[" * 30_000, "nested too deeply"),
    "tables within tables": ("x = " + "{a=" * 20_000, "nested too deeply"),
    "a key of many": ("a" + ".a" * 30_000 + " = 1", "at most 255 dots in a line"),
    "a table of many": ("[" + "a." * 30_000 + "a]", "at most 255 dots in a line"),
    "lists that are deep": (SMALL + "[encoder]\nhidden = " + "[" * 90 + "]" * 90, "lists at most 4 deep"),
    "lists of options that are deep": (DATA + "noise = " + "[" * 90 + "]" * 90, "lists at most 4 deep"),
    "a table in a table": (SMALL + "[prior.kind]\na = 1", "prior.kind must be a value, got a table"),
    "tables in a list": (DATA + "noise = [{a = 1}]", "data.noise must be a value, got a table"),
    "a list of tables": (SMALL.replace("[fit]", "[[fit]]"), "fit must be a table"),
    "a number of digits": (SMALL.replace("= 2", "= 1" + "0" * 5000), "a number or a date that is none"),
    "a large number": (SMALL.replace("= 2", "= 1" + "0" * 30), "fit.steps must be a whole number of 64 bits"),
    "epochs": (SMALL + "epochs = 1e308", "fit.epochs must be an integer"),
    "a date": (DATA + "noise = 1979-05-27", "must be a text, a number"),
    "a date that is none": (DATA + "noise = 1979-02-30", "not valid TOML"),
    "NaN": (SMALL + "lr = nan", "fit.lr must be a number, got nan"),
    "NaN in a list": (DATA + "noise = [nan]", "data.noise must be a number, got nan"),
    "no latents": (SMALL.replace("= 3", "= 0"), "z_dim must be greater than 0"),
    "fewer than none": (SMALL.replace("= 3", "= -1"), "z_dim must be greater than 0"),
    "__class__": ("[__class__]\na = 1\n" + SMALL, "a key of a spec must be a letter"),
    "__init__ of a data set": (DATA + "__init__ = 1", "a key of a spec must be a letter"),
    "a key with a break": (SMALL + '"a\\nb" = 1', r"got 'a\nb'"),
    "a key with an escape": (SMALL + '"\\u001b[2J" = 1', "a key of a spec must be a letter"),
    "a key without a name": (SMALL + '"" = 1', "a key of a spec must be a letter"),
    "a long key": (SMALL + "a" * 1000 + " = 1", "at most 63 letters"),
    "a kind of an import": (SMALL + "[prior]\nkind = 'os.system'", "unknown [prior] kind 'os.system'"),
    "a kind of a path": (SMALL + "[prior]\nkind = '../../x'", "unknown [prior] kind '../../x'"),
    "a kind with a break": (SMALL + "[prior]\nkind = 'a\\nb'".replace("'", '"'), "one line"),
    "a kind of a list": (SMALL + "[prior]\nkind = ['a']", "unknown [prior] kind"),
    "a data set of an import": (SMALL.replace("digits", "pvae.data:load"), "unknown data.name"),
    "a root": (DATA + "root = '/etc'", "it is given beside the spec, as --data-root"),
    "a download": (DATA + "download = true", "it is given beside the spec, as --download"),
    "a description of two lines": ('description = "a\\nb"\n' + SMALL, "must be one line"),
    "a description that clears": ('description = "\\u001b[2J"\n' + SMALL, "must be one line"),
    "a long description": (f"description = '{'x' * 2000}'\n" + SMALL, "at most 1000 characters"),
    "a null": (SMALL + "\0", "not valid TOML"),
    "a mark of order": ("\ufeff" + SMALL, "not valid TOML"),
    "a surrogate": ('description = "\\ud800"\n' + SMALL, "not valid TOML"),
    "nothing": ("", "[data] needs name"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    text, message = TEXTS[name]
    assert message in refusal(text)


@pytest.mark.parametrize("key", ["arguments", "model_config", "model_fields", "self", "copy", "load"])
def test_options_by_names_of_methods(key: str) -> None:
    """They stay what they are, options that the data set does not know."""
    spec = parse(DATA + f"{key} = 3")
    assert parse(spec.to_toml()) == spec
    assert spec.data.arguments()[key] == 3
    with pytest.raises(DataError, match="must be given options that it has"):
        spec.load_data()


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "=1",
        "fit.lr",
        "fit..lr=1",
        ".fit.lr=1",
        "fit.lr.x=1",
        "fit. lr=1",
        "__class__=1",
        "fit.__class__=1",
        "fit=__import__('os')",
        "prior=os.system",
        "prior.kind=$(touch x)",
        "fit.lr=1\nfit.x=2",
        "fit.lr=nan",
        "fit.lr=" + "[" * 20_000,
        "fit.lr=" + "9" * 20_000,
        "fit.lr=" + "x" * 200_000,
        "x" * 100_000 + "=1",
        "fit.steps=1" + "0" * 30,
        "description=" + '"\\u0007"',
        "data.name={a=1}",
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_overrides(override: str) -> None:
    refusal(SMALL, override)


@pytest.mark.parametrize("name", ["a\nb", "x" * 100_000])
def test_overrides_of_what_an_override_made_no_table(name: str) -> None:
    assert "is not a table" in refusal(SMALL, f"{name}=1", f"{name}.c=1")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "recipes/vae",
        "../recipes/vae.toml",
        "vae\0",
        "vae\0.toml",
        "x" * 5000,
        "x" * 5000 + ".toml",
        "",
        ".",
        "/",
        "~",
        "vae\n",
        "\x1b[2J",
        "http://localhost/vae.toml",
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_names_of_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        load_spec(name)
    assert len(str(caught.value).splitlines()) == 1
    assert "root:" not in str(caught.value)  # nothing of what stands in a file that is no spec


def test_the_command_says_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.toml").write_bytes(b"#" * (LARGEST + 1))
    (tmp_path / "bytes.toml").write_bytes(bytes(range(256)))
    commands = [
        ["../../etc/passwd"],
        ["large.toml"],
        ["bytes.toml"],
        ["vae", "prior=os.system"],
        ["vae", "__class__=1"],
        ["vae", "encoder.hidden=[1000000000000]"],
        ["vae", "fit.batch_size=-1"],
        ["vae", "fit.lr=-inf"],
        ["vae", "fit.lr=nan"],
        ["vae", "data.valid='x'"],
        ["vae", "data.seed=1.5"],
    ]
    for arguments in commands:
        done = CliRunner().invoke(app, ["train", *arguments, "--out", "run"])
        assert done.exit_code == 2, (arguments, done.output)
        assert len(done.stderr.splitlines()) == 1, (arguments, done.stderr)
        assert done.stderr.startswith("pvae: ")
        assert done.stdout == ""
        assert {path.name for path in tmp_path.iterdir()} == {"large.toml", "bytes.toml"}, arguments


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["fit.num_particles=1000000000000", "fit.objective=iwae", "fit.steps=1"]
    done = CliRunner().invoke(app, ["train", "vae", *changes, "--out", "run"])
    assert done.exit_code == 1, done.output
    assert "there is not enough memory" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _sizes() -> list[str]:
    """Keys of the parts that are whole numbers or lists of them, as overrides that build their part."""
    beside = {
        "ladder": "model=ladder posterior=ladder encoder=ladder decoder=ladder prior=none",
        "hvae": "model=hvae posterior=hvae decoder=pair",
        "conditional_flow": "model=conditional",
        "conditional_spline": "model=conditional",
        "codes": "model=x_vae",
    }
    found = []
    for table, kinds in PARTS.items():
        for kind, part in kinds.items():
            schema = part.keys.model_json_schema()["properties"]
            for key, of in schema.items():
                types = {of.get("type"), *(one.get("type") for one in of.get("anyOf", ()))}
                value = (
                    "1000000000000" if "integer" in types else "[1000000000000]" if "array" in types else None
                )
                if value is not None and table != "pseudoinput":
                    first = beside.get(kind, beside["hvae"] if kind == "pair" else "")
                    found.append(f"{first} {table}={kind} {table}.{key}={value}".strip())
    return found


def test_no_size_of_a_part_is_asked_for_in_vain() -> None:
    """Every size of every part, at 10^12: refused in one line, or of no consequence, within the memory."""
    sizes = _sizes()
    assert len(sizes) > 30
    statement = "parse({text!r}, {overrides!r}).build(data)"
    statements = {
        overrides: statement.format(text=SMALL, overrides=overrides.split(" ")) for overrides in sizes
    }
    imports = (
        "from pvae.data import load\nfrom pvae.experiments.spec import parse\n"
        f"data = load('digits')\nparse({SMALL!r}).build(data)\nos.environ[{VARIABLE!r}] = '1e6'"
    )
    refused = 0
    for name, outcome in confined(imports, statements).items():
        assert outcome.kind in ("", "SpecError"), (name, outcome)
        assert len(outcome.text.splitlines()) < 2, (name, outcome)
        assert outcome.grown < MEBIBYTES / 2, (name, outcome)
        refused += outcome.kind == "SpecError"
    assert refused > 25


def test_the_limit_of_parameters_is_said_and_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits")
    spec = parse(SMALL, ["encoder.hidden=[1000]"])
    before = torch.get_rng_state()
    numbers = sum(p.numel() for program in spec.build(data) for p in program.parameters())
    assert 60_000 < numbers < 200_000
    monkeypatch.setenv(VARIABLE, "60000")
    with pytest.raises(
        SpecError, match=r"must hold at most 60000 numbers, got \d+ up to a tensor of"
    ) as caught:
        spec.build(data)
    assert f"set {VARIABLE} to allow more" in str(caught.value)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setenv(VARIABLE, "1e6")
    spec.build(data)
    for wrong in ("many", "-1", "inf", "nan", ""):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(SpecError, match=f"{VARIABLE} must be a positive number, got"):
            spec.build(data)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_moons", {"num_train": 10**12}),
        ("two_moons", {"num_test": -1}),
        ("two_moons", {"num_train": "1"}),
        ("two_moons", {"num_train": True}),
        ("two_moons", {"num_train": [1]}),
        ("two_moons", {"num_train": 2**70}),
        ("two_moons", {"noise": 1e-300}),
        ("two_moons", {"noise": 1e308}),
        ("two_moons", {"noise": float("inf")}),
        ("two_moons", {"noise": float("nan")}),
        ("two_moons", {"noise": None}),
        ("two_moons", {"seed": 1.5}),
        ("manifold", {"noise": 1e-9}),
        ("saddle", {"curvature": 1e29}),
        ("sprites", {"num_train": 10**9}),
        ("sprites", {"balanced": 1}),
        ("gaussian_mixture", {"components": 10**9}),
        ("embedded_mixture", {"dim": 10**6}),
        ("embedded_mixture", {"num_components": 10**9}),
        ("embedded_mixture", {"law": "x"}),
        ("embedded_mixture", {"law": 2**64}),
        ("ppca", {"x_dim": 10**6, "z_dim": 10**6}),
        ("ppca", {"x_dim": 1, "z_dim": 10**6}),
        ("digits", {"valid": "x"}),
        ("digits", {"binarize": 3}),
        ("celeba", {"size": "x"}),
        ("celeba", {"attributes": [1]}),
    ],
    ids=str,
)
def test_options_of_data_sets(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        load(name, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_nothing_in_a_spec_is_run(tmp_path: Path) -> None:
    """Every recipe, with a text in place of each text, that would make a folder if anything ran it."""
    text = f"__import__('os').mkdir({str(tmp_path / MARK)!r})"
    for line in SMALL.splitlines():
        key, equals, _ = line.partition("=")
        if equals:
            refusal(SMALL.replace(line, f"{key}= {json.dumps(text)}"))
    refusal(SMALL, f"prior={json.dumps(text)}")
    assert parse(f"description = {json.dumps(text)}\n{SMALL}").description == text
    assert not (tmp_path / MARK).exists()
