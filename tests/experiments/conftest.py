"""A run that was judged, part by part, with the least sizes: for tests that read it and leave it as it is."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pvae.experiments import evidence, jobs, load_spec, open_run
from pvae.experiments.evidence import Budget, Part
from pvae.experiments.jobs import train
from pvae.experiments.runs import OpenRun

TINY = [
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "fit.steps=60",
    "evaluate.num_particles=30",
    "evaluate.limit=40",
]


class LeastPace(evidence._Pace):
    """Cuts every size to its least value, at no cost."""

    @classmethod
    def measured(cls, run: OpenRun, parts: object, budget: Budget) -> "LeastPace":
        limits: Mapping[str, int] = {"data": len(run.data.test)}
        return cls(0.0, 2.0**-20, budget, limits)

    def seconds(self, part: Part) -> float:
        return 0.0


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Train without the pictures at the end, which take ten times as long as the few steps of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_pictures", lambda *_: [])
        yield


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the sizes of all parts in one test."""
    monkeypatch.setattr(evidence, "_Pace", LeastPace)


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run."""
    path = tmp_path_factory.mktemp("judged") / "tiny"
    train(load_spec("vae", TINY), path, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_Pace", LeastPace)
        evidence.judge(open_run(path), progress=False)
    return path
