"""Any damage to any file of a run: the same result, or one sentence; a longer loop is run by hand."""

import random
from pathlib import Path
from typing import Any

import pytest

from pvae import files

from .damage import COMMANDS, KINDS, Run, files_of, make, trial


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("damage"))


def test_the_run_has_every_kind_of_file(run: Run) -> None:
    suffixes = {Path(name).suffix for name in files_of(run.path)}
    assert suffixes == {".toml", ".json", ".jsonl", ".safetensors", ".png", ".html"}
    pointers = {f"checkpoints/{name}.json" for name in ("last", "previous", "best", "final")}
    assert pointers <= set(files_of(run.path))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_seen_or_does_no_harm(run: Run, kind: str) -> None:
    """Every file under every kind of damage, each with one command; which one is drawn."""
    chance = random.Random(kind)
    wrong = []
    for file in files_of(run.path):
        command = chance.choice(list(COMMANDS))
        problem = trial(run, file, kind, command, chance)
        if problem is not None:
            wrong.append(f"{kind} {file}, {command}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("spec.toml", "resume"),
        ("spec.toml", "evaluate"),
        ("manifest.json", "report"),
        ("metrics.jsonl", "report"),
        ("evaluation.json", "report"),
        ("evidence/likelihood.json", "report"),
        ("checkpoints/final.json", "sample"),
        ("checkpoints/last.json", "resume"),
    ],
)
def test_a_flipped_bit_changes_no_number(run: Run, file: str, command: str) -> None:
    """Of text, of which a flipped bit may leave another number that can be read."""
    chance = random.Random(file)
    for _ in range(2):
        assert trial(run, file, "flip", command, chance) is None


def test_a_trial_sees_a_wrong_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: where seals are not looked at, it finds another result."""
    monkeypatch.setattr(files, "unsealed", _without_a_look)
    monkeypatch.setitem(KINDS, "other", lambda path, chance: _replace(path))
    said = trial(run, "evaluation.json", "other", "report", random.Random(0))
    assert said is not None
    assert said.startswith("another result")


def _without_a_look(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "check"}


def _replace(path: Path) -> None:
    text = path.read_text()
    at = text.index('"log_likelihood": -') + len('"log_likelihood": -')
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
