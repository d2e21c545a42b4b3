"""The command ``pvae diagnose``: its tables, its record, its pictures, and what it refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from typer.testing import CliRunner, Result

import pvae.data
from pvae.data import CorruptData, Data, DataError, MissingData, from_tensors
from pvae.evaluation import density_agreement, latent_scores
from pvae.experiments import SpecError, diagnosing, load_spec, open_run
from pvae.experiments.aligning import log_det_of_run
from pvae.experiments.cli import app
from pvae.experiments.diagnosing import Known, Wanted, density_of, diagnose, load_outside
from pvae.experiments.jobs import train
from pvae.experiments.runs import RunError, RunFolder
from pvae.inference.checkpoint import load as load_checkpoint
from pvae.priors import CouplingFlow

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "data=gaussian_mixture",
    "data.binarize=none",
    "data.num_train=400",
    "data.num_test=200",
    "data.valid=120",
    "likelihood=normal",
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "fit.steps=60",
    "fit.batch_size=64",
    "evaluate.after_training=false",
]
OTHER = "gaussian_mixture,components=3,radius=6,num_train=10,num_test=150"


def command(*arguments: object, code: int = 0) -> Result:
    """Run the command; of a diagnosis the part alone that this file is about."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--only", "latents"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object) -> str:
    result = command(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("pvae: ").strip()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    train(load_spec("vae", SMALL), folder / "plain", progress=False)
    given = [*SMALL, "model=conditional", "encoder.label_dim=4", "decoder.label_dim=4"]
    train(load_spec("vae", given), folder / "given", progress=False)
    digits = [
        "z_dim=2",
        "encoder.hidden=[8]",
        "decoder.hidden=[8]",
        "fit.steps=2",
        "evaluate.after_training=false",
    ]
    train(load_spec("vae", digits), folder / "digits", progress=False)
    return folder


@pytest.fixture
def plain(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "plain", tmp_path / "plain"))


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def test_with_data_from_elsewhere(plain: Path) -> None:
    result = command("diagnose", plain, "--ood", OTHER, "--ood", "two_moons", "--num-samples", 3)
    assert result.stderr == ""
    text = result.stdout
    for heading in (
        "prior against aggregate posterior",
        "coverage",
        "activity",
        "log p(z) against the density, z drawn",
        "log p(z) against the density, z at the mean",
        f"inside against {OTHER}",
        "inside against two_moons",
    ):
        assert f"\n{heading}\n" in f"\n{text}", heading
    assert "calibrated on 120 data of the valid part, false alarms counted on 200 other data" in text
    names = re.findall(r"^figure +(.*)$", text, re.MULTILINE)
    assert [Path(name).name for name in names] == [
        "alignment.png",
        "density.png",
        "ood-scores.png",
        "ood-roc.png",
        "conformal.png",
    ]
    for name in names:
        shown = pixels(Path(name))[..., :3]
        assert shown.shape[0] > 300
        assert 0.5 < (shown > 0.99).all(-1).mean() < 0.999  # light, and something on it
    record = json.loads((plain / "diagnosis.json").read_text())[-1]
    assert record["settings"]["ood"] == [OTHER, "two_moons"]
    assert {len(record["scores"][name]["per_datum"]["kl"]) for name in ("inside", OTHER)} == {200, 150}
    assert len(record["scores"]["calibration"]["per_datum"]["kl"]) == 120
    area = record["ood"][OTHER]["detectors"]["elbo"]["auroc"]["value"]
    assert area > 0.9  # components far outside
    assert f"{area:.3f}" in text
    assert record["density"]["drawn"]["num_data"] == 200


def test_figures_of_the_report_are_those_of_the_library(plain: Path) -> None:
    run = open_run(plain)
    found = diagnose(run, Wanted((OTHER,), num_samples=5, seed=3), progress=False)
    inside = latent_scores(*run.program, run.data.test, num_samples=5, seed=3)
    assert torch.equal(found.ood[OTHER].inside.elbo, inside.elbo)
    outside = pvae.data.load("gaussian_mixture", components=3, radius=6, num_train=10, num_test=150)
    there = latent_scores(*run.program, outside.test, num_samples=5, seed=5)
    assert torch.equal(found.ood[OTHER].outside.elbo, there.elbo)
    assert found.agreement is not None
    assert run.data.log_density is not None
    exact = run.data.log_density(run.data.test.x.double())
    assert found.agreement["at the mean"] == density_agreement(inside.log_p_mean, exact, seed=3)
    assert found.agreement["drawn"] == density_agreement(inside.log_p_draw, exact, seed=3)


def test_without_data_from_elsewhere_there_is_no_conformal_table(plain: Path) -> None:
    text = command("diagnose", plain, "--num-data", 30).stdout
    assert "prior against aggregate posterior" in text
    assert "units active" in text
    assert "AUROC" not in text
    assert "false alarms" not in text
    assert not (plain / "figures" / "conformal.png").exists()


def test_json_and_calibration_on_half_of_the_test_part(plain: Path) -> None:
    asked = ["--num-data", 50, "--num-particles", 4, "--calibration", "test"]
    result = command("diagnose", plain, "--ood", "two_moons", "--json", *asked)
    assert result.stdout.count("\n") == 1
    printed = json.loads(result.stdout)
    assert "per_datum" not in printed["scores"]["inside"]
    assert printed["scores"]["inside"]["num_data"] == printed["scores"]["two_moons"]["num_data"] == 50
    test = printed["ood"]["two_moons"]["detectors"]["log_prob"]["conformal"]
    assert (test["num_calibration"], test["num_inside"], test["num_outside"]) == (25, 25, 50)
    assert "calibration" not in printed["scores"]
    assert all(Path(path).is_file() for path in printed["figures"])
    assert "per_datum" in json.loads((plain / "diagnosis.json").read_text())[0]["scores"]["inside"]


def test_a_run_keeps_one_record_for_each_setting_and_none_of_an_earlier_run(plain: Path) -> None:
    folder = RunFolder(plain)
    assert folder.read_diagnoses() == []
    for seed, seconds in ((0, 1.0), (1, 2.0), (0, 3.0)):
        folder.add_diagnosis({"settings": {"seed": seed}, "seconds": seconds})
    assert [record["seconds"] for record in folder.read_diagnoses()] == [2.0, 3.0]
    folder.prepare(load_spec(plain), resume=False, force=True)
    assert not folder.diagnosis.exists()


def test_a_conditional_run_gives_data_from_elsewhere_a_label(runs: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(runs / "given", tmp_path / "given"))
    text = command("diagnose", path, "--ood", "two_moons", "--num-data", 60).stdout
    assert "Every datum, inside or outside, has the label of highest ELBO, not its own." in text
    record = RunFolder(path).read_diagnoses()[-1]
    assert record["scores"]["two_moons"]["conditional"]
    assert record["ood"]["two_moons"]["best_labels"]
    assert record["alignment"]["measures"]["c2st_with_y"]["value"] > 0
    # The density is compared under the data's own labels.
    run = open_run(path)
    test = run.data.test[torch.linspace(0, 199, 60, dtype=torch.float64).long()]
    own = latent_scores(*run.program, test)
    assert run.data.log_density is not None
    exact = run.data.log_density(test.x.double())
    expected = density_agreement(own.log_p_mean, exact).pearson.value
    assert record["density"]["at the mean"]["measures"]["pearson"]["value"] == pytest.approx(expected)


def test_data_on_a_plane_are_compared_with_their_density_in_it(tmp_path: Path) -> None:
    changes = [*SMALL, "data=embedded_mixture", "data.dim=6", "fit.steps=2"]
    train(load_spec("vae", changes), tmp_path / "run", progress=False)
    run = open_run(tmp_path / "run")
    found = diagnose(run, Wanted(num_samples=2), progress=False)
    assert found.agreement is not None
    plane = run.data.test.x.double() @ run.data.truth.rotation[:, :2]
    mixture = MixtureSameFamily(
        Categorical(torch.ones(4, dtype=torch.float64)),
        Independent(Normal(run.data.truth.means, run.data.truth.stds), 1),
    )
    own = latent_scores(*run.program, run.data.test, num_samples=2)
    expected = density_agreement(own.log_p_mean, mixture.log_prob(plane))
    for name in ("ks", "pearson", "offset"):
        value = getattr(expected, name).value
        assert getattr(found.agreement["at the mean"], name).value == pytest.approx(value, abs=1e-9)


THROUGH_FLOW = [
    "align=flow",
    "align.dim=2",
    "align.max_neighbors=40",
    "align.flow_layers=2",
    "align.flow_hidden=8",
    "prior=normal",
]


def _through_flow(path: Path, *changes: str) -> Path:
    """A short run that was aligned through a flow."""
    train(load_spec("vae", [*SMALL, *THROUGH_FLOW, "fit.steps=12", *changes]), path, progress=False)
    return path


def _by_hand(run: Any, train_u: Tensor, u: Tensor) -> Tensor:
    """The log-determinant of a kept flow of two dimensions, through the Jacobian of every datum."""
    state, _ = load_checkpoint(run.folder.path, "flow")
    flow = CouplingFlow(2, 2, hidden=8)
    flow.load_state_dict(state)
    transform = flow.double().condition(None)
    shift, scale = train_u.mean(0), train_u.std(0, correction=0)
    jacobians = [
        torch.autograd.functional.jacobian(lambda v: transform((v - shift) / scale), row) for row in u
    ]
    return torch.linalg.slogdet(torch.stack(jacobians)).logabsdet


def test_a_run_through_a_flow_is_scored_with_its_log_determinant_too(tmp_path: Path) -> None:
    path = _through_flow(tmp_path / "flow")
    run = open_run(path)
    found = diagnose(run, Wanted(num_data=50), progress=False)
    assert found.agreement is not None
    assert found.no_flow is None
    test = run.data.test[torch.linspace(0, 199, 50, dtype=torch.float64).long()]
    log_det = _by_hand(run, run.data.train.x.double(), test.x.double())
    assert log_det.std() > 0
    own = latent_scores(*run.program, test)
    assert run.data.log_density is not None
    exact = run.data.log_density(test.x.double())
    for at, s in (("drawn", own.log_p_draw), ("at the mean", own.log_p_mean)):
        assert found.agreement[at] == density_agreement(s, exact)
        ours = found.agreement[f"{at}, with log det"].measures()
        for name, wanted in density_agreement(s + log_det, exact).measures().items():
            assert ours[name].value == pytest.approx(wanted.value, abs=1e-6), name
    text = found.to_text()
    for what in ("log p(z)", "log p(z) + log det g'(u)"):
        for at in ("drawn", "at the mean"):
            assert f"\n{what} against the density, z {at}\n\n| {what} against the density |" in text
        assert f"\n| slope of {what} |" in text
    record = json.loads((path / "diagnosis.json").read_text())[-1]
    both = ["drawn", "at the mean"]
    assert list(record["density"]) == [*both, *(f"{at}, with log det" for at in both)]
    assert record["no_flow"] is None


@pytest.mark.parametrize("dim", [2, 5])
def test_the_embedding_of_a_known_density_is_found_again(dim: int, tmp_path: Path) -> None:
    data = [] if dim == 2 else ["data=embedded_mixture", "data.dim=5"]
    changes = [*data, "align.estimator=exact", "align.preset=released"]
    run = open_run(_through_flow(tmp_path / "flow", *changes))
    train_x, x = run.data.train.x.double(), run.data.test.x[:20]
    project = run.data.truth.project if dim == 5 else Tensor.double
    u = project(train_x)
    # (The released code leaves the units of u out.)
    wanted = _by_hand(run, u, project(x.double())) + u.std(0, correction=0).log().sum()
    torch.testing.assert_close(log_det_of_run(run, x), wanted, rtol=1e-6, atol=1e-6)


def test_a_flow_that_is_not_kept_or_damaged_is_said_and_kept_by_a_resumption(tmp_path: Path) -> None:
    path = _through_flow(tmp_path / "flow")
    pointer = path / "checkpoints" / "flow.json"
    kept = pointer.read_text()
    file = path / "checkpoints" / json.loads(kept)["file"]
    weights = file.read_bytes()
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    found = diagnose(open_run(path), Wanted(num_data=40), progress=False)
    assert found.no_flow is not None
    assert "is damaged: its checksum is not that in flow.json" in found.no_flow
    # As an earlier version left it.
    pointer.unlink()
    file.unlink()
    text = command("diagnose", path, "--num-data", 40).stdout
    said = f"{path} holds no flow, as training has not ended or was that of an earlier version: "
    assert f"log p(z) + log det g'(u) against the density\n\nnot scored: {said}pvae train {path}" in text
    assert "log p(z) against the density, z drawn" in text
    assert list(json.loads((path / "diagnosis.json").read_text())[-1]["density"]) == ["drawn", "at the mean"]
    train(load_spec(path), path, resume=True, progress=False)
    assert (pointer.read_text(), file.read_bytes()) == (kept, weights)


def test_runs_without_a_flow_keep_none(runs: Path, tmp_path: Path) -> None:
    path = _through_flow(tmp_path / "off", "align.gamma=0.0", "align.warmup=0.0", "fit.steps=2")
    for folder in (runs / "plain", path):
        assert not (folder / "checkpoints" / "flow.json").exists()
    with pytest.raises(RunError, match="was not aligned through a flow"):
        log_det_of_run(open_run(runs / "plain"), torch.zeros(1, 2))
    with pytest.raises(RunError, match="holds no flow"):
        log_det_of_run(open_run(path), torch.zeros(1, 2))


class _Target:
    """An estimate of the density of digits: minus their ink."""

    def log_prob(self, x: Tensor) -> Known:
        return Known(-x.flatten(1).sum(-1).double(), torch.full((len(x),), 2.0).double())


def test_a_density_target_is_scored_at_the_test_data(runs: Path, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(runs / "digits", tmp_path / "digits"))
    assert density_of(run) is None
    without = diagnose(run, Wanted(num_data=40), progress=False)
    assert without.agreement is None
    assert "against the density" not in without.to_text()
    found = diagnose(run, Wanted(num_data=40), target=_Target(), progress=False)
    assert found.agreement is not None
    assert found.agreement["drawn"].pull_std is not None
    ink = run.data.test.x[torch.linspace(0, 299, 40, dtype=torch.float64).long()].flatten(1).sum(-1)
    offset = float((found.agreement["drawn"].offset.value) - ink.mean())
    assert -6 < offset < 0  # log p(z) of two latents
    assert (tmp_path / "digits" / "figures" / "density.png").is_file()


def test_refusals(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_DATA", str(tmp_path))
    digits, plain = runs / "digits", runs / "plain"
    expected = {
        (digits, "mnits"): "--ood must name a data set, got 'mnits': did you mean 'mnist'?",
        (digits, "mnist"): "mnist needs",
        (digits, "digits"): "--ood digits must be other data than the run's own",
        (digits, "two_moons"): "--ood two_moons must have data of shape (1, 8, 8) as digits has, got (2,)",
        (plain, "digits"): "--ood digits must have data of shape (2,) as gaussian_mixture has, got (1, 8, 8)",
        (plain, "saddle"): "--ood saddle must have data of shape (2,) as gaussian_mixture has, got (3,)",
        (
            plain,
            "two_moons,noise",
        ): "an option of --ood must read key=value, such as components=4, got 'noise'",
        (plain, "two_moons,binarize=none"): "--ood takes binarize from the run, got 'binarize=none'",
        (plain, "two_moons,nois=0.1"): "did you mean 'noise'",
    }
    for (run, name), sentence in expected.items():
        assert sentence in refused("diagnose", run, "--ood", name), name
    assert "--calibration must be valid or test" in refused("diagnose", plain, "--calibration", "train")
    assert "there is no run folder" in refused("diagnose", tmp_path / "nowhere")
    assert not (plain / "diagnosis.json").exists()


def test_a_run_without_a_density_of_its_latents_is_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alignment_report(*_: object, **__: object) -> None:
        raise ValueError("guide site 'z' has only a surrogate density")

    monkeypatch.setattr(diagnosing, "alignment_report", alignment_report)
    assert "cannot be diagnosed: guide site 'z' has only a surrogate" in refused("diagnose", runs / "plain")


class _Sets:
    """Stands for the loader of files: sets of 8 x 8 whose values are as they are asked for, or are not."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, name: str, **keys: Any) -> Data:
        self.asked.append({"name": name, **keys})
        rng = np.random.default_rng(len(name))
        grey = torch.from_numpy(rng.integers(0, 17, (30, 1, 8, 8))).to(torch.uint8)
        bits = (grey > 8).float()
        if name == "mnist":
            raise MissingData("mnist needs a file")
        if name == "kmnist":
            raise CorruptData("kmnist is damaged")
        if name == "binarized_mnist":  # knows one binarisation
            if "binarize" in keys:
                raise DataError("binarize must be 'static'")
            return from_tensors(bits, test=bits, name=name)
        if name == "freyfaces":  # cannot be binarised at all
            if "binarize" in keys:
                raise DataError("binarize must be None")
            return from_tensors(grey, test=grey, levels=17, name=name)
        return from_tensors(grey, test=grey, levels=17, name=name, binarize=keys["binarize"])


def test_data_from_elsewhere_are_loaded_as_the_run_s_own_are(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sets = open_run(runs / "digits"), _Sets()
    monkeypatch.setattr(pvae.data, "load", sets)
    assert load_outside(run, "fashion_mnist").protocol.values == "binary"
    keys = {
        "binarize": "dynamic",
        "scale": "unit",
        "dequantize": False,
        "seed": 0,
        "root": None,
        "download": False,
    }
    assert sets.asked == [{"name": "fashion_mnist", **keys}]
    load_outside(run, "emnist", root=Path("there"), download=True)
    assert sets.asked[-1] == {
        "name": "emnist",
        "parts": "test",
        **keys,
        "root": Path("there"),
        "download": True,
    }
    load_outside(run, "omniglot,labels=character")
    assert sets.asked[-1] == {"name": "omniglot", "labels": "character", **keys}
    # Bits as they come are bits, whatever name their binarisation goes by.
    assert load_outside(run, "binarized_mnist").protocol.values == "binary"
    assert [asked.get("binarize") for asked in sets.asked[-2:]] == ["dynamic", None]
    with pytest.raises(
        SpecError, match="--ood freyfaces cannot be loaded as digits is: binarize must be None"
    ):
        load_outside(run, "freyfaces")
    with pytest.raises(MissingData, match="mnist needs a file"):
        load_outside(run, "mnist")
    with pytest.raises(CorruptData, match="kmnist is damaged"):
        load_outside(run, "kmnist")


def test_other_values_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(runs / "digits")

    def load(name: str, **_: object) -> Data:
        x = torch.rand(20, 1, 8, 8)
        return from_tensors(x, test=x, name=name)

    monkeypatch.setattr(pvae.data, "load", load)
    with pytest.raises(
        SpecError, match="--ood freyfaces must have binary values as digits has, got unit ones"
    ):
        load_outside(run, "freyfaces")
