"""Checkpoints: the last one, and the one before it, which takes its place where it is damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pvae import files
from pvae.data import Data, from_tensors
from pvae.files import Busy, WriteError, locked, sealed, unsealed
from pvae.inference import CheckpointError, Run, checkpoint, fit
from pvae.inference.checkpoint import CheckpointWarning, load, pointer, save

from .programs import LinearGuide, LinearModel

# Files of a run that an uninterrupted one has with the same bytes.
SAME = ("metrics.jsonl", "checkpoints/last.json", "checkpoints/previous.json", "checkpoints/final.json")


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(5)
    x = 0.4 * torch.randn(160, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return from_tensors(x[:120], valid=x[120:], name="linear")


def train(data: Data, out: Path, **settings: Any) -> Run:
    """Two epochs of six steps, a row and a checkpoint after every third."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"epochs": 2, "batch_size": 20, "lr": 1e-2, "log_every": 3, "ema": 0.9}
    defaults |= {"patience": 9, "checkpoint_every": 0, "progress": False}
    settings = {"model": LinearModel(), "guide": LinearGuide()} | defaults | settings
    return fit(data=data, out=out, **settings)


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(data, path)
    return path


@pytest.fixture(scope="module")
def cut(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after the third row, not to be changed."""
    path = tmp_path_factory.mktemp("cut") / "run"

    class Stop(Exception):
        pass

    def stop(run: Run, row: dict[str, float]) -> None:
        if row["step"] == 9:
            raise Stop

    with pytest.raises(Stop):
        train(data, path, callbacks=[stop])
    return path


@pytest.fixture
def copy(cut: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(cut, tmp_path / "copy"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _tensors(path: Path, which: str = "last") -> Path:
    return path / "checkpoints" / json.loads((path / "checkpoints" / f"{which}.json").read_text())["file"]


def _last_row(path: Path) -> Path:
    """Flip a bit in the third row, which the checkpoint before the last one does not count."""
    rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(rows[:-1]) + rows[-1].replace("0", "1", 1))
    return path / "metrics.jsonl"


def _damages() -> list[tuple[Callable[[Path], Any], str]]:
    last = "checkpoints/last.json"
    return [
        (lambda path: _flip(_tensors(path)), "is damaged: its checksum is not that in last.json"),
        (lambda path: _tensors(path).unlink(), "checkpoint must exist, but .*safetensors is missing"),
        (lambda path: _tensors(path).write_bytes(b""), "is damaged: its checksum is not that in last.json"),
        (lambda path: _flip(path / last), r"last\.json is damaged"),
        (lambda path: (path / last).write_text("{"), r"last\.json is damaged: it is not JSON"),
        (lambda path: (path / last).unlink(), r"last\.json is missing"),
        (_last_row, r"metrics\.jsonl is damaged: its rows are not those of last.json"),
    ]


@pytest.mark.parametrize(("damage", "said"), _damages(), ids=range(len(_damages())))
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_it(
    data: Data, whole: Path, copy: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(copy)
    with pytest.warns(CheckpointWarning, match=f"{said}.*: training goes on from the .*, at step 6"):
        train(data, copy, resume=True)
    for name in SAME:
        assert (copy / name).read_bytes() == (whole / name).read_bytes(), name
    files_of = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (copy, whole)]
    assert files_of[0] == files_of[1]


def test_a_damaged_best_is_found_before_it_was_the_best(data: Data, whole: Path, copy: Path) -> None:
    """At step 6 the best is of that step: both checkpoints need it, and the first one knows another best."""
    of_best = pointer(copy)["best_state"]
    assert of_best == pointer(copy, "previous")["best_state"]
    _flip(copy / "checkpoints" / of_best["file"])
    with pytest.raises(CheckpointError, match=r"is damaged.*, and there is no sound one before it"):
        train(data, copy, resume=True)
    # A run whose last checkpoint alone needs the damaged best goes on from the one before.
    shutil.rmtree(copy)
    shutil.copytree(whole, copy)
    assert pointer(copy)["best_state"] != pointer(copy, "previous")["best_state"]
    _flip(copy / "checkpoints" / pointer(copy)["best_state"]["file"])
    with pytest.warns(CheckpointWarning, match="at step 9"):
        train(data, copy, resume=True)
    for name in SAME:
        assert (copy / name).read_bytes() == (whole / name).read_bytes(), name


def test_rows_that_are_gone_are_said_and_do_not_change_the_parameters(
    data: Data, whole: Path, copy: Path
) -> None:
    (copy / "metrics.jsonl").unlink()
    with pytest.warns(CheckpointWarning, match=r"metrics\.jsonl is missing: .* rows before step 9"):
        train(data, copy, resume=True)
    assert pointer(copy, "final")["sha256"] == pointer(whole, "final")["sha256"]
    kept = (whole / "metrics.jsonl").read_text().splitlines()
    assert (copy / "metrics.jsonl").read_text().splitlines() == kept[3:]
    train(data, copy, resume=True)  # and are not missed again


def test_early_rows_that_are_damaged_are_refused(data: Data, copy: Path) -> None:
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.replace("0", "1", 1))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged.*delete it to go on without them"):
        train(data, copy, resume=True)


def test_the_one_before_is_not_the_last_one_twice(data: Data, whole: Path, tmp_path: Path) -> None:
    """A finished run that is resumed saves what is there, and keeps what was before."""
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    for _ in range(2):
        train(data, copy, resume=True)
        assert (pointer(copy, "previous")["step"], pointer(copy)["step"]) == (9, 12)
    for name in SAME:
        assert (copy / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_file_of_the_right_name_and_the_wrong_content_is_written_again(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(5.0)}
    save(tmp_path, "final", tensors, {"step": 1})
    _flip(_tensors(tmp_path, "final"))
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path, "final")
    save(tmp_path, "final", tensors, {"step": 1})
    assert torch.equal(load(tmp_path, "final")[0]["x"], tensors["x"])


def test_a_failed_save_leaves_the_checkpoint_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(value: float) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), value)}

    save(tmp_path, "last", number(1.0), {"step": 1}, previous="previous")
    folder = tmp_path / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, calls = os.replace, [0]
    for last in range(1, 4):  # tensors, the pointer to the one before, the pointer

        def full(source: Path, target: Path, last: int = last) -> None:
            calls[0] += 1
            if calls[0] == last:
                raise OSError(28, os.strerror(28))
            replace(source, target)

        calls[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(WriteError, match="No space left on device"):
                save(tmp_path, "last", number(2.0), {"step": 2}, previous="previous")
        assert load(tmp_path)[1]["step"] == 1
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: content for name, content in after.items() if name != "previous.json"} == before
    save(tmp_path, "last", number(2.0), {"step": 2}, previous="previous")
    assert [load(tmp_path, which)[1]["step"] for which in ("previous", "last")] == [1, 2]
    save(tmp_path, "last", number(3.0), {"step": 3}, previous="previous")
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_a_pointer_names_files_of_its_folder_alone(tmp_path: Path) -> None:
    save(tmp_path, "last", {"x": torch.ones(1)}, {"step": 1})
    path = tmp_path / "checkpoints" / "last.json"
    body = unsealed(json.loads(path.read_text()))
    for name in ("../../secret", "/etc/passwd", "step-1.safetensors", "", 3, None):
        path.write_text(json.dumps(sealed(body | {"file": name})))
        with pytest.raises(CheckpointError, match=r"last\.json is damaged"):
            load(tmp_path)
    for key in ("file", "sha256", "step"):
        path.write_text(json.dumps({name: value for name, value in body.items() if name != key}))
        with pytest.raises(CheckpointError, match=rf"last\.json is damaged: it has no '{key}'"):
            load(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_taken_up(data: Data, whole: Path, copy: Path) -> None:
    """Then pointers had no seal and said nothing of rows, and the best was read from its own pointer."""
    for path in (copy / "checkpoints").glob("*.json"):
        body = unsealed(json.loads(path.read_text()))
        body = {name: value for name, value in body.items() if name not in ("best_state", "rows_sha256")}
        path.write_text(json.dumps(body))
    train(data, copy, resume=True)
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert pointer(copy, "final") == pointer(whole, "final")


def test_two_do_not_train_in_one_folder(data: Data, copy: Path, tmp_path: Path) -> None:
    with (
        locked(copy / "checkpoints" / ".lock"),
        pytest.raises(Busy, match=f"another process is at work in {copy / 'checkpoints'} \\(process"),
    ):
        train(data, copy, resume=True)
    assert train(data, copy, resume=True).steps == 12
    # What is refused leaves nothing behind.
    with pytest.raises(ValueError, match="batch_size"):
        train(data, tmp_path / "new", batch_size=1000)
    with pytest.raises(ValueError, match="event_shape"):
        train(data, tmp_path / "new", model=LinearModel(x_dim=4))
    assert not list((tmp_path / "new").glob("*"))


def test_what_killed_writers_left_is_removed(data: Data, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_is_alive", lambda pid: pid == 7)
    folders = (copy, copy / "checkpoints")
    for folder in folders:
        for pid in (6, 7):
            (folder / f".last.json.{pid}.tmp").write_text("{")
    train(data, copy, resume=True)
    assert [[path.name for path in folder.glob(".*")] for folder in folders] == [[".last.json.7.tmp"]] * 2


def test_a_kill_between_the_best_and_the_last_goes_on_to_the_same_end(
    data: Data, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(out: Path, which: str, *args: Any, **kwargs: Any) -> Any:
        if which == "last" and args[1]["step"] == 12:
            raise Killed
        return saved(out, which, *args, **kwargs)

    saved = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", kill)
        with pytest.raises(Killed):
            train(data, tmp_path / "run")
    assert (pointer(tmp_path / "run", "best")["step"], pointer(tmp_path / "run")["step"]) == (12, 9)
    train(data, tmp_path / "run", resume=True)
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
