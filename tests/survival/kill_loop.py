"""Kill training at random moments, resume it, and compare the end with an uninterrupted run, byte by byte.

By hand, for instance::

    python -m tests.survival.kill_loop --kills 160 --out experiments/results/survival.json
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .worker import Moment, Worker

__all__ = ["SMOKE", "Killed", "Smoke", "fingerprint", "kill_and_resume", "main", "table", "whole"]

_TINY = ["z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]
_SHORT = ["fit.steps=12", "fit.log_every=2", "fit.checkpoint_every=0", "evaluate.num_particles=4"]
_SHORT += ["evaluate.limit=10"]
# What writes a file for good: a moment at one of them lies within a checkpoint, or another file.
_WRITES = ("os:replace", "os:fsync")
_FILES = re.compile(r"step-[-0-9a-f]+\.safetensors")


@dataclass(frozen=True)
class Smoke:
    """A recipe at the least size.

    Attributes:
        recipe: Its name.
        changes: Overrides.
        moments: Moments of its own that random ones would rarely meet.
    """

    recipe: str
    changes: tuple[str, ...]
    moments: tuple[Moment, ...] = ()


def _smoke(recipe: str, *changes: str, moments: Sequence[Moment] = ()) -> Smoke:
    at_end = (
        Moment("pvae.experiments.jobs:_pictures"),  # between the last checkpoint and the evaluation
        Moment("pvae.experiments.jobs:log_likelihood", when="after"),  # within the evaluation
    )
    return Smoke(recipe, (*_SHORT, *changes), (*moments, *at_end))


SMOKE: dict[str, Smoke] = {
    "vae": _smoke("vae", *_TINY),
    # Past the step from which a recipe is traced: killed on either side of it, and begun again before it.
    "vae-traced": _smoke(
        "vae",
        *_TINY,
        "fit.steps=150",
        "fit.log_every=5",
        moments=[Moment("pvae.inference.engine:record"), Moment("pvae.inference.trainer:Trainer.step", 120)],
    ),
    "vae-patience": _smoke(
        "vae", *_TINY, "fit.epochs=30", "fit.batch_size=400", "fit.lr=0.1", "fit.patience=2"
    ),
    "x-vae-digits": _smoke(
        "x-vae-digits",
        *_TINY,
        "autoencoder.epochs=1",
        "prior.components=2",
        moments=[
            Moment("pvae.inference.trainer:Trainer.step", 5),  # within the autoencoder's training
            Moment("pvae.experiments.stages:collect_codes"),  # between the stages
        ],
    ),
    "cvae-nf-digits": _smoke("cvae-nf-digits", *_TINY, "prior.num_flows=2", "prior.hidden=8"),
    "five-digits": _smoke("five-digits", *_TINY),
    "divae-synthetic": _smoke(
        "divae-synthetic",
        "data.num_train=400",
        moments=[
            Moment("pvae.density.target:DensityTarget.__post_init__"),  # the density is estimated, not kept
            Moment("pvae.density.target:write_atomically"),
            Moment("pvae.density.target:write_atomically", when="after"),
        ],
    ),
    "dvp-tiny": _smoke(
        "dvp-tiny",
        "decoder.channels=4",
        "prior.hidden=8",
        "prior.num_steps=5",
        moments=[Moment("pvae.inference.loop:calibrate_diffusion")],  # after the last checkpoint
    ),
}
"""What the loop trains, by name."""


@dataclass
class Killed:
    """What happened to a recipe.

    Attributes:
        runs: Runs that were killed at least once and went on to their end.
        kills: Kills, by what chose the moment.
        different: Files in which a run differs from the uninterrupted one, or what else went wrong.
        seconds: Wall time, of the uninterrupted run and of all.
    """

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "runs": self.runs,
            "kills": self.kills.total(),
            "moments": dict(sorted(self.kills.items())),
            "different": self.different,
            "seconds": {"uninterrupted": round(self.seconds[0], 1), "all": round(self.seconds[1], 1)},
        }


def whole(worker: Worker, smoke: Smoke, folder: Path) -> tuple[float, dict[str, int]]:
    """Train without an interruption; return the seconds it took and how often it called what writes."""
    began = time.monotonic()
    ended = worker.run("train", smoke.recipe, *smoke.changes, "--out", folder, counted=_WRITES)
    if ended.code:
        raise RuntimeError(f"{smoke.recipe} must train, but said: {ended.stderr}")
    return time.monotonic() - began, ended.counts


def kill_and_resume(
    worker: Worker, smoke: Smoke, folder: Path, moments: Iterator[Moment | float | None]
) -> tuple[list[Moment | float], str | None]:
    """Train, kill, resume, until the run is finished.

    Args:
        worker: Runs the command.
        smoke: The recipe.
        folder: The run's folder.
        moments: When each process is killed: a moment of its own, after so many seconds, or not at all.

    Returns:
        The moments at which a process was really killed, and what went wrong, if anything did.
    """
    kills: list[Moment | float] = []
    while True:
        start = (smoke.recipe, *smoke.changes, "--out", folder)
        arguments = (folder, "--resume") if (folder / "spec.toml").exists() else start
        moment = next(moments)
        child = worker.start("train", *arguments, moment=moment if isinstance(moment, Moment) else None)
        if isinstance(moment, float):
            _kill(child, moment)
        ended = worker.end()
        if ended.killed and moment is not None:
            kills.append(moment)
        elif ended.code:
            return kills, f"exit code {ended.code}: {ended.stderr.strip()}"
        else:
            return kills, None


def _kill(child: int, seconds: float) -> None:
    """Kill a child after so many seconds; its number may be another process' by then, its descriptor not."""
    try:
        descriptor = os.pidfd_open(child)
    except ProcessLookupError:
        return
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest every file of a run without what only a clock knows.

    Manifests hold times and versions alone, and are left out; of evaluations the seconds are; and so is the
    checkpoint before the last one, which depends on when the run was broken off.
    """
    found = {}
    before = {path for checkpoints in folder.rglob("checkpoints") for path in _before_last(checkpoints)}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == "manifest.json" or path in before:
            continue
        content = path.read_bytes()
        if name == "evaluation.json":
            records = json.loads(content)
            for record in records:
                del record["seconds"], record["check"]
            content = json.dumps(records).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _before_last(checkpoints: Path) -> set[Path]:
    """The pointer to the checkpoint before the last one, and the files that it alone names."""
    named = {path.stem: set(_FILES.findall(path.read_text())) for path in checkpoints.glob("*.json")}
    alone = named.pop("previous", set()).difference(*named.values())
    return {checkpoints / name for name in ("previous.json", *alone)}


def _moments(smoke: Smoke, seconds: float, counts: dict[str, int], chance: random.Random) -> Iterator[Any]:
    """Moments for ever: in turns one of the recipe's own, one of time, and two within writing."""
    own = list(smoke.moments)
    chance.shuffle(own)
    while True:
        if own:
            yield own.pop()
        yield chance.uniform(0.0, seconds)
        for _ in range(2):
            name = chance.choice(_WRITES)
            whens = ["before", "after", *(["half", "half"] if name == "os:fsync" else [])]
            yield Moment(name, chance.randint(1, max(1, counts[name] // 2)), chance.choice(whens))


def _label(moment: Moment | float) -> str:
    if isinstance(moment, float):
        return "at a random time"
    if moment.of in _WRITES:
        return f"{moment.when} {moment.of.replace(':', '.')}"
    return f"{moment.when} {moment.of.partition(':')[2]}"


def loop(worker: Worker, name: str, kills: int, folder: Path, seed: int, until: float) -> Killed:
    """Kill a recipe so many times, or until the time is over, and compare every run that came to its end."""
    smoke, found, began = SMOKE[name], Killed(), time.monotonic()
    seconds, counts = whole(worker, smoke, folder / "whole")
    wanted = fingerprint(folder / "whole")
    chance = random.Random(f"{seed} {name}")
    endless = _moments(smoke, seconds, counts, chance)

    def moments() -> Iterator[Any]:
        """As many as are left, at most six for a run."""
        for _ in range(min(6, kills - found.kills.total())):
            yield next(endless)
        while True:
            yield None

    while found.kills.total() < kills and time.monotonic() < until:
        path = folder / "killed"
        shutil.rmtree(path, ignore_errors=True)
        hit, problem = kill_and_resume(worker, smoke, path, moments())
        found.kills.update(map(_label, hit))
        found.runs += bool(hit)
        if problem is not None:
            found.different.append(problem)
            break
        ours = fingerprint(path)
        odd = sorted(file for file in wanted.keys() | ours.keys() if wanted.get(file) != ours.get(file))
        if odd:
            said = ", ".join(map(_label, hit))
            found.different.append(f"{' '.join(odd)} after kills {said}")
            break
    found.seconds = (seconds, time.monotonic() - began)
    return found


def table(report: dict[str, Any]) -> str:
    """What happened to each recipe, as Markdown."""
    lines = [
        "| recipe | kills | of which while a file was written | runs | files that differ |",
        "|---|---|---|---|---|",
    ]
    rows = [*report["recipes"].items(), ("all", {**report, "different": ["?"] * report["different"]})]
    written = {
        name: sum(count for moment, count in row["moments"].items() if " os." in moment)
        for name, row in report["recipes"].items()
    }
    written["all"] = sum(written.values())
    lines += [
        f"| {name} | {row['kills']} | {written[name]} | {row['runs']} | {len(row['different'])} |"
        for name, row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop and write what happened; return 0 if every run was as the uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=SMOKE, default=list(SMOKE))
    parser.add_argument("--kills", type=int, default=160, help="kills in all, shared by the recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no run after so long")
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args(arguments)
    until = time.monotonic() + 60 * asked.minutes
    found: dict[str, Killed] = {}
    with tempfile.TemporaryDirectory() as temporary, Worker(Path(temporary)) as worker:
        for i, name in enumerate(asked.recipes):
            share = asked.kills // len(asked.recipes) + (i < asked.kills % len(asked.recipes))
            folder = Path(temporary) / name
            folder.mkdir()
            found[name] = loop(worker, name, share, folder, asked.seed, until)
            shutil.rmtree(folder)
            sys.stderr.write(f"{name}: {json.dumps(found[name].to_dict())}\n")
    import torch

    from pvae.experiments.runs import environment

    different = sum(len(one.different) for one in found.values())
    report = {
        "command": f"python -m tests.survival.kill_loop --kills {asked.kills} --seed {asked.seed}",
        "kills": sum(one.kills.total() for one in found.values()),
        "runs": sum(one.runs for one in found.values()),
        "different": different,
        "recipes": {name: one.to_dict() for name, one in found.items()},
        "environment": environment(torch.device("cpu")),
    }
    sys.stdout.write(table(report))
    if asked.out is not None:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
