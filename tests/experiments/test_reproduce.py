"""Studies: cells that survive a kill, workers, intervals over seeds, tables, and the two papers' studies."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from pvae.data import Data, load
from pvae.evaluation import Combination
from pvae.experiments.cli import app
from pvae.experiments.program import SpecError
from pvae.experiments.reproduce import (
    STUDIES,
    Cell,
    Context,
    Ledger,
    Metrics,
    Record,
    Scale,
    Source,
    Study,
    plan,
    report,
    run,
)
from pvae.experiments.reproduce.cvae_nf import _rare
from pvae.experiments.reproduce.judge import held_out
from pvae.experiments.reproduce.measures import posterior, reconstructions
from pvae.experiments.reproduce.runner import _work
from pvae.experiments.reproduce.tables import Column, by_protocol, differences, interval, table
from pvae.experiments.runs import RunError
from pvae.experiments.spec import Spec, load_spec
from pvae.files import Busy, locked
from pvae.inference import NonFiniteLoss

ROOT = Path(__file__).parents[2]
T_2 = 4.302652729911275  # 97.5 % point of Student's t with two degrees of freedom, from a printed table


class Coins(Study):
    """A study that measures nothing: its cells leave a trace of when they ran, and may misbehave."""

    name = "coins"
    about = "What a coin is worth"
    scales = {  # noqa: RUF012
        "smoke": Scale((Source("digits", "vae", ("fit.epochs=1",), seconds=30.0),), (0, 1, 2), 10, 10, 10, 1)
    }

    def __init__(self, trouble: str = "", cell: str = "digits/tails/1") -> None:
        self.trouble, self.cell = trouble, cell

    def cells(self, scale: Scale) -> list[Cell]:
        source = scale.sources[0]
        return [
            Cell({"data": source.name, "side": side}, seed, source.recipe, source.overrides, source.seconds)
            for seed, side in itertools.product(scale.seeds, ("heads", "tails"))
        ]

    def measure(self, cell: Cell, spec: Spec, data: Data, context: Context) -> Metrics:
        with (context.out / "trace").open("a") as file:
            file.write(f"{cell.name} {os.getpid()} {torch.get_num_threads()}\n")
        if cell.name == self.cell:
            if self.trouble == "diverges":
                raise NonFiniteLoss("the loss became NaN at step 3")
            if self.trouble == "interrupted":
                raise KeyboardInterrupt
            if self.trouble == "bad input":
                raise SpecError("the coin is bent")
            if self.trouble == "fault":
                raise ZeroDivisionError("a fault of the code")
            if self.trouble == "slow":
                time.sleep(60)
        value = cell.seed + (10.0 if cell.factors["side"] == "tails" else 0.0)
        return {"value": value, "nothing": None}

    def tables(self, records: Sequence[Record]) -> list[str]:
        return [table(records, ("side",), (Column("value", "value"),), {"heads": "Heads"})]

    def figures(self, records: Sequence[Record], stem: Path, title: str) -> list[Path]:
        return []


def context_of(out: Path, study: Study | None = None) -> Context:
    return Context(out, (study or Coins()).scales["smoke"], torch.device("cpu"))


def trace(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "trace").read_text().splitlines()]


def record(value: float | None, seed: int = 0, protocol: str = "abc", **factors: str) -> Record:
    return Record(
        study="coins",
        scale="smoke",
        cell="/".join([*factors.values(), str(seed)]),
        key="k",
        factors=factors,
        seed=seed,
        metrics={"value": value},
        failure=None,
        protocol={"name": "digits", "hash": protocol},
        settings={"num_data": 10},
        seconds=1.0,
        environment={
            "git": None,
            "device": {"type": "cpu", "name": "chip"},
            "threads": 1,
            "versions": {"torch": "2"},
        },
    )


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, None, 6.0])
    # Mean 3, standard deviation sqrt(7), three values.
    assert found.mean == pytest.approx(3.0)
    assert found.half == pytest.approx(T_2 * (7 / 3) ** 0.5)
    assert found.n == 3


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),  # noqa: RUF001
        ([None], "–"),  # noqa: RUF001
        ([1234.567], "1235"),
        ([0.0123449], "0.01234"),
        ([1.0, 2.0, 6.0], "3.0 ± 6.6"),
        ([100.0, 200.0, 600.0], "300 ± 657"),
        ([2.0, 2.0], "2 ± 0"),
        ([0.5001, 0.5002, 0.5003], "0.50020 ± 0.00025"),
    ],
)
def test_numbers_show_the_digits_that_they_have(values: list[float | None], text: str) -> None:
    assert str(interval(values)) == text


def test_differences_are_paired_by_everything_else() -> None:
    """Seeds and encoders shift both levels alike: the effect of the prior is exact, without any spread."""
    records = [
        record(
            100.0 * seed + 7.0 * (encoder == "xy") + 3.0 * (prior == "flow"),
            seed,
            prior=prior,
            encoder=encoder,
        )
        for seed, encoder, prior in itertools.product(range(3), ("x", "xy"), ("normal", "flow"))
    ]
    found = differences(records, "prior", "normal", (Column("value", "value", 10.0),))
    assert {row: (f[0].mean, f[0].half, f[0].n) for row, f in found.items()} == {("flow",): (30.0, 0.0, 3)}
    apart = differences(records, "prior", "normal", (Column("value", "value"),), within=("encoder",))
    assert set(apart) == {("x", "flow"), ("xy", "flow")}


def test_differences_average_other_factors_before_the_interval() -> None:
    effects = {(0, "x"): 1.0, (0, "xy"): 3.0, (1, "x"): 2.0, (1, "xy"): 6.0, (2, "x"): 9.0, (2, "xy"): 9.0}
    records = [
        record(effects[seed, encoder] * (prior == "flow"), seed, prior=prior, encoder=encoder)
        for seed, encoder, prior in itertools.product(range(3), ("x", "xy"), ("normal", "flow"))
    ]
    (found,) = differences(records, "prior", "normal", (Column("value", "value"),))[("flow",)]
    # Seeds have 2, 4 and 9: mean 5, standard deviation sqrt(13).
    assert found.mean == pytest.approx(5.0)
    assert found.half == pytest.approx(T_2 * (13 / 3) ** 0.5)


def test_a_difference_needs_both_of_the_pair() -> None:
    records = [record(1.0, 0, prior="normal"), record(3.0, 0, prior="flow"), record(9.0, 1, prior="flow")]
    (found,) = differences(records, "prior", "normal", (Column("value", "value"),))[("flow",)]
    assert (found.mean, found.n) == (2.0, 1)


def test_different_protocols_and_sizes_never_share_a_table() -> None:
    one, other = record(1.0, side="heads"), record(2.0, protocol="def", side="heads")
    larger = replace(one, settings={"num_data": 20})
    groups = by_protocol([one, other, larger, replace(one, seed=1)])
    assert [len(group) for group in groups.values()] == [2, 1, 1]
    assert len({str(same) for same in groups}) == 3


def test_a_table_says_how_many_seeds_it_has() -> None:
    failed = replace(record(None, 1, side="heads"), metrics={}, failure="diverged")
    text = table(
        [record(1.0, side="heads"), failed, record(2.0, side="tails"), record(5.0, reference="real")],
        ("side",),
        (Column("value", "value, %", 100), Column("absent", "absent")),
        {"heads": "Heads"},
    )
    assert text.splitlines() == [
        "| side | seeds | value, % |",
        "|---|---|---|",
        "| Heads | 1 of 2 | 100 |",
        "| tails | 1 | 200 |",
    ]


def test_ledger_gives_back_what_was_appended(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.read() == []
    for i in range(3):
        ledger.append(record(None if i == 1 else float(i), seed=i, side="heads"))
    assert [r.metrics["value"] for r in ledger.read()] == [0.0, None, 2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.jsonl"]


def test_ledger_refuses_what_json_cannot_hold_and_keeps_the_rest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(record(1.0, side="heads"))
    with pytest.raises(ValueError, match="JSON"):
        ledger.append(record(float("nan"), seed=1, side="heads"))
    assert len(ledger.read()) == 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(record(1.0, side="heads"))
    ledger.path.write_text(ledger.path.read_text() + '{"study": "coi')
    with pytest.raises(RunError, match=r"line 2 of .*cells\.jsonl is damaged"):
        ledger.read()


def test_a_cell_runs_once(tmp_path: Path) -> None:
    study, context = Coins(), context_of(tmp_path)
    run(study, "smoke", context, only=["heads"], progress=False)
    assert trace(tmp_path) == ["digits/heads/0", "digits/heads/1", "digits/heads/2"]
    records = run(study, "smoke", context, progress=False)
    names = [cell.name for cell in study.cells(context.scale)]
    assert sorted(trace(tmp_path)) == sorted(names) == sorted(r.cell for r in records)
    assert {r.metrics["value"] for r in records} == {0.0, 1.0, 2.0, 10.0, 11.0, 12.0}
    assert {r.environment["threads"] for r in records} == {1}
    assert {r.protocol["hash"] for r in records} == {load("digits").test.protocol.hash}


def test_workers_share_the_cells(tmp_path: Path) -> None:
    study = Coins()
    alone = run(study, "smoke", context_of(tmp_path / "alone"), progress=False)
    together = run(study, "smoke", context_of(tmp_path / "together"), jobs=2, progress=False)
    assert {(r.cell, r.key, str(r.metrics)) for r in alone} == {
        (r.cell, r.key, str(r.metrics)) for r in together
    }
    lines = [line.split() for line in (tmp_path / "together" / "trace").read_text().splitlines()]
    assert len({process for _, process, _ in lines}) == 2
    assert str(os.getpid()) not in {process for _, process, _ in lines}
    assert {threads for _, _, threads in lines} == {"1"}


def test_plan_knows_what_is_left_and_how_long_it_takes(tmp_path: Path) -> None:
    study, context = Coins(), context_of(tmp_path)
    before = plan(study, context)
    assert (len(before.missing), before.seconds) == (6, 6 * 30.0)
    run(study, "smoke", context, only=["tails"], progress=False)
    ledger = Ledger(tmp_path)
    timed = [replace(r, seconds=15.0 * i) for i, r in enumerate(ledger.read())]
    ledger.path.unlink()
    for r in timed:
        ledger.append(r)
    after = plan(study, context)
    assert [cell.factors["side"] for cell in after.missing] == ["heads"] * 3
    assert after.seconds == pytest.approx(3 * 15.0)  # 0, 15 and 30 seconds: half of what was expected


def test_cells_of_another_recipe_are_not_taken_for_these(tmp_path: Path) -> None:
    study, context = Coins(), context_of(tmp_path)
    run(study, "smoke", context, only=["digits/heads/0"], progress=False)
    longer = replace(context.scale, sources=(Source("digits", "vae", ("fit.epochs=2",)),))
    with pytest.raises(RunError, match=r"holds digits/heads/0 of another recipe or other sizes"):
        plan(study, replace(context, scale=longer))
    finer = replace(context.scale, num_particles=20)
    with pytest.raises(RunError, match=r"holds digits/heads/0 of another recipe or other sizes"):
        plan(study, replace(context, scale=finer))


def test_what_is_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--only must match a cell such as digits/heads/0, got edge"):
        plan(Coins(), context_of(tmp_path), only=["edge"])


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Coins("interrupted"), "smoke", context_of(tmp_path), progress=False)
    kept = [r.cell for r in Ledger(tmp_path).read()]
    assert kept == ["digits/heads/0", "digits/tails/0", "digits/heads/1"]
    records = run(Coins(), "smoke", context_of(tmp_path), progress=False)
    assert [r.cell for r in records[:3]] == kept
    assert len(records) == 6
    assert trace(tmp_path).count("digits/heads/0") == 1


def test_divergence_is_a_result(tmp_path: Path) -> None:
    records = run(Coins("diverges"), "smoke", context_of(tmp_path), progress=False)
    (failed,) = [r for r in records if r.failure is not None]
    assert (failed.cell, failed.metrics) == ("digits/tails/1", {})
    text = report(Coins(), tmp_path)[0].read_text()
    assert "digits/tails/1 diverged: the loss became NaN at step 3." in text
    assert "| tails | 2 of 3 | 11 ± 13 |" in text
    assert plan(Coins(), context_of(tmp_path)).missing == []


def test_bad_input_in_a_cell_stops_the_study(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the coin is bent"):
        run(Coins("bad input"), "smoke", context_of(tmp_path), progress=False)
    assert len(Ledger(tmp_path).read()) == 3


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        ("bad input", SpecError, r"^the coin is bent$"),
        ("fault", RuntimeError, r"(?s)in measure.*ZeroDivisionError: a fault of the code"),
    ],
)
def test_a_worker_sends_its_records_and_its_errors(
    tmp_path: Path, trouble: str, kind: type[Exception], said: str
) -> None:
    study, context = Coins(trouble), context_of(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    worker = threading.Thread(target=_work, args=(theirs, study, "smoke", context))
    worker.start()
    by_name = {cell.name: cell for cell in study.cells(context.scale)}
    ours.send(by_name["digits/heads/1"])
    assert ours.recv().metrics == {"value": 1.0, "nothing": None}
    ours.send(by_name["digits/tails/1"])
    assert re.search(said, str(error := ours.recv()))
    assert type(error) is kind
    worker.join(10)
    assert not worker.is_alive()


def test_a_worker_ends_when_nobody_sends(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = threading.Thread(target=_work, args=(theirs, Coins(), "smoke", context_of(tmp_path)))
    worker.start()
    ours.close()
    worker.join(10)
    assert not worker.is_alive()


def test_one_study_at_a_time_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with locked(tmp_path / ".lock"), pytest.raises(Busy, match="another process is at work"):
        run(Coins(), "smoke", context_of(tmp_path), progress=False)
    assert len(run(Coins(), "smoke", context_of(tmp_path), progress=False)) == 6


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_a_killed_study_goes_on(tmp_path: Path, number: signal.Signals, jobs: int) -> None:
    program = (
        "from pathlib import Path\n"
        "from pvae.experiments.reproduce import run\n"
        "from tests.experiments.test_reproduce import Coins, context_of\n"
        "if __name__ == '__main__':\n"
        f"    run(Coins('slow'), 'smoke', context_of(Path({str(tmp_path)!r})), jobs={jobs})\n"
    )
    (tmp_path / "program.py").write_text(program)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=errors,
        )
    ledger, deadline = Ledger(tmp_path), time.monotonic() + 120
    while len(ledger.read()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) != 0, (tmp_path / "errors").read_text()
    kept = {r.cell for r in ledger.read()}
    assert kept >= {"digits/heads/0", "digits/tails/0", "digits/heads/1"}
    records = run(Coins(), "smoke", context_of(tmp_path), progress=False)
    assert len({r.cell for r in records}) == len(records) == 6
    assert not [name for name in kept if trace(tmp_path).count(name) > 1]


def test_the_report_is_made_of_the_records_alone(tmp_path: Path) -> None:
    run(Coins(), "smoke", context_of(tmp_path), progress=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "cells.jsonl").write_bytes((tmp_path / "cells.jsonl").read_bytes())
    (path,) = report(Coins(), other)
    text = path.read_text()
    assert f"## digits, protocol {load('digits').test.protocol.hash} (10 num data" in text
    assert "| Heads | 3 | 1.0 ± 2.5 |" in text
    assert "6 cells of" in text
    with pytest.raises(RunError, match="there is no finished cell"):
        report(Coins(), tmp_path / "nowhere")
    Ledger(other).append(replace(record(1.0, side="heads"), study="dice"))
    with pytest.raises(RunError, match="holds cells of dice, not of coins alone"):
        report(Coins(), other)


def test_held_out_views_are_disjoint_and_spread() -> None:
    data = load("digits")
    held = held_out(data, Context(Path(), Coins.scales["smoke"], torch.device("cpu")))
    shown, real = set(held.shown.positions.tolist()), set(held.real.positions.tolist())
    assert len(shown) == len(real) == 10
    assert not shown & real
    assert len(held.scored) == 10
    for view in held:
        assert int(view.positions.min()) < 30
        assert int(view.positions.max()) > 270


def test_posterior_terms_of_a_gaussian_pair() -> None:
    """At the start the encoder's heads are small: rate and prior follow from its own parameters."""
    spec = load_spec("x-vae-digits", ["model.kind=vae", "prior.kind=normal", "encoder.hidden=[8]"])
    data = spec.load_data()
    program = spec.build(data)
    split = data.test[:40]
    with torch.no_grad():
        loc, scale = (t.double() for t in program.guide.encoder(split.x))  # type: ignore[operator]
    rate = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1)
    prior = -0.5 * (scale**2 + loc**2 + 1.8378770664093453).sum(-1)
    found = posterior(program, split, 400, seed=0)
    assert found.rate == pytest.approx(float(rate.mean()), abs=0.05)
    assert found.log_prior == pytest.approx(float(prior.mean()), abs=0.1)
    with torch.no_grad():
        means = program.model.decoder(loc.float())  # type: ignore[operator]
    assert torch.allclose(reconstructions(program, split), means)


def _pvae(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_studies_are_listed() -> None:
    found = json.loads(_pvae("--list", "--json").stdout)
    assert (
        set(found)
        == set(STUDIES)
        == {
            "cvae-nf",
            "x-vae",
            "five",
            "divae",
            "density",
            "dvp",
            "overstatement",
        }
    )
    assert "cvae-nf" in _pvae("--list").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "PAPER must be given"),
        (["cvae"], "there is no study 'cvae': did you mean 'cvae-nf'?"),
        (["cvae-nf", "--scale", "smok"], "unknown --scale 'smok': did you mean 'smoke'?"),
        (["cvae-nf", "--dry-run", "--tables-only"], "--dry-run and --tables-only exclude one another"),
        (
            ["cvae-nf", "--scale", "smoke", "--only", "cifar"],
            "--only must match a cell such as digits/real/0",
        ),
        (["cvae-nf", "--tables-only"], "there is no finished cell in"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _pvae(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith(f"pvae: {said}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("paper", ["cvae-nf", "x-vae", "five"])
@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_every_cell_has_a_sound_spec_and_a_name_of_its_own(paper: str, scale: str, tmp_path: Path) -> None:
    study = STUDIES[paper]
    context = Context(tmp_path, study.scales[scale], torch.device("cpu"))
    planned = plan(study, context)
    names = [cell.name for cell in planned.cells]
    assert len(set(names)) == len(names)
    keys = {cell.key(context.scale.settings()) for cell in planned.cells}
    assert len(keys) == len(names)
    assert {cell.seed for cell in planned.cells} == set(study.scales[scale].seeds)


def test_dry_run_prints_the_plan(tmp_path: Path) -> None:
    text = _pvae("cvae-nf", "--dry-run", "--jobs", 2, "--out", tmp_path).stdout
    assert "mnist/four-couplings-y/x-y/optimal/2" in text
    assert "98 cells, 0 finished, 98 to run: about" in text
    assert not (tmp_path / "cells.jsonl").exists()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two studies at the smallest scale, run by the command."""
    folder = tmp_path_factory.mktemp("smoke")
    for paper in ("cvae-nf", "x-vae"):
        result = json.loads(_pvae(paper, "--scale", "smoke", "--out", folder / paper, "--json").stdout)
        assert all(Path(path).is_file() for path in result["files"])
        assert [Path(path).suffix for path in result["files"]] == [".md", ".png"]
    return folder


@pytest.mark.parametrize("paper", ["cvae-nf", "x-vae"])
def test_smoke_measures_every_cell(smoke: Path, paper: str) -> None:
    study = STUDIES[paper]
    records = Ledger(smoke / paper).read()
    assert {r.cell for r in records} == {cell.name for cell in study.cells(study.scales["smoke"])}
    assert all(r.failure is None and r.seconds > 0 for r in records)
    for r in records:
        numbers = [value for value in r.metrics.values() if value is not None]
        assert len(numbers) > 2
        assert all(abs(value) < 1e6 for value in numbers)


def test_smoke_of_cvae_nf_samples_one_program_both_ways(smoke: Path) -> None:
    records = {r.cell: r.metrics for r in Ledger(smoke / "cvae-nf").read()}
    for name, metrics in records.items():
        assert ("frechet_paper" in metrics) == ("coupling" in name)
        if "real" not in name:
            assert 0 <= (metrics["accuracy_exact"] or 0) <= 1
            assert (metrics["elbo"] or 0) <= (metrics["iwae"] or 0)
            assert metrics["sigma"] == 1.0 if "/one/" in name else (metrics["sigma"] or 1) < 1.0
            rho = (metrics["mse"] or 0) / (metrics["sigma"] or 0) ** 2
            assert metrics["rho"] == pytest.approx(rho)
    # A classifier of five epochs already knows real data better than chance knows anything.
    assert (records["digits/real/0"]["accuracy_exact"] or 0) > 0.5


def test_smoke_of_x_vae_finds_the_control_equal_to_the_standard_vae(smoke: Path) -> None:
    """A diagonal prior in whitened coordinates is the standard VAE: same seed, same numbers."""
    records = {r.factors.get("configuration", "real"): r.metrics for r in Ledger(smoke / "x-vae").read()}
    standard, control = records["vae"], records["diag-whitened"]
    assert set(standard) == set(control)
    for key in set(standard) - {"code_cka"}:  # which alone depends on the latents' units
        value = standard[key]
        assert control[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert records["diag-raw"]["iwae"] != pytest.approx(standard["iwae"], rel=1e-3)
    # Scale 0 decodes one point of a single Gaussian, and the centres of a mixture.
    assert standard["scale/0/diversity"] == records["ae-diag"]["scale/0/diversity"] == 0.0
    assert (records["ae-gmm"]["scale/0/diversity"] or 0) > 0
    assert records["ae-gmm"].get("iwae") is None
    assert records["ae-gmm"]["mse"] == records["ae-diag"]["mse"]


def test_cells_of_a_seed_share_one_autoencoder(smoke: Path) -> None:
    shared = smoke / "x-vae" / "shared"
    assert [path.name for path in shared.glob("autoencoder-*") if path.is_dir()] == ["autoencoder-digits-0"]
    assert len(list(shared.glob("classifier-*.safetensors"))) == 1
    rows = (shared / "autoencoder-digits-0" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("paper", ["cvae-nf", "x-vae"])
def test_tables_come_from_the_cells_file_alone(smoke: Path, tmp_path: Path, paper: str) -> None:
    (tmp_path / "cells.jsonl").write_bytes((smoke / paper / "cells.jsonl").read_bytes())
    _pvae(paper, "--scale", "smoke", "--tables-only", "--out", tmp_path)
    assert (tmp_path / "tables.md").read_text() == (smoke / paper / "tables.md").read_text()
    text = (tmp_path / "tables.md").read_text()
    for line in text.splitlines():
        assert "None" not in line
        assert "nan" not in line.lower().replace("nand", "")
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"(figures/{picture.name})" in text


def test_a_finished_study_runs_nothing(smoke: Path) -> None:
    before = (smoke / "x-vae" / "cells.jsonl").read_bytes()
    text = _pvae("x-vae", "--scale", "smoke", "--dry-run", "--out", smoke / "x-vae").stdout
    assert text == "9 cells, 9 finished, 0 to run: about 0 min with --jobs 1\n"
    _pvae("x-vae", "--scale", "smoke", "--out", smoke / "x-vae", "--jobs", 2)
    assert (smoke / "x-vae" / "cells.jsonl").read_bytes() == before


def test_rare_pairs_are_asked_for_and_looked_for() -> None:
    """A draw that obeys its labels scores one, one that clears the second attribute scores none."""

    class Reader:
        def predict(self, x: Tensor) -> Tensor:
            return x

    y = torch.zeros(6, 3)
    pairs = (Combination((0, 1), (1, 1), 2, 0.001), Combination((1, 2), (1, 0), 3, 0.002))
    real: Any = SimpleNamespace(rare=pairs, classifier=Reader())
    assert _rare(real, y, lambda rows: rows) == 1.0
    assert _rare(real, y, lambda rows: rows * torch.tensor([1.0, 0.0, 1.0])) == 0.0
    assert _rare(real, y, lambda rows: rows * torch.tensor([0.0, 1.0, 1.0])) == 0.5
    assert _rare(SimpleNamespace(rare=()), y, lambda rows: rows) is None  # type: ignore[arg-type]
    assert not y.any()


def test_an_interrupted_command_says_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "coins", Coins("interrupted"))
    result = _pvae("coins", "--scale", "smoke", "--out", tmp_path, code=130)
    assert result.stderr == (
        f"pvae: interrupted, finished cells are kept in {tmp_path}: the same command goes on\n"
    )
    monkeypatch.setitem(STUDIES, "coins", Coins())
    text = _pvae("coins", "--scale", "smoke", "--out", tmp_path, "--dry-run", "--jobs", 3).stdout
    assert text.splitlines()[-1].startswith("6 cells, 3 finished, 3 to run: about")
    result = _pvae("coins", "--scale", "smoke", "--out", tmp_path)
    assert result.stdout == f"{tmp_path / 'tables.md'}\n"
    assert len(Ledger(tmp_path).read()) == 6


@pytest.mark.parametrize("name", STUDIES)
def test_kept_cells_are_those_of_the_code(name: str) -> None:
    """A change of the library that gives a cell another spec shows here, not when somebody goes on."""
    folder = Path(__file__).parents[2] / "experiments" / "results" / f"study-{name}"
    scale = STUDIES[name].scales["cpu"]
    kept = Ledger(folder)
    assert kept.read()
    kept.missing(STUDIES[name].cells(scale), scale.settings())
