"""How many threads a job takes, and what is handed to the model and the picture when it samples."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvae.data import Data
from pvae.experiments import figures
from pvae.experiments.jobs import SMALL_PASS, sample, use_threads
from pvae.experiments.runs import OpenRun, RunFolder
from pvae.experiments.sampling import SCALES, Wanted, held_out_labels
from pvae.experiments.spec import load_spec


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("hidden", "expected"), [(16, 1), (2000, 2)])
def test_a_small_step_takes_one_thread(hidden: int, expected: int) -> None:
    spec = load_spec(
        "vae", [f"encoder.hidden=[{hidden}]", f"decoder.hidden=[{hidden}]", "fit.batch_size=1297"]
    )
    program = spec.build(spec.load_data())
    weights = sum(p.numel() for module in program for p in module.parameters())
    assert (weights * 1297 < SMALL_PASS) == (expected == 1)
    use_threads(program, spec)
    assert torch.get_num_threads() == expected


def test_a_number_that_is_given_holds() -> None:
    spec = load_spec("vae")
    use_threads(spec.build(spec.load_data()), spec, 2)
    assert torch.get_num_threads() == 2


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
