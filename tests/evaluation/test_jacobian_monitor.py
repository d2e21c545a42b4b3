"""The monitor of a Jacobian posterior: what it writes, when it speaks, and that training never notices it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.data import Data, from_tensors
from pvae.evaluation import JacobianMonitor, jacobian_report
from pvae.guides import FiveGuide, NormalGuide
from pvae.inference import Monitor, Run
from pvae.inference.program import program_state
from pvae.likelihoods import Normal
from pvae.models import VAE, ConditionalVAE
from pvae.nn import ConvDecoder, ConvEncoder, LabelEmbedding, LabelSpace, MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture, StandardNormal
from tests.guides.five import linear_pair, single

FIGURES = {
    f"five/{name}"
    for name in ("health", "half_log_det", "half_log_det_surrogate", "inconsistency", "residual", "active")
}


@pytest.fixture(scope="module")
def data() -> Data:
    x = torch.randn(110, 1, 2, 3, generator=torch.Generator().manual_seed(4))
    return from_tensors(x[:80], valid=x[80:], name="noise")


def figures(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("five/")}


def train(data: Any, options: Any = None, monitor: Any = None, **settings: Any) -> tuple[Run, Any]:
    model, guide = single(**(options or {}))
    watching = JacobianMonitor(guide, data, **{"warn": False, **(monitor or {})})
    defaults: dict[str, Any] = {"epochs": 4, "batch_size": 20, "lr": 1e-2, "progress": False}
    return pvae.fit(model, guide, data, callbacks=[watching], **defaults | settings), watching


@pytest.mark.parametrize("options", [{}, {"objective": "fif"}, {"probe": "data"}, {"sigma": "batch"}])
def test_rows_at_the_end_of_an_epoch_hold_the_report(data: Data, tmp_path: Path, options: Any) -> None:
    run, monitor = train(data, options, {"num_data": 5}, log_every=2, out=tmp_path)
    assert [row["step"] for row in run.history] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [row["step"] for row in run.history if figures(row)] == [4, 8, 12, 16]
    # Five data, evenly spread over the thirty of the validation split.
    some = data.valid.x[[0, 7, 14, 21, 29]]
    report = jacobian_report(run.guide, some, warn=False)
    assert monitor.report == report
    wanted = {f"five/{name}": value for name, value in report.to_dict().items()}
    measured = figures(run.history[-1])
    assert measured.keys() == FIGURES
    if options.get("sigma") != "batch":  # which is measured anew after the last row
        assert measured == {name: wanted[name] for name in measured}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history


def test_training_does_not_notice(data: Data) -> None:
    def states() -> tuple[Any, ...]:
        state: Any = np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), state[1].tolist(), random.getstate()

    for settings in ({}, {"ema": 0.9}, {"engine": "graph", "compile": False}):
        model, guide = single()
        plain = pvae.fit(model, guide, data, epochs=4, batch_size=20, lr=1e-2, **settings)
        before = states()
        run, _ = train(data, **settings)
        assert states() == before
        for name, value in program_state(run.model, run.guide).items():
            assert torch.equal(value, program_state(model, guide)[name])
        rows = [{key: row[key] for key in row.keys() - FIGURES} for row in run.history]
        assert rows == plain.history
        assert run.guide.training is guide.training is False


def test_averaged_parameters_are_measured(data: Data) -> None:
    run, monitor = train(data, ema=0.99)
    wanted = monitor.report.to_dict()
    assert figures(run.history[-1]) == {name: wanted[name.removeprefix("five/")] for name in FIGURES}
    raw, _ = train(data)
    assert figures(raw.history[-1]) != figures(run.history[-1])


def test_it_measures_on_a_grid_of_epochs(data: Data) -> None:
    run, _ = train(data, monitor={"every": 1.5}, epochs=6, log_every=1)
    assert [row["epoch"] for row in run.history if figures(row)] == [1.5, 3, 4.5, 6]
    run, monitor = train(data, monitor={"every": 10})
    assert not any(figures(row) for row in run.history)
    assert monitor.report == jacobian_report(run.guide, data.valid[_spread(30)], warn=False)


def _spread(size: int) -> Tensor:
    return torch.linspace(0, size - 1, 16, dtype=torch.float64).long()


def test_it_is_a_monitor(data: Data) -> None:
    assert isinstance(JacobianMonitor(single()[1], data), Monitor)


def test_where_the_data_come_from(data: Data) -> None:
    model, guide = single()
    x = data.train.x
    for source in (from_tensors(x), data.train, x):
        monitor = JacobianMonitor(guide, source)
        monitor.measure(Run(model, guide), {"epoch": 1.0})
        assert monitor.report == jacobian_report(guide, x[_spread(80)], warn=False)
        assert monitor.report is not None
        assert monitor.report.num_data == 16
    few = JacobianMonitor(guide, x[:3])
    few.measure(Run(model, guide), {"epoch": 1.0})
    assert few.report == jacobian_report(guide, x[:3], warn=False)


KILLED = """
import os, signal, sys
from pvae.inference.loop import Loop
from tests.evaluation.test_jacobian_monitor import killed_run
save, saved = Loop._save, []

def save_twice(self):
    # The rows of epochs 3 to 5 come after the last checkpoint.
    if len(saved) < 2:
        saved.append(save(self))

def kill(run, row):
    if row["step"] == 20:
        os.kill(os.getpid(), signal.SIGKILL)

Loop._save = save_twice
killed_run(sys.argv[1], [kill])
"""


def killed_run(out: str, callbacks: list[Any], resume: bool = False) -> None:
    x = torch.randn(110, 1, 2, 3, generator=torch.Generator().manual_seed(4))
    data = from_tensors(x[:80], valid=x[80:], name="noise")
    model, guide = single()
    monitor = JacobianMonitor(guide, data, every=2, num_data=4, warn=False)
    settings: dict[str, Any] = {"epochs": 9, "batch_size": 20, "ema": 0.9, "checkpoint_every": 0.0}
    pvae.fit(model, guide, data, out=out, resume=resume, callbacks=[monitor, *callbacks], **settings)


def test_a_run_killed_dead_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(cut)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in left if figures(row)] == [8, 16]
    assert [row["step"] for row in left] == [4, 8, 12, 16, 20]
    assert json.loads((cut / "checkpoints/last.json").read_text())["step"] == 8
    killed_run(str(whole), [])
    killed_run(str(cut), [], resume=True)
    for name in ("metrics.jsonl", "checkpoints/last.json", "checkpoints/final.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if figures(row)] == [8, 16, 24, 32]


def test_labels_are_used_where_the_model_is_conditional() -> None:
    def labels() -> LabelEmbedding:
        return LabelEmbedding(LabelSpace("class", 3), 4)

    torch.manual_seed(0)
    x, y = torch.rand(24, 1, 6, 6), torch.arange(24) % 3
    encoder = ConvEncoder((1, 6, 6), 2, (4,), 8, labels=labels())
    decoder = ConvDecoder(2, (1, 6, 6), (4,), 8, labels=labels())
    likelihood = Normal("learned", 0.5)
    model = ConditionalVAE(StandardNormal(2), decoder, likelihood)
    guide = FiveGuide(encoder, decoder, likelihood)
    data = from_tensors(x, y=y)
    monitor = JacobianMonitor(guide, data, num_data=8, warn=False)
    run = pvae.fit(model, guide, data, epochs=2, batch_size=8, callbacks=[monitor])
    index = torch.linspace(0, 23, 8).long()
    wanted = jacobian_report(guide, data.train.x[index], y[index], warn=False)
    assert monitor.report == wanted
    assert figures(run.history[-1])["five/health"] == wanted.health
    other = JacobianMonitor(guide, data.train.x, (y + 1) % 3, num_data=8)
    other.measure(run, {"epoch": 9.0})
    assert other.report is not None
    assert other.report.health != wanted.health


class Stretched(nn.Module):
    """A prior that does not know its variance, which is nine."""

    def forward(self, y: Tensor | None = None) -> Any:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.0, 3.0, event_dim=1)])


def test_the_prior_s_own_scale_is_the_unit() -> None:
    encoder, decoder = MLPEncoder((6,), 2, (8,), "silu"), MLPDecoder(2, (6,), (8,), "silu")
    likelihood, x = Normal("fixed", 0.4), torch.randn(16, 6)
    guide = FiveGuide(encoder, decoder, likelihood)
    mixture = GaussianMixture(2, 3)
    known = mixture().variance.sqrt().detach()
    assert (known - 1).abs().max() > 0.1  # or the unit would not matter
    for prior, scale, tolerance in ((mixture, known, 1e-5), (Stretched(), torch.tensor(3.0), 0.02)):
        monitor = JacobianMonitor(guide, x, warn=False)
        monitor.measure(Run(VAE(prior, decoder, likelihood), guide), {"epoch": 1.0})
        wanted = jacobian_report(guide, x, prior_scale=scale, warn=False)
        assert monitor.report is not None
        assert monitor.report.inconsistency == pytest.approx(wanted.inconsistency, rel=tolerance)
        plain = jacobian_report(guide, x, warn=False)
        assert monitor.report.inconsistency != pytest.approx(plain.inconsistency, rel=2 * tolerance)


def collapsed() -> tuple[nn.Module, FiveGuide, Data]:
    """A linear model at its mode, but for one latent that the decoder ignores."""
    torch.manual_seed(0)
    w = torch.randn(8, 3)
    w[:, 2] = 1e-3
    covariance = torch.linalg.inv(torch.eye(3) + w.T @ w / 0.1**2)
    encoder, decoder, likelihood = linear_pair(covariance @ w.T / 0.1**2, w, 0.1, "fixed")
    x = torch.randn(40, 3) @ w.T + 0.1 * torch.randn(40, 8)
    model = VAE(StandardNormal(3), decoder, likelihood)
    return model, FiveGuide(encoder, decoder, likelihood), from_tensors(x)


def watched(steps: int, warn: bool = True) -> JacobianMonitor:
    model, guide, data = collapsed()
    monitor = JacobianMonitor(guide, data, every=1000, warn=warn)
    pvae.fit(model, guide, data, steps=steps, batch_size=40, lr=1e-9, callbacks=[monitor])
    return monitor


def test_problems_are_told_once_at_the_end_with_their_figures() -> None:
    with pytest.warns(RuntimeWarning) as said:
        monitor = watched(200)
    report = monitor.report
    assert report is not None
    assert [str(warning.message) for warning in said] == list(monitor.problems) == list(report.problems)
    assert [str(warning.message)[:30] for warning in said] == [
        f"tr(J G) / d is {report.health:.2f} < 0.8: the",
        "1 of 3 latents are not active ",
    ]
    assert {Path(warning.filename).name for warning in said} == {Path(__file__).name}


def test_a_run_of_few_steps_is_not_judged_and_none_warns_unasked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few, quiet = watched(199), watched(200, warn=False)
    assert few.report is not None
    assert few.report.problems
    assert few.problems == ()
    assert len(quiet.problems) == 2


def test_figures_that_are_not_finite_are_left_out(data: Data) -> None:
    model, guide = single()
    monitor = JacobianMonitor(guide, data)
    assert monitor.problems == ()
    next(guide.encoder.parameters()).data.fill_(math.nan)
    assert monitor.measure(Run(model, guide), {"epoch": 1.0}) == {}


def test_what_cannot_be_watched_is_refused(data: Data) -> None:
    _, guide = single()
    with pytest.raises(TypeError, match=r"guide must have a method posterior.*got NormalGuide"):
        JacobianMonitor(NormalGuide(MLPEncoder((1, 2, 3), 2)), data)
    with pytest.raises(TypeError, match="x must be a tensor, a split or a data set, got list"):
        JacobianMonitor(guide, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_data must be positive, got 0"):
        JacobianMonitor(guide, data, num_data=0)
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        JacobianMonitor(guide, data, every=0)
