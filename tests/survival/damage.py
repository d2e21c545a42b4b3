"""Damage one file of a run, use the run, and judge: the same result, or one sentence that names the file.

By hand, for instance::

    python -m tests.survival.damage --trials 300
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from pvae.experiments.cli import app

__all__ = ["COMMANDS", "KINDS", "Run", "files_of", "main", "make", "trial"]

SMALL = ["z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]", "evaluate.num_particles=4"]
SMALL += ["evaluate.limit=10", "fit.checkpoint_every=0", "fit.log_every=3", "fit.steps=12"]


class Run(NamedTuple):
    """A sound run and what the commands make of it.

    Attributes:
        path: Its folder; it is copied, not used.
        results: What each command gives, by its name.
    """

    path: Path
    results: dict[str, Any]


def flip(path: Path, chance: random.Random) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    """Cut the end off."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def empty(path: Path, chance: random.Random) -> None:
    """Leave nothing in it."""
    path.write_bytes(b"")


def remove(path: Path, chance: random.Random) -> None:
    """Remove it."""
    path.unlink()


def into_folder(path: Path, chance: random.Random) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    function.__name__: function for function in (flip, cut, empty, remove, into_folder)
}
"""What can happen to a file, by name."""


def _final(path: Path) -> Any:
    final = json.loads((path / "checkpoints" / "final.json").read_text())
    return final["sha256"], (path / "metrics.jsonl").read_bytes()


def _resume(path: Path) -> list[str]:
    return ["train", str(path), "--resume", "evaluate.after_training=false"]


def _likelihood(path: Path) -> Any:
    record = json.loads((path / "evidence" / "likelihood.json").read_text())
    return record["result"], record["text"]


# The command for a run at a path, and what is compared afterwards.
COMMANDS: dict[str, tuple[Callable[[Path], list[str]], Callable[[Path, str], Any]]] = {
    "evaluate": (lambda path: ["evaluate", str(path)], lambda path, out: out),
    "resume": (_resume, lambda path, out: _final(path)),
    "sample": (
        lambda path: ["sample", str(path), "--out", str(path / "new.png")],
        lambda path, out: (path / "new.png").read_bytes(),
    ),
    "report": (
        lambda path: ["report", str(path), "--out", str(path / "new.html")],
        lambda path, out: (path / "new.html").read_text(),
    ),
    "diagnose": (
        lambda path: ["diagnose", str(path), "--only", "likelihood"],
        lambda path, out: _likelihood(path),
    ),
}
"""Commands by name."""

# Without these a page says what is missing, which is no damage: they are made by other commands.
_MADE_LATER = ("evidence/", "evaluation.json", "figures/", "report.html")


def make(folder: Path) -> Run:
    """Train and judge a small run, and note what each command gives on a copy of it."""
    path = folder / "run"
    for arguments in (
        ["train", "vae", *SMALL, "--out", str(path)],
        ["diagnose", str(path), "--only", "likelihood"],
        ["report", str(path)],
    ):
        _invoke(arguments, 0)
    results = {}
    for name, (command, result) in COMMANDS.items():
        copy = _copy(path)
        results[name] = result(copy, _invoke(command(copy), 0)[0])
    return Run(path, results)


def files_of(run: Path) -> Iterator[str]:
    """Names of all files of a run, in their order."""
    for path in sorted(run.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(run))


def trial(run: Run, file: str, kind: str, command: str, chance: random.Random) -> str | None:
    """Damage a file of a copy, run a command, and return what is wrong with its answer, ``None`` if nothing.

    Args:
        run: The sound run.
        file: Name of the file.
        kind: What happens to it.
        command: Name of the command.
        chance: Chooses the place.
    """
    copy = _copy(run.path)
    KINDS[kind](copy / file, chance)
    arguments, result = COMMANDS[command]
    out, err, code, error = _run(arguments(copy))
    if error is not None and not isinstance(error, SystemExit):
        return f"a traceback: {type(error).__name__}: {error}"
    if any(not re.fullmatch(r"pvae: [^\n]+", line) for line in err.splitlines()):
        return f"more than a sentence: {err}"
    if code == 0:
        found = result(copy, out)
        if found == run.results[command]:
            return None
        if command == "report" and kind == "remove" and file.startswith(_MADE_LATER):
            return None
        if command == "resume" and kind == "remove" and file == "metrics.jsonl" and file in err:
            return None if found[0] == run.results[command][0] else "other weights"
        return f"another result, and {err or 'nothing said'}"
    if code not in (1, 2) or err.count("\n") != 1:
        return f"exit code {code} with {err!r}"
    # A pointer may be named by what it points to, and the other way round.
    named = (Path(file).name, Path(file).stem) if file.startswith("checkpoints/") else (Path(file).name,)
    if not any(name in err for name in named) and not (file.startswith("checkpoints/") and ".json" in err):
        return f"the file is not named: {err}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Try files, kinds of damage and commands at random; return 0 if every answer was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    chance, wrong, told = random.Random(asked.seed), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        run = make(Path(temporary))
        files = list(files_of(run.path))
        for _ in range(asked.trials):
            file, kind, command = (chance.choice(list(one)) for one in (files, KINDS, COMMANDS))
            problem = trial(run, file, kind, command, chance)
            told[kind] += 1
            if problem is not None:
                wrong += 1
                sys.stdout.write(f"{kind} {file}, {command}: {problem}\n")
    sys.stdout.write(f"{asked.trials} trials ({dict(told)}), {wrong} wrong answers\n")
    return int(wrong > 0)


def _copy(run: Path) -> Path:
    path = run.with_name("copy")  # always the same: a page holds the path of its run
    shutil.rmtree(path, ignore_errors=True)
    return Path(shutil.copytree(run, path))


def _invoke(arguments: list[str], code: int) -> tuple[str, str]:
    out, err, found, error = _run(arguments)
    if found != code:
        raise RuntimeError(f"{' '.join(arguments)} must end with {code}, but: {err}") from error
    return out, err


def _run(arguments: list[str]) -> tuple[str, str, int, BaseException | None]:
    result = CliRunner().invoke(app, arguments)
    return result.stdout, result.stderr, result.exit_code, result.exception


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
