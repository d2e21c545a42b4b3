"""Run folders: what is in them, the way back to the program, and refusals in one sentence."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pvae
from pvae.experiments import RunError, Spec, SpecError, load_spec, open_run, runs
from pvae.experiments.jobs import evaluate, sample, train
from pvae.experiments.runs import RunFolder
from pvae.experiments.sampling import Wanted
from pvae.experiments.spec import Evaluate
from pvae.files import unsealed_text
from pvae.inference import NonFiniteLoss

SMALL = [
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "evaluate.num_particles=30",
    "evaluate.limit=20",
]


def _spec(*overrides: str) -> Spec:
    return load_spec("vae", [*SMALL, "fit.steps=4", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "small"
    train(_spec(), path, progress=False)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_what_is_in_a_run_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "spec.toml", "manifest.json", "metrics.jsonl", "checkpoints", "evaluation.json", "figures",
    }  # fmt: skip
    assert load_spec(run) == _spec()
    assert {path.name for path in (run / "figures").iterdir()} == {
        "losses.png", "reconstructions.png", "samples.png",
    }  # fmt: skip


def test_manifest(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["steps"] == 4
    assert manifest["seconds"] > 0
    assert manifest["seed"] == 0
    assert manifest["versions"]["pvae"] == pvae.__version__
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"pyro", "numpy", "python", "safetensors"} <= set(manifest["versions"])
    assert manifest["device"]["type"] == "cpu"
    assert manifest["threads"] == torch.get_num_threads()
    assert manifest["data"]["hash"] == _spec().load_data().protocol.hash
    assert len(manifest["data"]["sha256"]) == 64
    assert manifest["git"] is None or len(manifest["git"]["commit"]) == 40


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_manifest_names_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@x.org", "-c", "core.hooksPath=/dev/null"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "runs.py"
    source.write_text("first")
    monkeypatch.setattr(runs, "__file__", str(source))
    git("init", "--quiet")
    assert runs.environment(torch.device("cpu"))["git"] is None  # not a file of the repository
    git("add", "runs.py")
    git("commit", "--quiet", "-m", "first")
    assert runs.environment(torch.device("cpu"))["git"] == {
        "commit": git("rev-parse", "HEAD"),
        "changed": False,
    }
    source.write_text("second")
    assert runs.environment(torch.device("cpu"))["git"]["changed"] is True


def test_open_run_gives_the_trained_program_back(tmp_path: Path) -> None:
    spec = _spec("evaluate.after_training=false", "fit.ema=none")
    trained = train(spec, tmp_path / "run", progress=False)
    opened = open_run(tmp_path / "run")
    assert opened.spec == spec
    for ours, theirs in ((opened.model, trained.run.model), (opened.guide, trained.run.guide)):
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
        assert not torch.equal(next(ours.parameters()), next(spec.build(opened.data).model.parameters()))


def test_evaluation_after_training_is_that_of_the_opened_run(run: Path) -> None:
    first = RunFolder(run).read_evaluations()[-1]
    opened = open_run(run)
    # Twenty data, spread evenly over the 300 of the test part.
    where = torch.tensor([i * 299 // 19 for i in range(20)])
    assert first["num_data"] == 20
    again = pvae.log_likelihood(opened.model, opened.guide, opened.data.test[where], num_particles=30)
    assert first["log_likelihood"] == pytest.approx(again.mean, abs=1e-9)
    assert first["protocol"]["hash"] == again.to_dict()["protocol"]["hash"]
    assert first["protocol"]["hash"] != opened.data.test.protocol.hash
    assert first["text"].startswith("log p(x) >= ")


def test_evaluations_are_kept_by_their_settings(copy: Path) -> None:
    opened = open_run(copy)
    for settings in ({"limit": 5}, {"limit": 5, "split": "valid"}, {"limit": 5}):
        evaluate(opened, Evaluate.model_validate({"num_particles": 30, **settings}), progress=False)
    kept = [record["settings"] for record in opened.folder.read_evaluations()]
    assert [(s["split"], s["limit"]) for s in kept] == [("test", 20), ("valid", 5), ("test", 5)]


def test_sampling_goes_where_it_is_asked_to(copy: Path, tmp_path: Path) -> None:
    opened = open_run(copy)
    before = (copy / "figures" / "samples.png").read_bytes()
    assert sample(opened, Wanted(num=4), tmp_path / "x" / "four.png").path == tmp_path / "x" / "four.png"
    assert (copy / "figures" / "samples.png").read_bytes() == before
    assert sample(opened, Wanted(num=4)).path == copy / "figures" / "samples.png"
    assert (copy / "figures" / "samples.png").read_bytes() != before


def test_a_run_is_not_overwritten(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(RunError, match="already holds a run: go on with --resume, start afresh with --force"):
        train(_spec(), copy, progress=False)
    assert (copy / "manifest.json").read_bytes() == before


def test_force_deletes_the_run_and_nothing_else(copy: Path) -> None:
    (copy / "thoughts.txt").write_text("mine")
    train(_spec("fit.steps=3", "evaluate.after_training=false"), copy, force=True, progress=False)
    assert (copy / "thoughts.txt").read_text() == "mine"
    assert RunFolder(copy).read_manifest()["steps"] == 3
    assert not (copy / "evaluation.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_other_folders_and_files_are_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(RunError, match="is in the way and is not a run folder"):
            train(_spec(), tmp_path / name, force=force, progress=False)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_resume_goes_on_and_may_be_longer(copy: Path) -> None:
    trained = train(_spec("fit.steps=6"), copy, resume=True, progress=False)
    assert trained.run.steps == 6
    assert load_spec(copy).fit.arguments()["steps"] == 6
    assert RunFolder(copy).read_manifest()["steps"] == 6


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("z_dim=3", "has z_dim = 2, not 3"),
        ("prior=mixture", "has prior.kind = 'normal', not 'mixture'"),
        ("fit.seed=1", "has fit.seed = 0, not 1"),
        ("data.binarize=static", "has data.binarize = 'dynamic', not 'static'"),
    ],
)
def test_resume_refuses_another_spec(run: Path, override: str, sentence: str) -> None:
    with pytest.raises(RunError, match=f"{sentence}: resume it as it is, or choose another --out"):
        train(_spec(override), run, resume=True, progress=False)


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run to resume in"):
        train(_spec(), tmp_path / "none", resume=True, progress=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (["likelihood=normal"], SpecError, r"\[likelihood\] kind = 'normal' needs"),
        (["fit.batch_size=5000"], SpecError, r"\[fit\] batch_size must"),
        (["fit.optimizer=adamm"], SpecError, r"\[fit\] optimizer must be adam"),
        (["fit.lr=-1"], SpecError, r"\[fit\] lr must be positive"),
        (["data.valid=0"], pvae.data.DataError, "digits has no valid part"),
    ],
)
def test_a_refused_spec_leaves_no_folder(
    tmp_path: Path, overrides: list[str], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        train(_spec("evaluate.split=valid", *overrides), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    spec = _spec("fit.steps=60", "fit.lr=1e30", "fit.ema=none", "fit.schedule=none", "fit.log_every=1")
    with pytest.raises(NonFiniteLoss, match="became non-finite at step"):
        train(spec, tmp_path / "run", progress=False)
    assert RunFolder(tmp_path / "run").read_manifest()["status"] == "failed"


def _no_checkpoint(path: Path) -> None:
    shutil.rmtree(path / "checkpoints")


def _cut_checkpoint(path: Path) -> None:
    for file in (path / "checkpoints").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10])


def _no_spec(path: Path) -> None:
    (path / "spec.toml").unlink()


def _damaged_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def _other_data(path: Path) -> None:
    folder = RunFolder(path)
    folder.update_manifest(data=folder.read_manifest()["data"] | {"hash": "0123456789ab"})


def _other_program(path: Path) -> None:
    text = unsealed_text((path / "spec.toml").read_text())
    (path / "spec.toml").write_text(text.replace("z_dim = 2", "z_dim = 3"))


def _gone(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_gone, "there is no run folder"),
        (_no_spec, "is not a run folder: it has no spec.toml"),
        (_no_checkpoint, "has no checkpoint yet: train it with --resume"),
        (_cut_checkpoint, "cannot be opened: .* is damaged"),
        (_damaged_manifest, "manifest.json is damaged: it is not JSON"),
        (_other_data, "was trained on protocol 0123456789ab, but digits is now"),
        (_other_program, "cannot be opened: .* but model has another"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_in_one_sentence(copy: Path, damage: object, sentence: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(RunError, match=sentence) as caught:
        open_run(copy)
    assert "\n" not in str(caught.value)
