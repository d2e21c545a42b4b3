"""The command: what it prints and writes, its exit codes, and a run that is interrupted and goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import pvae
from pvae.data import MissingData
from pvae.experiments import Spec, bench, jobs
from pvae.experiments.cli import app
from pvae.experiments.registry import PARTS
from pvae.experiments.spec import recipes

SMALL = [
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "evaluate.num_particles=30",
    "evaluate.limit=20",
]


def _pvae(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def _refused(*arguments: object, code: int = 2) -> str:
    """What stands on standard error of a command that fails: one sentence, and nothing on standard output."""
    result = _pvae(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("pvae: ")
    return result.stderr.removeprefix("pvae: ").strip()


def _process(*arguments: object, cwd: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from pvae.experiments.cli import main; main()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("cli") / "small"
    _pvae("train", "vae", *SMALL, "fit.steps=4", "--out", path)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_version_and_help() -> None:
    assert _pvae("--version").stdout.startswith(f"pvae {pvae.__version__} (torch {torch.__version__}")
    text = _pvae("--help").stdout
    assert all(command in text for command in ("list", "train", "evaluate", "sample", "explain", "bench"))


def test_list_names_recipes_data_and_parts() -> None:
    text = _pvae("list").stdout
    for name in (*recipes(), "digits", "two_moons", *(kind for kinds in PARTS.values() for kind in kinds)):
        assert re.search(rf"(^|\s){re.escape(name)}(,|\s|$)", text), name
    assert re.search(r"normal +standard normal, no parameters \(default\)", text)
    listed = json.loads(_pvae("list", "--json").stdout)
    assert listed["recipes"]["vae"] == "Gaussian VAE on 8x8 digits"
    assert set(listed["parts"]["prior"]) == set(PARTS["prior"])
    assert "mnist" in listed["data"]


def test_train_ends_with_figures_and_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = _pvae("train", "vae", *SMALL, "fit.steps=3", "--seed", 5)
    run, threads, *figures, estimate = result.stdout.splitlines()
    assert threads == "threads   1 (as OMP_NUM_THREADS says)"
    assert re.fullmatch(r"run +runs/vae-5: 3 steps in \d+\.\d s, finished", run)
    assert [Path(line.split()[-1]).name for line in figures] == [
        "losses.png",
        "reconstructions.png",
        "samples.png",
    ]
    assert re.match(r"test +log p\(x\) >= -\d+\.\d\d ± \d+\.\d\d nats .* on 20 data, .* k-hat > ", estimate)
    assert result.stderr == ""  # no bar where nobody watches
    assert (tmp_path / "runs" / "vae-5" / "spec.toml").is_file()


def test_train_prints_notes(tmp_path: Path) -> None:
    changes = ["fit.steps=1", "fit.objective=iwae", "evaluate.after_training=false"]
    result = _pvae("train", "vae", *SMALL, *changes, "--out", tmp_path / "run")
    assert "note      with one particle 'iwae' is the ELBO" in result.stdout
    assert "log p(x)" not in result.stdout


def test_train_json(tmp_path: Path) -> None:
    result = _pvae("train", "vae", *SMALL, "fit.steps=2", "--out", tmp_path / "run", "--json")
    printed = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert printed["steps"] == 2
    assert printed["stopped"] == "finished"
    assert printed["last"]["step"] == 2
    assert all(Path(path).is_file() for path in printed["figures"])
    assert printed["evaluation"]["num_data"] == 20
    assert "per_datum" not in printed["evaluation"]


@pytest.mark.usefixtures("threads")
def test_train_takes_a_file_a_device_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text(
        "[data]\nname = 'digits'\n[fit]\nsteps = 1\n[evaluate]\nafter_training = false\n"
    )
    _pvae("train", "my.toml", "--device", "cpu", "--threads", 1, "encoder.hidden=[4]")
    assert "hidden = [4]" in Path("runs/my-0/spec.toml").read_text()
    assert json.loads(Path("runs/my-0/manifest.json").read_text())["threads"] == 1


REFUSALS = {
    "train vea": "there is no recipe 'vea': did you mean 'vae'?",
    "train vae fit.epoch=3": "unknown key fit.epoch: did you mean 'epochs'?",
    "train vae nonsense": "an override must read key=value",
    "train vae prior=vmap": "unknown [prior] kind 'vmap': did you mean 'vamp'?",
    "train vae data.binarize=none": "needs x in {0, 1}, but digits comes as x in [0, 1]: set data.binarize",
    "train vae data.binarise=none": "did you mean 'binarize'?",
    "train vae data.binarize=sometimes": "binarize must be 'default', 'dynamic'",
    "train vae fit.batch_size=0": "[fit] batch_size must",
    "train vae --device warp9": "--device must name a device of this machine, such as cpu, got 'warp9'",
    "train vae --resume": "there is no run to resume in runs/vae-0",
    "train vae --resume --force": "--resume goes on with a run and --force deletes it: give one of the two",
    "train vae-mnist --data-root nowhere": "mnist needs",
    "evaluate nowhere": "there is no run folder nowhere",
    "sample nowhere": "there is no run folder nowhere",
    "explain nowhere": "there is no recipe 'nowhere'",
    "bench smal": "benchmark must be one of small",
}


@pytest.mark.parametrize("command", list(REFUSALS))
def test_bad_input_is_one_sentence(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert REFUSALS[command] in _refused(*command.split())
    assert not list(tmp_path.rglob("*.toml"))


def test_an_existing_run_is_refused(run: Path) -> None:
    assert "already holds a run" in _refused("train", "vae", *SMALL, "--out", run)
    assert "already holds a run" in _refused("train", run)


def test_divergence_is_a_failure(tmp_path: Path) -> None:
    changes = ["fit.steps=60", "fit.lr=1e30", "fit.ema=none", "fit.schedule=none", "fit.log_every=1"]
    sentence = _refused("train", "vae", *SMALL, *changes, "--out", tmp_path / "run", code=1)
    assert "became non-finite at step" in sentence


def test_evaluate(copy: Path) -> None:
    result = _pvae("evaluate", copy, "--num-particles", 40, "--limit", 7, "--split", "valid", "--seed", 3)
    assert re.match(r"valid +log p\(x\) >= .*IWAE-40 on 7 data", result.stdout)
    assert result.stderr == ""
    settings = json.loads((copy / "evaluation.json").read_text())[-1]["settings"]
    assert settings == {"split": "valid", "limit": 7, "num_particles": 40, "seed": 3, "proposal": "own"}


def test_evaluate_json_and_batch_size(copy: Path) -> None:
    one, two = (
        json.loads(_pvae("evaluate", copy, "--json", "--batch-size", size).stdout) for size in (3, 300)
    )
    assert one["log_likelihood"] == pytest.approx(two["log_likelihood"], abs=1e-5)
    assert one["split"] == "test"
    assert one["num_particles"] == 30
    assert {"standard_error", "monte_carlo_error", "elbo", "khat_share", "protocol"} <= set(one)


def test_evaluate_refuses_an_unknown_split(run: Path) -> None:
    assert "evaluate.split must be 'train', 'valid' or 'test'" in _refused("evaluate", run, "--split", "tset")


def test_sample(copy: Path, tmp_path: Path) -> None:
    assert _pvae("sample", copy).stdout.strip() == str(copy / "figures" / "samples.png")
    out = tmp_path / "new" / "s.png"
    printed = json.loads(_pvae("sample", copy, "--num", 5, "--seed", 2, "--out", out, "--json").stdout)
    assert printed == {
        "run": str(copy),
        "num": 5,
        "seed": 2,
        "options": {},
        "rows": [],
        "figure": str(out),
    }
    assert out.read_bytes().startswith(b"\x89PNG")


SEES_LABELS = ["model=conditional", "decoder.label_dim=4", "fit.steps=2", "evaluate.after_training=false"]
SPRITES = ["data=sprites", "data.num_train=2000", "data.valid=60", "data.num_test=1"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a conditional model with a flow prior on classes, not to be changed."""
    path = tmp_path_factory.mktemp("cli") / "classes"
    _pvae("train", "vae", *SMALL, *SEES_LABELS, "prior=conditional_flow", "--out", path)
    return path


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a conditional model on attributes, not to be changed."""
    path = tmp_path_factory.mktemp("cli") / "attributes"
    _pvae("train", "vae", *SMALL, *SEES_LABELS, *SPRITES, "--out", path)
    return path


def test_sample_by_label(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.png"
    asked = ["--labels", "0..9", "--out", out, "--json"]
    printed = json.loads(_pvae("sample", labelled, *asked, "--sampling", "paper").stdout)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert printed["options"] == {"sampling": "paper"}
    assert [row["label"] for row in printed["rows"]] == [str(digit) for digit in range(10)]
    assert [row["y"] for row in printed["rows"]] == [[digit] * 8 for digit in range(10)]
    assert sum(row["rate"] for row in printed["rows"]) == pytest.approx(1)


def test_sample_by_attribute(sprites: Path, tmp_path: Path) -> None:
    out = tmp_path / "attributes.png"
    asked = ["--attributes", "striped=1,filled=0", "--attributes", "rare", "--num", 3]
    printed = json.loads(_pvae("sample", sprites, *asked, "--out", out, "--json").stdout)
    assert out.read_bytes().startswith(b"\x89PNG")
    first, *others = printed["rows"]
    assert first["label"] == "striped=1, filled=0"
    assert first["rate"] == pytest.approx(0.036, abs=0.02)  # the sampling table's
    assert [(y[3], y[2]) for y in first["y"]] == [(1, 0)] * 3
    assert "bordered=1, dotted=1" in [row["label"] for row in others]
    assert all(row["rate"] < 0.005 for row in others)


def test_sample_of_a_conditional_model_has_labels_of_the_data(labelled: Path, tmp_path: Path) -> None:
    asked = ["--num", 12, "--out", tmp_path / "s.png", "--json"]
    (row,) = json.loads(_pvae("sample", labelled, *asked).stdout)["rows"]
    assert len(row["y"]) == 12
    assert set(row["y"]) <= set(range(10))
    assert (labelled / "figures" / "samples.png").is_file()  # drawn at the end of training too


def test_sample_at_a_scale(tmp_path: Path) -> None:
    run = tmp_path / "codes"
    changes = ["fit.steps=2", "evaluate.after_training=false", "autoencoder.epochs=1"]
    _pvae("train", "x-vae-digits", *SMALL, *changes, "--out", run)
    for options, name in {
        ("--scale", 0.5): "samples-scale-0.5",
        ("--scale", 0, "--scale-mode", "global"): "samples-scale-0-global",
        ("--scale-sweep", "--num", 2): "scale-sweep",
    }.items():
        assert _pvae("sample", run, *options).stdout.strip() == str(run / "figures" / f"{name}.png")
    printed = json.loads(_pvae("sample", run, "--scale-sweep", "--json").stdout)
    assert [row["scale"] for row in printed["rows"]] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert "kind 'conditional', but this run's is 'x_vae'" in _refused("sample", run, "--labels", "0")


BAD_SAMPLES = {
    "plain --scale 0.5": "--scale needs a model of kind 'x_vae', but this run's is 'vae'",
    "plain --labels 0..9": "--labels needs a model of kind 'conditional', but this run's is 'vae'",
    "labelled --labels 0..10": "digits has no label '10': choose from 0 to 9",
    "labelled --labels 3..": "--labels must read such as 0..9 or 0,9, got '3..'",
    "labelled --sampling exakt": "unknown --sampling 'exakt': did you mean 'exact'?",
    "labelled --attributes dotted=1": "the labels of digits are classes: use --labels, not --attributes",
    "sprites --labels 0": "the labels of sprites are attributes: use --attributes, not --labels",
    "sprites --attributes bordred=1": "sprites has no attribute 'bordred': did you mean 'bordered'?",
    "sprites --attributes bordered=2": "attribute bordered must be 0 or 1, got '2'",
    "sprites --attributes bordered": "--attributes must read such as round=1,dotted=0, got 'bordered'",
}


@pytest.mark.parametrize("command", list(BAD_SAMPLES))
def test_what_cannot_be_sampled_is_one_sentence(
    command: str, run: Path, labelled: Path, sprites: Path
) -> None:
    where, *options = command.split()
    folder = {"plain": run, "labelled": labelled, "sprites": sprites}[where]
    assert _refused("sample", folder, *options) == BAD_SAMPLES[command]


def test_explain_recipe_and_run(run: Path) -> None:
    assert "prior       p(z) = N(z; 0, I)" in _pvae("explain", "vae").stdout
    assert "latent      z ∈ ℝ²" in _pvae("explain", run).stdout
    changed = json.loads(_pvae("explain", "vae", "prior=vamp", "prior.components=5", "--json").stdout)
    assert "K = 5 pseudoinputs" in changed["text"]
    assert changed["parameters"]["prior"] == 5 * 64
    assert changed["spec"]["prior"]["components"] == 5


def test_explain_without_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise MissingData("not here")

    monkeypatch.setattr(Spec, "load_data", missing)
    result = _pvae("explain", "vampprior-mnist")
    assert "K = 500 pseudoinputs" in result.stdout
    assert "parameters  " not in result.stdout
    assert result.stderr == "pvae: without its data a spec is explained without sizes: not here\n"


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def run_bench(**options: Any) -> list[dict[str, object]]:
        asked.update(options)
        return [{"benchmark": "small"}]

    monkeypatch.setattr(bench, "run_bench", run_bench)
    monkeypatch.setattr(bench, "format_table", lambda rows: f"{len(rows)} rows")
    assert _pvae("bench").stdout == "1 rows\n"
    assert asked == {
        "device": "cpu",
        "rounds": 11,
        "names": None,
        "engines": None,
        "threads": 1,
        "out": None,
    }
    arguments = ["small", "conv", "--rounds", 3, "--engine", "graph", "--out", tmp_path / "b.json", "--json"]
    assert json.loads(_pvae("bench", *arguments).stdout) == {"rows": [{"benchmark": "small"}]}
    assert asked["names"] == ("small", "conv")
    assert asked["engines"] == ("graph",)
    assert asked["out"] == tmp_path / "b.json"


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(jobs, "sample", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        _pvae("sample", run)


def test_exit_codes_of_a_real_process(tmp_path: Path) -> None:
    process = _process("train", "vae", "fit.epoch=1", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "pvae: unknown key fit.epoch: did you mean 'epochs'?\n"


def test_interrupted_training_is_kept_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    # With a constant learning rate the total number of steps does not change any step.
    changes = [*SMALL, "fit.schedule=none", "fit.log_every=1", "evaluate.after_training=false"]
    process = _process("train", "vae", *changes, "fit.steps=1000000", cwd=tmp_path)
    metrics = tmp_path / "runs" / "vae-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert (
        err == "pvae: interrupted, the last checkpoint is kept: go on with  pvae train runs/vae-0 --resume\n"
    )
    folder = tmp_path / "runs" / "vae-0"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    taken = json.loads((folder / "checkpoints" / "last.json").read_text())["step"]
    assert taken > 0
    assert "is interrupted: this is its last checkpoint" in _pvae("evaluate", folder).stderr

    _pvae("train", folder, "--resume", f"fit.steps={taken + 7}")
    _pvae("train", "vae", *changes, f"fit.steps={taken + 7}", "--out", tmp_path / "whole")
    resumed, whole = (_final_parameters(path) for path in (folder, tmp_path / "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [row["loss"] for row in _metrics(folder)] == [row["loss"] for row in _metrics(tmp_path / "whole")]


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "fit", interrupted)
    out = tmp_path / "with space"
    sentence = _refused("train", "vae", *SMALL, "--out", out, "--device", "cpu", code=130)
    command = f"pvae train '{out}' --resume --device cpu"
    assert sentence == f"interrupted, before the first checkpoint: go on with  {command}"
    monkeypatch.undo()
    assert "finished" in _pvae("train", out, "--resume", "fit.steps=2", "--device", "cpu").stdout


def test_an_interruption_before_training_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Spec, "load_data", interrupted)
    sentence = _refused("train", "vae", "--out", tmp_path / "run", code=130)
    assert sentence == "interrupted before training began"
    assert _refused("explain", "vae", code=130) == "interrupted"


def _final_parameters(folder: Path) -> dict[str, torch.Tensor]:
    pointer = json.loads((folder / "checkpoints" / "final.json").read_text())
    return load_file(folder / "checkpoints" / pointer["file"])


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
