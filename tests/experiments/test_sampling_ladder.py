"""Sampling a ladder: its temperature, the pseudoinputs it is given, the bar meanwhile, and the command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from pvae.data import Data
from pvae.experiments import Program, SpecError, figures, jobs, sampling
from pvae.experiments.cli import app
from pvae.experiments.runs import OpenRun, RunFolder
from pvae.experiments.sampling import TEMPERATURES, Wanted
from pvae.experiments.spec import load_spec
from pvae.models import Ladder
from pvae.nn import LadderSpec, MLPDenoiser
from pvae.priors import DiffusionPrior

from ..ladders import jolted, ladder

SPEC = LadderSpec((1, 8, 8), ((4, 2), (2, 1)), channels=4)
STEPS, LAYERS = 5, 3


def _ladder(u: int | None = 2) -> Program:
    torch.manual_seed(0)
    u_shape = (1, 2, 2)
    prior = DiffusionPrior(MLPDenoiser(u_shape, 8, 1), u_shape, num_steps=STEPS) if u else None
    program = Program(*ladder(SPEC, u=u, prior=prior))
    jolted(*program)
    return program


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_spec("vae").load_data()


def _run(data: Data, path: Path = Path("run"), u: int | None = 2) -> OpenRun:
    return OpenRun(RunFolder(path), load_spec("vae"), data, *_ladder(u))


def test_a_temperature_reaches_the_model_and_names_the_picture(digits: Data) -> None:
    plan = sampling.plan(_run(digits), Wanted(temperature=0.8))
    assert (plan.name, plan.options) == ("samples-temperature-0.8", {"temperature": 0.8})
    assert plan.panels[0] == "mean of p(x | z),  z ~ p(z) at temperature 0.8"
    assert plan.num == 64


@pytest.mark.parametrize("u", [2, None])
def test_a_sweep_has_a_row_for_each_temperature(digits: Data, tmp_path: Path, u: int | None) -> None:
    run = _run(digits, tmp_path, u)
    drawn = jobs.sample(run, Wanted(num=3, temperature_sweep=True))
    assert drawn.path == tmp_path / "figures" / "temperature-sweep.png"
    assert drawn.path.is_file()
    assert drawn.low_pass is None
    assert [row.options for row in drawn.plan.rows] == [{"temperature": each} for each in TEMPERATURES]
    assert drawn.plan.rows[4].to_dict() == {"label": "temperature 0.8", "temperature": 0.8}
    assert drawn.plan.panels[0] == "mean of p(x | z),  z ~ p(z), tempered"
    # Means of one noise, which a temperature of zero takes away.
    means = {
        row.label: figures.draw_samples(run.program, 3, **row.options)[0].flatten(1)
        for row in drawn.plan.rows
    }
    spread = {label: x.std(0).mean().item() for label, x in means.items()}
    assert spread["temperature 0"] == pytest.approx(0, abs=1e-6)
    assert 0.01 < spread["temperature 0.2"] < spread["temperature 0.6"] < spread["temperature 1.2"]


def test_rows_share_the_pseudoinput_of_a_held_out_image(digits: Data) -> None:
    run = _run(digits)
    plan = sampling.plan(run, Wanted(given=3, seed=1, temperature=0.5))
    assert (plan.name, plan.num) == ("given-temperature-0.5", 8)
    assert plan.panels[0] == "mean of p(x | z),  z ~ p(z | u) at temperature 0.5"
    places = [row.facts["position"] for row in plan.rows]
    third = len(digits.valid) / 3
    assert [int(place // third) for place in places] == [0, 1, 2]
    assert [row.to_dict() for row in plan.rows] == [
        {"label": f"valid {place}", "position": place} for place in places
    ]
    for row, place in zip(plan.rows, places, strict=True):
        assert row.shown is not None
        x = digits.valid.x[int(place)]
        torch.testing.assert_close(row.shown[0], x)
        torch.testing.assert_close(row.options["u"], 0.2 * x.reshape(1, 2, 4, 2, 4).mean((2, 4)))
        torch.testing.assert_close(
            row.shown[1], row.options["u"].repeat_interleave(4, 1).repeat_interleave(4, 2)
        )
    other = sampling.plan(run, Wanted(given=3, seed=2))
    assert [row.facts["position"] for row in other.rows] != places


class _Echo(Ladder):
    """Gives back the low-pass picture that it is given, and draws that lie apart by a known noise."""

    def sample_given(self, u: Tensor, n_each: int, mean: bool = False, temperature: float = 1.0) -> Tensor:
        assert self.pseudoinput is not None
        image = 5 * self.pseudoinput.context(u).unsqueeze(1)  # the way there is a fifth of the mean
        constant = 0.0 if mean else temperature * 0.3
        return (image + constant).expand(-1, n_each, -1, -1, -1)


def test_the_record_says_how_far_the_images_are(digits: Data, tmp_path: Path) -> None:
    run = _run(digits, tmp_path)
    run.model.__class__ = _Echo
    drawn = jobs.sample(run, Wanted(num=4, given=2), tmp_path / "g.png")
    assert (tmp_path / "g.png").is_file()
    assert drawn.low_pass is not None
    assert drawn.low_pass.rms == pytest.approx(0.06, rel=1e-4)
    assert drawn.low_pass.rows == pytest.approx((0.06, 0.06), rel=1e-4)
    assert drawn.low_pass.means == pytest.approx(0, abs=1e-6)
    cold = jobs.sample(run, Wanted(num=4, given=2, temperature=0.5), tmp_path / "g.png").low_pass
    assert cold is not None
    assert cold.rms == pytest.approx(0.03, rel=1e-4)
    assert cold.between == drawn.low_pass.between > 0.02


def test_rows_of_pseudoinputs_meet_the_same_noise(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(digits, tmp_path)
    kept: dict[str, Any] = {}

    def grid(given: Any, means: Any, draws: Any, path: Path, *_: object, **options: Any) -> Path:
        kept.update(given=given, means=means, draws=draws, bounds=options["bounds"])
        return path

    monkeypatch.setattr(figures, "given_grid", grid)
    plan = jobs.sample(run, Wanted(num=4, given=2, seed=3)).plan
    assert kept["bounds"] == (0.0, 1.0)
    for row in plan.rows:
        assert kept["given"][row.text] is row.shown
        run.model.eval()
        for name, mean in (("means", True), ("draws", False)):
            torch.manual_seed(3)
            expected = run.model.sample_given(row.options["u"][None], 4, mean=mean)[0]
            torch.testing.assert_close(kept[name][row.text], expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "--temperature must be a finite number of at least 0, got -1"),
    ({"temperature": float("inf")}, "--temperature must be a finite number of at least 0, got inf"),
    (
        {"temperature": 1.0, "temperature_sweep": True},
        "--temperature is one of the rows of --temperature-sweep: give one of the two",
    ),
    (
        {"given": 2, "temperature_sweep": True},
        "--temperature-sweep and --given each make the rows of the picture: give one of them",
    ),
    ({"given": 10_000}, "--given 10000 needs at least 10000 held-out images, but digits has 200"),
    ({"given": 2, "scale": 0.5}, "--scale needs a model of kind 'x_vae', but this run's is 'vae'"),
]


@pytest.mark.parametrize(("wanted", "sentence"), REFUSED)
def test_what_cannot_be_drawn_is_refused(wanted: dict[str, Any], sentence: str, digits: Data) -> None:
    with pytest.raises(SpecError) as refused:
        sampling.plan(_run(digits), Wanted(**wanted))
    assert str(refused.value) == sentence


LACKING = {
    "temperature": (
        Wanted(temperature=0.5),
        "--temperature needs a model of kind 'ladder', but this run's is 'vae'",
    ),
    "temperature_sweep": (
        Wanted(temperature_sweep=True),
        "--temperature-sweep needs a model of kind 'ladder', but this run's is 'vae'",
    ),
    "given": (Wanted(given=2), "--given needs a model of kind 'ladder', but this run's is 'vae'"),
}


@pytest.mark.parametrize("option", list(LACKING))
def test_other_models_are_refused(option: str, digits: Data) -> None:
    wanted, sentence = LACKING[option]
    spec = load_spec("vae")
    run = OpenRun(RunFolder(Path("run")), spec, digits, *spec.build(digits))
    with pytest.raises(SpecError) as refused:
        sampling.plan(run, wanted)
    assert str(refused.value) == sentence


def test_a_ladder_without_pseudoinput_is_given_none(digits: Data) -> None:
    with pytest.raises(SpecError, match="--given needs a model with a pseudoinput, but this run's has none"):
        sampling.plan(_run(digits, u=None), Wanted(given=2))


@pytest.mark.parametrize("option", ["temperature", "temperature_sweep"])
def test_a_prior_of_u_without_a_temperature_is_refused(digits: Data, option: str) -> None:
    model, guide = ladder(SPEC, u=2)  # u is normal
    run = OpenRun(RunFolder(Path("run")), load_spec("vae"), digits, model, guide)
    flag = option.replace("_", "-")
    with pytest.raises(
        SpecError, match=f"--{flag} needs a prior of kind 'diffusion', but this run's is 'normal'"
    ):
        sampling.plan(run, Wanted(**{option: 1.0}))  # type: ignore[arg-type]
    assert sampling.plan(run, Wanted(given=2, temperature=0.5)).options == {"temperature": 0.5}


PASSES: list[tuple[dict[str, Any], int | None, int]] = [
    ({}, 2, 2 * (STEPS + LAYERS)),
    ({"temperature_sweep": True}, 2, 2 * len(TEMPERATURES) * (STEPS + LAYERS)),
    ({}, None, 2 * LAYERS),
    ({"given": 3}, 2, 2 * 3 * LAYERS),  # u is not drawn
]


@pytest.mark.parametrize(("wanted", "u", "passes"), PASSES)
def test_a_bar_counts_the_passes_of_the_networks(
    wanted: dict[str, Any],
    u: int | None,
    passes: int,
    digits: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, int, bool | None]] = []
    done: list[int] = []

    @contextmanager
    def reporting(label: str, total: int, show: bool | None) -> Iterator[Any]:
        told.append((label, total, show))
        yield done.append

    monkeypatch.setattr(sampling, "reporting", reporting)
    run = _run(digits, tmp_path, u)
    first = jobs.sample(run, Wanted(num=2, **wanted), tmp_path / "a.png", progress=True)
    assert told == [("sampling", passes, True)]
    assert done == list(range(1, passes + 1))
    run.model.sample(2)
    assert len(done) == passes  # nobody counts any more
    jobs.sample(run, Wanted(num=2, **wanted), tmp_path / "b.png", progress=False)
    assert told[1:] == [("sampling", passes, False)]
    assert first.path.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_model_that_draws_at_once_has_no_bar(digits: Data) -> None:
    spec = load_spec("vae")
    run = OpenRun(RunFolder(Path("run")), spec, digits, *spec.build(digits))
    hooks = sum(len(module._forward_hooks) for module in run.model.modules())
    with sampling.watched(run.model, sampling.plan(run, Wanted()), show=True):
        assert sum(len(module._forward_hooks) for module in run.model.modules()) == hooks


def test_counting_ends_where_drawing_fails(digits: Data) -> None:
    run = _run(digits)
    plan = sampling.plan(run, Wanted())

    def fail() -> None:
        with sampling.watched(run.model, plan, show=False):
            assert _hooked(run.model) == 1 + LAYERS  # the denoiser, and each layer
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert _hooked(run.model) == 0


def _hooked(model: nn.Module) -> int:
    return sum(1 for module in model.modules() if module._forward_hooks)


def _pvae(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


SMALL = [
    "fit.epochs=none",
    "fit.steps=2",
    "fit.beta_warmup=0",
    "evaluate.after_training=false",
    "decoder.channels=4",
    "prior.hidden=8",
    "prior.num_steps=4",
]


def test_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _pvae("train", "dvp-tiny", *SMALL, "--out", run)
    for options, name in {
        ("--temperature", 0.7): "samples-temperature-0.7",
        ("--temperature-sweep", "--num", 2): "temperature-sweep",
    }.items():
        printed = _pvae("sample", run, *options)
        assert printed.stdout.strip() == str(run / "figures" / f"{name}.png")
        assert printed.stderr == ""  # no terminal, no bar
    path, note = _pvae("sample", run, "--given", 3, "--num", 2).stdout.strip().split("\n")
    assert path == str(run / "figures" / "given.png")
    assert note.startswith("note      u of the drawn images is 0.")
    printed = json.loads(_pvae("sample", run, "--given", 3, "--num", 2, "--seed", 5, "--json").stdout)
    assert (printed["num"], printed["seed"], printed["options"]) == (2, 5, {})
    assert [row["label"] for row in printed["rows"]] == [
        f"valid {row['position']}" for row in printed["rows"]
    ]
    assert sorted(printed["low_pass"]) == ["between", "means", "rms", "rows"]
    assert len(printed["low_pass"]["rows"]) == 3
    refused = _pvae("sample", run, "--given", 3, "--labels", "0", code=2)
    assert "--labels and --given each make the rows of the picture" in refused.stderr
