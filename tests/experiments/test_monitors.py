"""The figures of a Jacobian posterior in a run folder: rows, picture, manifest and notes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvae.evaluation import jacobian_report
from pvae.experiments import figures, load_spec, monitors
from pvae.experiments.jobs import train
from pvae.experiments.runs import open_run

SMALL = ["z_dim=3", "encoder.hidden=[16]", "decoder.hidden=[16]", "evaluate.after_training=false"]
ROWS = [
    {
        "step": step,
        "surrogate/z": 1 - 1 / step,
        "five/health": 1 - 1.1 / step,
        "five/half_log_det": -8 - 30 / step,
        "five/half_log_det_surrogate": -7.5 - 10 / step,
        "five/inconsistency": 0.1 + 1 / step,
        "five/residual": 0.8 + 5 / step,
        "five/active": min(8, step // 4),
    }
    for step in range(2, 80)
]


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


def count(image: Any, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image[..., :3] * 255 - colour).max(-1) < 3).sum())


def test_the_picture_shows_every_figure(tmp_path: Path) -> None:
    image = pixels(monitors.jacobian_curves(ROWS, tmp_path / "new" / "j.png", "a title", z_dim=8))
    assert image.shape[1] > image.shape[0] > 600
    assert (image[..., :3] > 0.99).all(-1).mean() > 0.5
    # Blue in five panels of six, orange in the three of the upper row: take a figure out, and the ink goes.
    height, width = image.shape[0] // 2, image.shape[1] // 3
    parts = {
        (i, j): image[i * height : (i + 1) * height, j * width : (j + 1) * width]
        for i in range(2)
        for j in range(3)
    }
    blue, orange = (0x2F, 0x6F, 0xAB), (0xD9, 0x82, 0x2B)
    assert {where for where, part in parts.items() if count(part, blue) > 100} == set(parts) - {(0, 1)}
    assert {where for where, part in parts.items() if count(part, orange) > 100} == {(0, 0), (0, 1), (0, 2)}


def test_what_is_beyond_a_limit_is_grey(tmp_path: Path) -> None:
    def grey(rows: list[dict[str, float]]) -> float:
        image = pixels(monitors.jacobian_curves(rows, tmp_path / "j.png", z_dim=8))
        shaded = np.abs(image[..., :3] * 255 - (0xEF, 0xF0, 0xF3)).max(-1) < 4
        return float(shaded[image.shape[0] // 2 :, image.shape[1] // 3 : 2 * image.shape[1] // 3].mean())

    assert grey(ROWS) < 0.1
    assert grey([{**row, "five/residual": 20.0} for row in ROWS]) > 0.4


def test_one_row_is_drawn_and_none_is_refused(tmp_path: Path) -> None:
    assert pixels(monitors.jacobian_curves(ROWS[:1], tmp_path / "j.png", z_dim=8)).std() > 0.02
    with pytest.raises(ValueError, match="metrics must hold at least one row of a JacobianMonitor, got none"):
        monitors.jacobian_curves([{"step": 1, "loss": 2.0}], tmp_path / "j.png", z_dim=8)


@pytest.mark.parametrize("objective", ["five", "fif"])
def test_a_run_of_five_is_watched(tmp_path: Path, objective: str) -> None:
    spec = load_spec("five-digits", [*SMALL, "fit.epochs=20", f"posterior.objective={objective}"])
    trained = train(spec, tmp_path / "run", progress=False)
    rows = figures.read_metrics(trained.folder.metrics)
    assert [row["epoch"] for row in rows if "five/health" in row] == [float(k) for k in range(1, 21)]
    assert all("valid_loss" in row and "surrogate/z" in row for row in rows)
    names = [path.name for path in trained.pictures]
    assert names == ["losses.png", "jacobian.png", "reconstructions.png", "samples.png"]
    assert all(path.is_file() for path in trained.pictures)
    # The figures are those of the program that is kept, on sixteen data of the validation split.
    opened = open_run(tmp_path / "run")
    index = np.linspace(0, len(opened.data.valid) - 1, 16).astype(int).tolist()
    report = jacobian_report(opened.guide, opened.data.valid.x[index], warn=False)
    found = json.loads(trained.folder.manifest.read_text())["jacobian"]
    wanted = report.to_dict()
    assert found.pop("problems") == (problems := wanted.pop("problems"))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert problems  # after so few steps
    assert [note for note in trained.notes if note in problems] == problems
    # Going on from the end measures nothing twice and says the same.
    written = trained.folder.metrics.read_bytes()
    again = train(spec, tmp_path / "run", resume=True, progress=False)
    assert (again.notes, again.folder.metrics.read_bytes()) == (trained.notes, written)


def test_a_few_steps_are_not_judged_and_other_guides_not_watched(tmp_path: Path) -> None:
    for recipe, kept, pictures in (("five-digits", True, 1), ("vae", False, 0)):
        spec = load_spec(recipe, [*SMALL, "fit.epochs=1"])
        trained = train(spec, tmp_path / recipe, progress=False)
        rows = figures.read_metrics(trained.folder.metrics)
        assert any("five/health" in row for row in rows) == kept
        assert ("jacobian" in trained.folder.read_manifest()) == kept
        assert sum(path.name == "jacobian.png" for path in trained.pictures) == pictures
        assert not any("J G" in note for note in trained.notes)
