"""How many threads a job takes, and what is handed to the model and the picture when it samples."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.data import Data
from pvae.experiments import SpecError, figures, jobs
from pvae.experiments.jobs import sample, train, use_threads, use_threads_of
from pvae.experiments.runs import OpenRun, RunFolder
from pvae.experiments.sampling import SCALES, Wanted, held_out_labels
from pvae.experiments.spec import load_spec
from pvae.inference import Run, Team, fit
from pvae.inference.threads import Threads


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Measured:
    """Stands in for a measurement: notes what it is asked about, and finds three threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(jobs, "measure_threads", self)

    def __call__(self, *asked: Any) -> Threads:
        self.asked.append(asked)
        return Threads(3, "measured: a step takes 1.0 ms on 3")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


SHORT = ["encoder.hidden=[4]", "decoder.hidden=[4]", "fit.steps=2", "evaluate.after_training=false"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_pictures", lambda *_: [])


def test_threads_are_measured_on_a_batch_of_the_spec(measured: Measured) -> None:
    spec = load_spec("vae", ["fit.batch_size=32", "fit.objective=iwae", "fit.num_particles=5"])
    data = spec.load_data()
    program = spec.build(data)
    state = torch.get_rng_state()
    found = use_threads(program, spec, data)
    assert found.number == torch.get_num_threads() == 3
    assert torch.equal(torch.get_rng_state(), state)
    ((model, guide, (x,), objective),) = measured.asked
    assert (model, guide) == program
    assert x.shape == (32, 1, 8, 8)
    assert (objective.kind, objective.num_particles) == ("iwae", 5)


def test_a_conditional_program_is_measured_with_labels(measured: Measured) -> None:
    spec = load_spec("cvae-nf-digits")
    data = spec.load_data()
    use_threads(spec.build(data), spec, data)
    ((*_, (x, y), _),) = measured.asked
    assert len(x) == len(y)


def test_of_two_stages_the_first_is_measured() -> None:
    """The prior of the second is not fitted yet: without the first, nothing could be measured."""
    spec = load_spec("x-vae-digits", ["fit.batch_size=8"])
    data = spec.load_data()
    program = spec.build(data)
    found = use_threads(program, spec, data)
    assert found.reason.startswith(("measured: ", "there is one core"))


@pytest.mark.parametrize(
    ("threads", "changes", "environment", "number"),
    [
        (5, [], "", 5),
        (None, ["fit.threads=4"], "", 4),
        (5, ["fit.threads=4"], "", 5),
        (None, ["fit.threads=4"], "2", 4),
        (None, [], "2", 2),
    ],
)
def test_a_number_that_is_given_holds(
    threads: int | None,
    changes: list[str],
    environment: str,
    number: int,
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    spec = load_spec("vae", changes)
    data = spec.load_data()
    assert use_threads(spec.build(data), spec, data, threads).number == number
    assert torch.get_num_threads() == number
    assert not measured.asked


def test_on_a_gpu_and_in_one_of_several_processes_nothing_is_measured(measured: Measured) -> None:
    spec = load_spec("vae")
    data = spec.load_data()
    program = spec.build(data)
    assert use_threads(program, spec, data, device=torch.device("cuda")).number == 2
    assert use_threads(program, spec, data, team=Team(rank=1, size=2, group=object())).number == 2
    assert not measured.asked


def test_what_cannot_be_run_is_not_measured_but_said_when_it_is_trained(tmp_path: Path) -> None:
    spec = load_spec("vae", [*SHORT, "fit.objective=iwae", "fit.free_bits=0.5"])
    data = spec.load_data()
    assert use_threads(spec.build(data), spec, data) == Threads(2, "as torch has it")
    with pytest.raises(SpecError, match="free_bits needs a KL term"):
        train(spec, tmp_path / "run")


@pytest.mark.usefixtures("undrawn")
def test_a_run_says_its_threads_and_keeps_them_when_it_is_resumed(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    trained = train(load_spec("vae", SHORT), folder.path, progress=False)
    assert str(trained.threads) == "3 (measured: a step takes 1.0 ms on 3)"
    manifest = folder.read_manifest()
    assert (manifest["threads"], manifest["threads_because"]) == (3, "measured: a step takes 1.0 ms on 3")

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = []

    def watched(*args: Any, **settings: Any) -> Run:
        seen.append(torch.get_num_threads())
        return fit(*args, **settings)

    monkeypatch.setattr(jobs, "fit", watched)
    longer = load_spec(folder.path, ["fit.steps=4"])
    trained = train(longer, folder.path, resume=True, progress=False)
    assert seen == [3]
    assert str(trained.threads) == "3 (as in the run that is resumed)"
    assert len(measured.asked) == 1
    assert folder.read_manifest()["threads"] == 3
    assert folder.read_manifest()["threads_because"] == manifest["threads_because"]

    with pytest.raises(SpecError, match="threads must be 3, as in the run that is resumed, got 2"):
        train(longer, folder.path, resume=True, threads=2, progress=False)
    assert folder.read_manifest()["steps"] == 4


def test_a_run_is_judged_on_the_threads_of_its_training(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(load_spec("vae").load_data(), tmp_path)
    run.folder.update_manifest(threads=3)
    for cores, threads, environment, number in (
        (8, None, "", 3),
        (1, None, "", 1),
        (8, 4, "", 4),
        (8, None, "5", 5),
    ):
        torch.set_num_threads(5)
        monkeypatch.setattr(jobs, "available_threads", lambda cores=cores: cores)
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
        use_threads_of(run, threads)
        assert torch.get_num_threads() == number
    assert not measured.asked


class _Recorder(nn.Module):
    """Notes what it is asked for."""

    conditional = True

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Identity()
        self.asked: list[dict[str, Any]] = []

    def sample(
        self, n: int, y: Tensor | None = None, mean: bool = False, sampling: str = "exact", scale: float = 1.0
    ) -> Tensor:
        self.asked.append({"n": n, "y": y, "mean": mean, "sampling": sampling, "scale": scale})
        self.asked[-1]["noise"] = torch.rand(()).item()
        return torch.full((n, 1, 8, 8), 0.5)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_spec("vae").load_data()


def _run(data: Data, path: Path) -> OpenRun:
    return OpenRun(RunFolder(path), load_spec("vae"), data, _Recorder(), nn.Identity())


def test_rows_of_labels_meet_the_same_noise(digits: Data, tmp_path: Path) -> None:
    run = _run(digits, tmp_path)
    drawn = sample(run, Wanted(num=3, seed=4, labels="2,5", sampling="paper"))
    assert drawn.path == tmp_path / "figures" / "labels-paper.png"
    assert drawn.path.is_file()
    asked = run.model.asked
    assert [(each["n"], each["y"].tolist(), each["mean"]) for each in asked] == [
        (3, [2, 2, 2], True),
        (3, [2, 2, 2], False),
        (3, [5, 5, 5], True),
        (3, [5, 5, 5], False),
    ]
    assert {each["sampling"] for each in asked} == {"paper"}
    torch.manual_seed(4)
    assert {each["noise"] for each in asked} == {torch.rand(()).item()}


def test_a_sweep_meets_the_same_noise(digits: Data, tmp_path: Path) -> None:
    run = _run(digits, tmp_path)
    sample(run, Wanted(num=2, scale_sweep=True), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").is_file()
    asked = run.model.asked
    assert [each["scale"] for each in asked if each["mean"]] == list(SCALES)
    assert len({each["noise"] for each in asked}) == 1


def test_without_a_wish_labels_are_those_of_held_out_data(digits: Data, tmp_path: Path) -> None:
    run = _run(digits, tmp_path)
    drawn = sample(run)
    assert drawn.path == tmp_path / "figures" / "samples.png"
    assert [each["n"] for each in run.model.asked] == [64, 64]
    for each in run.model.asked:
        assert torch.equal(each["y"], held_out_labels(digits, 64))


def test_pictures_show_the_range_of_the_data(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = []

    def labelled_grid(means: Mapping[str, Tensor], path: Path, *_: object, **options: Any) -> Path:
        ranges.append((list(means), options["bounds"]))
        return path

    monkeypatch.setattr(figures, "labelled_grid", labelled_grid)
    sample(_run(digits, tmp_path), Wanted(labels="7"))
    counts = load_spec("vae", ["data.binarize=none", "data.scale=count", "likelihood=poisson"]).load_data()
    sample(_run(counts, tmp_path), Wanted(labels="7"))
    assert ranges == [(["7"], (0.0, 1.0)), (["7"], (0.0, 16.0))]
