"""The command under torchrun: several processes train and evaluate one run, and speak with one voice."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # wrapping a module for several processes imports it: once for all children

from pvae.experiments.jobs import evaluate, train
from pvae.experiments.program import SpecError
from pvae.experiments.runs import RunFolder, open_run
from pvae.experiments.spec import load_spec
from pvae.inference import Trainer

from ..inference.processes import Command, as_torchrun

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported torch"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]

TINY = [
    "z_dim=2",
    "encoder.hidden=[8]",
    "decoder.hidden=[8]",
    "evaluate.num_particles=5",
    "evaluate.limit=40",
]
SMALL = [*TINY[:3], "fit.steps=6", "fit.batch_size=16", "evaluate.num_particles=40", "evaluate.limit=70"]


def sentences(ended: Command) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("pvae: ")]


def per_datum(folder: Path) -> list[Any]:
    return [record["per_datum"] for record in RunFolder(folder).read_evaluations()]


def test_two_processes_train_evaluate_and_print_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = as_torchrun(["train", "vae", *SMALL, "--out", str(out), "--threads", "1"], tmp_path)
    assert ended.exitcodes == [0, 0], ended.err
    assert ended.out.count("6 steps") == 1
    assert ended.out.count("IWAE-40 on 70 data") == 1
    folder = RunFolder(out)
    assert folder.read_manifest()["processes"] == 2
    assert folder.read_manifest()["status"] == "finished"
    assert len(folder.read_metrics()) == 1
    together = per_datum(out)
    # One process finds the bytes that both found together, and the same command finds them again.
    run = open_run(out)
    evaluate(run, load_spec(out).evaluate, progress=False)
    assert per_datum(out) == together
    again = as_torchrun(["evaluate", str(out), "--json", "--seed", "1"], tmp_path)
    assert again.exitcodes == [0, 0], again.err
    assert json.loads(again.out)["num_data"] == 70
    assert len(per_datum(out)) == 2


BAD: dict[str, tuple[list[str], int, str]] = {
    "override": (["train", "vae", "fit.epoch=3"], 2, "unknown key fit.epoch"),
    "option": (["train", "vae", "--no-such-option"], 2, "No such option"),
    "batch": (["train", "vae", "fit.steps=2", "fit.batch_size=15"], 2, "divisible by the 2 processes"),
    "command": (
        ["diagnose", "somewhere"],
        2,
        "pvae: diagnose runs in one process: start it without torchrun",
    ),
    "run": (["evaluate", "nowhere"], 2, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, code, said = BAD[name]
    ended = as_torchrun(arguments, tmp_path)
    assert ended.exitcodes == [code, code]
    assert ended.err.count(said) == 1, ended.err
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("runs/*/spec.toml"))


def after_steps(number: int, rank: int, sent: signal.Signals | None) -> Any:
    """Let one process be sent a signal, or fail, after a step."""
    step = Trainer.step

    def stepping(self: Trainer, batch: Any) -> None:
        step(self, batch)
        if self.step_count == number and self.team.rank == rank:
            if sent is None:
                raise AttributeError("a mistake of ours")
            os.kill(os.getpid(), sent)

    def prepare() -> None:
        Trainer.step = stepping  # type: ignore[method-assign]  # in a process that ends with the command

    return prepare


def test_a_signal_to_one_ends_all_with_a_checkpoint_and_the_way_on(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    arguments = ["train", "vae", *TINY, "fit.epochs=30", "fit.batch_size=64", "--out", out]
    ended = as_torchrun(arguments, tmp_path, prepare=after_steps(5, 1, signal.SIGTERM))
    assert ended.exitcodes == [130, 130], ended.err
    assert len(sentences(ended)) == 1
    assert f"go on with  torchrun --nproc-per-node 2 -m pvae train {out} --resume" in ended.err
    assert RunFolder(Path(out)).read_manifest()["status"] == "interrupted"
    resumed = as_torchrun(["train", out, "--resume", "fit.epochs=2"], tmp_path)
    assert resumed.exitcodes == [0, 0], resumed.err
    assert RunFolder(Path(out)).read_manifest()["status"] == "finished"
    # One process would go on to other draws.
    with pytest.raises(
        SpecError, match="number of processes must be 2, as in the run that is resumed, got 1"
    ):
        train(load_spec(out, ["fit.epochs=3"]), Path(out), resume=True, progress=False)


def test_a_killed_process_ends_the_others_with_one_sentence(tmp_path: Path) -> None:
    arguments = ["train", "vae", *TINY, "fit.batch_size=15", "--out", str(tmp_path / "run")]
    ended = as_torchrun(arguments, tmp_path, size=3, prepare=after_steps(5, 1, signal.SIGKILL))
    assert ended.exitcodes == [1, -signal.SIGKILL, 1], ended.err
    assert sentences(ended) == [
        "pvae: another process of the run is gone: it was killed, or its machine is lost"
    ]
    assert "Traceback" not in ended.err


def test_a_mistake_in_one_process_is_one_traceback(tmp_path: Path) -> None:
    arguments = ["train", "vae", *TINY, "fit.batch_size=16", "--out", str(tmp_path / "run")]
    ended = as_torchrun(arguments, tmp_path, prepare=after_steps(5, 1, None))
    assert ended.exitcodes == [1, 1], ended.err
    assert ended.err.count("Traceback") == 1, ended.err
    assert ended.err.count("AttributeError: a mistake of ours") == 1
    assert sentences(ended) == []


# A first stage, targets that were estimated once, a diffusion and its calibration.
RECIPES: dict[str, list[str]] = {
    "x-vae-digits": [*TINY, "fit.steps=3", "autoencoder.epochs=1"],
    "divae-synthetic": ["fit.steps=3"],
    "dvp-tiny": ["fit.steps=3", "evaluate.num_particles=2", "evaluate.limit=40"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_several_stages_run_in_two_processes(name: str, tmp_path: Path) -> None:
    changes = [*RECIPES[name], "fit.batch_size=16", "evaluate.num_particles=4", "evaluate.limit=40"]
    out = tmp_path / "run"
    ended = as_torchrun(["train", name, *changes, "--out", str(out), "--threads", "1"], tmp_path)
    assert ended.exitcodes == [0, 0], ended.err
    assert RunFolder(out).read_manifest()["status"] == "finished"
    together = per_datum(out)
    evaluate(open_run(out), load_spec(out).evaluate, progress=False)
    assert per_datum(out) == together
