"""Training from start to finish: what it reports, when it stops, and that it can be cut anywhere."""

import json
import math
import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pvae.data import Data, from_datasets, from_tensors
from pvae.inference import ELBO, CheckpointError, NonFiniteLoss, Run, Trainer, fit, load_parameters
from pvae.inference.program import program_state

from .profiled import profiled_programs
from .programs import LinearGuide, LinearModel


def programs(seed: int = 0) -> tuple[LinearModel, LinearGuide]:
    torch.manual_seed(seed)
    return LinearModel(), LinearGuide()


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(5)
    x = 0.4 * torch.randn(260, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    return from_tensors(x[:200], valid=x[200:], name="linear")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(data: Any, **settings: Any) -> tuple[Run, dict[str, Tensor]]:
    model, guide = programs()
    defaults: dict[str, Any] = {"epochs": 3, "batch_size": 20, "lr": 1e-2, "progress": False}
    run = fit(model, guide, data, **defaults | settings)
    return run, {name: t.clone() for name, t in program_state(model, guide).items()}


def test_the_loss_falls_and_its_parts_add_up(data: Data) -> None:
    run, _ = train(data, epochs=30)
    first, last = run.history[0], run.history[-1]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["loss"] == pytest.approx(last["reconstruction"] + last["kl"], rel=1e-5)
    assert last["kl"] == pytest.approx(last["kl/z"])
    assert run.best == min(row["valid_loss"] for row in run.history)
    assert (run.steps, len(run.history), run.stopped) == (300, 30, "finished")


def test_validation_loss_is_the_bound_of_the_validation_split(data: Data) -> None:
    run, _ = train(data, objective="mean_field")
    torch.manual_seed(20_140_501)
    bound = ELBO("mean_field").terms(run.model, run.guide, data.valid.x).bound
    assert run.history[-1]["valid_loss"] == pytest.approx(-bound.mean().item(), rel=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(data: Data) -> None:
    run, state = train(data)
    again, same_state = train(data)
    _, other = train(data, seed=1)
    assert same(state, same_state)
    assert run.history == again.history
    assert not same(state, other)


def test_the_generators_of_the_process_are_left_as_they_were(data: Data) -> None:
    model, guide = programs()

    def states() -> tuple[Any, ...]:
        state: Any = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), state[1].tolist(), state[2:], random.getstate()

    before = states()
    fit(model, guide, data, epochs=1, batch_size=20, progress=False)
    assert states() == before
    assert len(list(pyro.get_param_store().keys())) == 0


def test_two_models_trained_in_turns_equal_the_two_trained_alone(data: Data) -> None:
    def trainer(seed: int) -> Trainer:
        return Trainer(*programs(seed), total_steps=40, lr=1e-2, seed=seed)

    def advance(trainer: Trainer, steps: int) -> None:
        batches = data.train.batches(20, seed=0, epoch=0, drop_last=True)
        with trainer.generator():
            for _, batch in zip(range(steps), batches, strict=False):
                trainer.step(batch)

    alone, together = (trainer(1), trainer(2)), (trainer(1), trainer(2))
    for one in alone:
        for _ in range(4):
            advance(one, 10)
    for _ in range(4):
        for one in together:
            advance(one, 10)
            torch.randn(3)  # somebody else draws from the process's generator in between
    for one, other in zip(alone, together, strict=True):
        assert same(program_state(one.model, one.guide), program_state(other.model, other.guide))


class Ruler:
    """A monitor that measures the parameters, draws noise, and notes what it was told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.ends: list[float] = []

    def measure(self, run: Run, row: Mapping[str, float]) -> dict[str, float]:
        assert row["step"] not in [old["step"] for old in run.history]
        self.rows.append({**row, "ruler/bias": self.bias(run)})
        torch.manual_seed(0)
        return {"ruler/bias": self.bias(run), "ruler/noise": float(torch.randn(()))}

    def finish(self, run: Run) -> None:
        self.ends.append(self.bias(run))

    @staticmethod
    def bias(run: Run) -> float:
        return float(dict(run.model.named_parameters())["decoder.bias"].detach().sum())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9, "patience": 50, "callbacks": [Ruler()]},
        {"engine": "graph", "compile": False},
    ],
)
@pytest.mark.parametrize("cut", [7, 10, 23])
def test_interrupted_and_resumed_training_gives_the_same_bytes(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, settings: dict[str, Any]
) -> None:
    settings = {"schedule": "cosine", "beta_warmup": 1, "grad_clip": 5.0, "log_every": 4, **settings}
    whole, wanted = train(data, out=tmp_path / "whole", **settings)
    model, guide = programs()
    options: dict[str, Any] = {"epochs": 3, "batch_size": 20, "lr": 1e-2, "progress": False, **settings}
    interrupt_after(cut, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(model, guide, data, out=tmp_path / "cut", **options)
    monkeypatch.undo()
    assert json.loads((tmp_path / "cut/checkpoints/last.json").read_text())["step"] == cut
    torch.manual_seed(99)
    fresh = LinearModel(), LinearGuide()
    resumed = fit(*fresh, data, out=tmp_path / "cut", resume=True, **options)
    assert same(program_state(*fresh), wanted)
    assert resumed.history == whole.history
    for name in ("metrics.jsonl", "checkpoints/last.json", "checkpoints/final.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    files = [_needed(tmp_path / folder / "checkpoints") for folder in ("cut", "whole")]
    assert files[0] == files[1]


def _needed(checkpoints: Path) -> set[str]:
    """Files in a folder of checkpoints, without those of the checkpoint before the last one."""
    found = {path.name for path in checkpoints.iterdir()}
    if "previous.json" in found:
        before = json.loads((checkpoints / "previous.json").read_text())
        names = ("last", "best", "final")
        others = [json.loads((checkpoints / f"{name}.json").read_text()) for name in names]
        named = {one["file"] for one in (before, before["best_state"]) if one is not None}
        found -= named - {other["file"] for other in others}
    return found - {"previous.json"}


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT to this process within step number ``steps``."""
    step = Trainer.step

    def interrupted(self: Trainer, batch: Any) -> None:
        if self.step_count == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize(
    "settings", [{}, {"ema": 0.9, "patience": 50}, {"engine": "graph", "compile": False}]
)
def test_a_sigma_fitted_to_batches_is_resumed_to_the_same_bytes(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 20, "lr": 1e-2, "progress": False, **settings}
    wanted = profiled_programs()
    whole = fit(*wanted, data, out=tmp_path / "whole", **options)
    interrupt_after(17, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(*profiled_programs(), data, out=tmp_path / "cut", **options)
    monkeypatch.undo()
    fresh = profiled_programs(seed=9)
    resumed = fit(*fresh, data, out=tmp_path / "cut", resume=True, **options)
    assert same(program_state(*fresh), program_state(*wanted))
    assert resumed.history == whole.history
    for name in ("metrics.jsonl", "checkpoints/last.json", "checkpoints/final.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # The average over 30 steps, no more, no less: neither the check at the door nor tracing counts.
    assert fresh[0].likelihood.average_weight.item() == pytest.approx(1 - 0.99**30, rel=1e-4)
    # Going on from the end of a run measures again, and finds the same.
    fit(*fresh, data, out=tmp_path / "cut", resume=True, **options)
    assert same(program_state(*fresh), program_state(*wanted))


def test_the_best_state_has_the_moving_average_of_its_step(data: Data) -> None:
    averages: dict[float, float] = {}
    model, guide = profiled_programs()

    def keep(run: Run, row: dict[str, float]) -> None:
        averages[row["valid_loss"]] = model.likelihood.average_mse.item()

    run = fit(
        model, guide, data, epochs=60, batch_size=20, lr=0.1, patience=2, callbacks=[keep], progress=False
    )
    assert run.stopped == "early"
    assert model.likelihood.average_mse.item() == averages[run.best]
    assert len(set(averages.values())) == len(averages)


def test_the_check_of_a_batch_leaves_running_statistics_alone(data: Data) -> None:
    model, guide = programs()
    model.decoder = torch.nn.Sequential(torch.nn.BatchNorm1d(3), model.decoder)  # type: ignore[assignment]
    trainer = Trainer(model, guide, total_steps=1)
    before = [buffer.clone() for buffer in model.buffers()]
    trainer.check(next(data.train.batches(20, seed=0, epoch=0, drop_last=True)))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_killed_between_checkpoints_it_goes_on_from_the_last(data: Data, tmp_path: Path) -> None:
    _, wanted = train(data, out=tmp_path / "whole", checkpoint_every=0)

    class Killed(Exception):
        pass

    def kill(run: Run, row: dict[str, float]) -> None:
        if row["step"] == 20:
            raise Killed

    with pytest.raises(Killed):
        train(data, out=tmp_path / "cut", checkpoint_every=0, callbacks=[kill])
    # A row that was written after the checkpoint must not stand twice.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25}\n')
    run, state = train(data, out=tmp_path / "cut", resume=True)
    assert same(state, wanted)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.history
    assert [row["step"] for row in rows] == [10, 20, 30]


def test_a_run_is_never_overwritten(data: Data, tmp_path: Path) -> None:
    train(data, out=tmp_path)
    with pytest.raises(ValueError, match="out must be a new folder"):
        train(data, out=tmp_path)


@pytest.mark.parametrize("settings", [{"seed": 3}, {"batch_size": 10}])
def test_resuming_with_another_order_of_data_is_refused(
    data: Data, tmp_path: Path, settings: dict[str, Any]
) -> None:
    train(data, out=tmp_path)
    with pytest.raises(ValueError, match=r"must be .*, as in the run that is resumed"):
        train(data, out=tmp_path, resume=True, **settings)


def test_a_damaged_checkpoint_is_named(data: Data, tmp_path: Path) -> None:
    train(data, out=tmp_path)
    meta = json.loads((tmp_path / "checkpoints/last.json").read_text())
    file = tmp_path / "checkpoints" / meta["file"]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        train(data, out=tmp_path, resume=True)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        train(data, out=tmp_path, resume=True)


def test_a_checkpoint_of_another_program_is_refused_and_changes_nothing(data: Data, tmp_path: Path) -> None:
    train(data, out=tmp_path)
    model, guide = LinearModel(z_dim=2), LinearGuide(z_dim=2)
    before = {name: t.clone() for name, t in program_state(model, guide).items()}
    with pytest.raises(
        CheckpointError, match=r"model has another decoder.weight: \(5, 2\) here, \(5, 3\) saved"
    ):
        load_parameters(tmp_path, model, guide)
    assert same(program_state(model, guide), before)


def test_load_parameters_gives_back_what_fit_returned(data: Data, tmp_path: Path) -> None:
    _, wanted = train(data, out=tmp_path, ema=0.9)
    model, guide = programs(seed=9)
    meta = load_parameters(tmp_path, model, guide)
    assert same(program_state(model, guide), wanted)
    assert meta["step"] == 30


def test_no_checkpoint_is_a_pickle(data: Data, tmp_path: Path) -> None:
    train(data, out=tmp_path)
    files = [p for p in (tmp_path / "checkpoints").iterdir() if p.suffix != ".json"]
    assert files
    for file in files:
        content = file.read_bytes()
        header = int.from_bytes(content[:8], "little")
        assert isinstance(json.loads(content[8 : 8 + header]), dict)


def test_early_stopping_returns_the_best_on_validation(data: Data) -> None:
    run, state = train(data, epochs=200, lr=0.05, patience=4)
    valid = [row["valid_loss"] for row in run.history]
    assert run.stopped == "early"
    assert len(valid) < 200
    assert int(np.argmin(valid)) == len(valid) - 5
    torch.manual_seed(20_140_501)
    bound = ELBO().terms(run.model, run.guide, data.valid.x).bound
    assert -bound.mean().item() == pytest.approx(run.best, rel=1e-5)
    assert state.keys() == program_state(run.model, run.guide).keys()


def test_ema_averages_the_parameters(data: Data) -> None:
    seen: list[dict[str, Tensor]] = []

    def keep(run: Run, row: dict[str, float]) -> None:
        seen.append({n: t.clone() for n, t in program_state(run.model, run.guide).items()})

    _, state = train(data, steps=3, epochs=None, ema=0.5, log_every=1, callbacks=[keep])
    model, guide = programs()
    average = program_state(model, guide)["model.decoder.weight"].clone()
    for step, at_step in enumerate(seen, 1):
        decay = min(0.5, step / (step + 10))
        average = decay * average + (1 - decay) * at_step["model.decoder.weight"]
    torch.testing.assert_close(state["model.decoder.weight"], average)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}])
def test_what_a_monitor_measures_is_in_the_row_that_is_written(
    data: Data, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ruler, seen = Ruler(), []

    def keep(run: Run, row: dict[str, float]) -> None:
        written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(written[-1]) == row == run.history[-1]
        seen.append((row["ruler/bias"], Ruler.bias(run)))

    programs()  # as train does, and nothing else draws
    before = torch.get_rng_state()
    run, state = train(data, out=tmp_path / "run", callbacks=[keep, ruler], log_every=4, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == len(run.history) == 9
    # Each found the parameters that validate, which with an average are not those that train.
    assert all((found == raw) == ("ema" not in settings) for found, raw in seen)
    assert [row["ruler/bias"] for row in ruler.rows] == [row["ruler/bias"] for row in run.history]
    assert all("loss" in row and ("valid_loss" in row) == (row["step"] % 10 == 0) for row in ruler.rows)
    assert ruler.ends == [Ruler.bias(run)] == [run.history[-1]["ruler/bias"]]
    plain, wanted = train(data, log_every=4, **settings)
    assert same(state, wanted)
    assert [{k: v for k, v in row.items() if "ruler" not in k} for row in run.history] == plain.history


def test_a_monitor_is_told_of_the_end_when_the_best_is_back(data: Data) -> None:
    ruler = Ruler()
    run, _ = train(data, epochs=200, lr=0.05, patience=4, callbacks=[ruler])
    best = next(row for row in run.history if row["valid_loss"] == run.best)
    assert ruler.ends == [best["ruler/bias"]]
    assert run.stopped == "early"


def test_warm_up_and_schedule_reach_the_rows(data: Data) -> None:
    run, _ = train(data, beta_warmup=2, schedule="linear", log_every=5)
    betas = [row["beta"] for row in run.history]
    assert betas == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    rates = [row["lr"] for row in run.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_gradient_clipping_limits_the_step(data: Data) -> None:
    def moved(clip: float | None) -> float:
        start = program_state(*programs())
        settings = {"optimizer": "sgd", "lr": 1.0, "grad_clip": clip, "steps": 1, "epochs": None}
        _, state = train(data, **settings)
        return float(sum((state[n] - start[n]).square().sum() for n in state)) ** 0.5

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(None) > 0.1


@pytest.mark.parametrize(
    "optimizer", ["adam", "adamw", "adamax", "sgd", lambda p: torch.optim.RMSprop(p, 1e-2)]
)
def test_every_optimizer_trains(data: Data, optimizer: Any) -> None:
    run, _ = train(data, optimizer=optimizer, epochs=10, lr=1e-3)
    assert run.history[-1]["loss"] < run.history[0]["loss"]


def test_a_non_finite_loss_names_term_step_and_data_and_keeps_the_checkpoint(
    data: Data, tmp_path: Path
) -> None:
    def poison(run: Run, row: dict[str, float]) -> None:
        if row["step"] == 20:
            dict(run.model.named_parameters())["decoder.bias"].data.fill_(math.nan)

    message = r"reconstruction became non-finite at step 20 on training data \[(.*), ...\]; the last"
    with pytest.raises(NonFiniteLoss, match=message) as caught:
        train(data, out=tmp_path, checkpoint_every=0, callbacks=[poison])
    order = next(data.train.batches(20, seed=0, epoch=2, drop_last=True)).index[:8].tolist()
    assert str(order)[:-1] in str(caught.value)
    model, guide = programs()
    assert load_parameters(tmp_path, model, guide, "last")["step"] == 20
    assert all(t.isfinite().all() for t in program_state(model, guide).values())


def test_it_trains_on_a_bare_tensor(data: Data) -> None:
    run, _ = train(data.train.x)
    assert run.best == float("inf")
    assert "valid_loss" not in run.history[-1]


def test_streamed_data_train_as_data_in_memory_do(data: Data, tmp_path: Path) -> None:
    part = TensorDataset(data.train.x)
    streamed = from_datasets(
        part, name="linear", fingerprint="1", levels=None, scale="real", num_workers=0
    ).train
    settings: dict[str, Any] = {"log_every": 4}
    _, wanted = train(data.train, **settings)
    _, state = train(streamed, **settings)
    assert same(state, wanted)
    train(streamed, out=tmp_path, epochs=2, **settings)
    _, resumed = train(streamed, out=tmp_path, resume=True, **settings)
    assert same(resumed, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": None}, "give either epochs or steps"),
        ({"steps": 5}, "not both"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch_size": 500}, "batch_size must lie between 1 and the 200 training data, got 500"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"grad_clip": -1.0}, "grad_clip must be positive"),
        ({"ema": 1.0}, "ema must lie between 0 and 1"),
        ({"beta_warmup": -1}, "beta_warmup must not be negative"),
        ({"optimizer": "lbfgs"}, "optimizer must be adam"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine, linear"),
        ({"engine": "jit"}, "engine must be 'eager', 'traced', 'graph' or 'auto'"),
        ({"objective": "vae"}, "objective must be one of"),
        ({"log_every": 0}, "log_every must be positive"),
    ],
)
def test_bad_settings_are_named_before_anything_happens(
    data: Data, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(data, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_data_of_another_shape_are_refused(data: Data) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        train(torch.randn(200, 4))


def test_patience_needs_validation_data(data: Data) -> None:
    with pytest.raises(ValueError, match="patience needs a validation split"):
        train(data.train, patience=3)


def test_programs_without_parameters_are_refused(data: Data) -> None:
    model, guide = programs()
    for parameter in (*model.parameters(), *guide.parameters()):
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters"):
        fit(model, guide, data, epochs=1, batch_size=20)
