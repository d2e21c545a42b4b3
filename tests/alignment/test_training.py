"""Alignment in training: engines, resumption, stock Pyro, and that no evaluation sees it."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae.alignment import Aligned, LinearWarmup, align
from pvae.data import Data, from_tensors
from pvae.evaluation import active_units
from pvae.guides import NormalGuide
from pvae.inference import CheckpointError, Trainer, load_parameters, registered
from pvae.inference.program import program_state
from pvae.likelihoods import Normal
from pvae.models import VAE
from pvae.nn import MLPDecoder, MLPEncoder
from pvae.priors import GaussianMixture

from .programs import NUM_DATA, Density, arguments, data, density, labels, programs

SETTINGS: dict[str, dict[str, Any]] = {
    "direct": {},
    "learned offset": {"offset": "learn"},
    "released": {"preset": "released"},
    "mean": {"estimator": "mean"},
    "multi": {"estimator": "multi", "detach": "prior", "gamma": 0.5},
    "flow": {"kind": "flow", "pretrain_steps": 2},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:a flow takes up the scale", "ignore:.* of the targets lie above"
)


def data_set(conditional: bool = False) -> Data:
    y = {"train": labels(), "valid": labels()[:10]} if conditional else None
    return from_tensors(data(), data()[:10], y=y)


def fitted(aligned: Any, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "progress": False, "log_every": 2}
    found = data_set(getattr(aligned.model, "conditional", False))
    return pvae.fit(aligned.model, aligned.guide, found, **defaults | settings)


def state_of(aligned: Aligned) -> dict[str, Tensor]:
    state = program_state(*aligned) | {f"training.{n}": t for n, t in aligned.model.training_state().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("prior", "objective"), [("normal", "mean_field"), ("vamp", "elbo")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_engines_train_the_same_model(settings: dict[str, Any], prior: str, objective: str) -> None:
    runs = {}
    for engine in ("eager", "graph"):
        aligned = align(*programs(prior), density(), **settings)
        run = fitted(aligned, engine=engine, compile=False, objective=objective)
        runs[engine] = (run.history, state_of(aligned))
    for ours, wanted in zip(runs["graph"][0], runs["eager"][0], strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)
    for name, tensor in runs["eager"][1].items():
        torch.testing.assert_close(runs["graph"][1][name], tensor, rtol=1e-3, atol=1e-4)
    row = runs["eager"][0][-1]
    assert row["loss"] == pytest.approx(row["reconstruction"] + row["kl"] + row["align"])
    assert row["align"] > 0


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def interrupted(self: Trainer, batch: Any) -> None:
        step(self, batch)
        if self.step_count == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize(
    ("settings", "engine"),
    [(name, "eager") for name in SETTINGS] + [(name, "graph") for name in ("learned offset", "flow")],
)
def test_interrupted_and_resumed_training_gives_the_same_bytes(
    settings: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"engine": engine, "compile": False, "ema": 0.9, "patience": 50}
    whole = align(*programs("gmm"), density(), **SETTINGS[settings])
    history = fitted(whole, out=tmp_path / "whole", **options).history
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            fitted(align(*programs("gmm"), density(), **SETTINGS[settings]), out=tmp_path / "cut", **options)
    resumed = align(*programs("gmm"), density(), **SETTINGS[settings])
    again = fitted(resumed, out=tmp_path / "cut", resume=True, **options).history
    assert again == history
    assert same(state_of(resumed), state_of(whole))


def test_a_checkpoint_is_that_of_the_bare_programs(tmp_path: Path) -> None:
    aligned = align(*programs("gmm"), density(), kind="flow", offset="learn")
    fitted(aligned, out=tmp_path)
    model, guide = programs("gmm", seed=9)
    load_parameters(tmp_path, model, guide)
    assert same(program_state(model, guide), program_state(*aligned.bare))


@pytest.mark.parametrize(
    "other",
    [
        lambda: align(*programs("gmm"), density(seed=8)),
        lambda: align(*programs("gmm"), density(), delta=2.0),
        lambda: align(*programs("gmm"), density(), weight="none"),
        lambda: align(*programs("gmm"), density(), offset="learn"),
    ],
)
def test_another_alignment_is_not_resumed(other: Any, tmp_path: Path) -> None:
    fitted(align(*programs("gmm"), density()), out=tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="the target and the settings of the saved run"):
        fitted(other(), out=tmp_path, epochs=2, resume=True)


def test_bare_and_aligned_runs_do_not_go_on_as_one_another(tmp_path: Path) -> None:
    fitted(align(*programs("gmm"), density()), out=tmp_path / "aligned", epochs=1)
    with pytest.raises(CheckpointError, match="the saved model has a training state"):
        pvae.fit(
            *programs("gmm"),
            data_set(),
            epochs=2,
            batch_size=8,
            out=tmp_path / "aligned",
            resume=True,
            progress=False,
        )
    pvae.fit(*programs("gmm"), data_set(), epochs=1, batch_size=8, out=tmp_path / "bare", progress=False)
    with pytest.raises(CheckpointError, match="the target and the settings of the saved run"):
        fitted(align(*programs("gmm"), density()), out=tmp_path / "bare", epochs=2, resume=True)


def test_batches_find_their_targets_and_the_weight_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float]] = []
    aligned = align(*programs("flow"), density(), gamma=LinearWarmup(0.5, peak=3.0))
    step = Trainer.step

    def watched(self: Trainer, batch: Any) -> None:
        step(self, batch)
        torch.testing.assert_close(data()[aligned.aligner.index], batch.x)
        seen.append((aligned.aligner.index.clone(), aligned.aligner.gamma.item()))

    monkeypatch.setattr(Trainer, "step", watched)
    fitted(aligned, epochs=2)
    assert [gamma for _, gamma in seen] == pytest.approx([0, 0.6, 1.2, 1.8, 2.4, 3, 3, 3, 3, 3])
    assert torch.equal(torch.cat([i for i, _ in seen[:5]]).sort().values, torch.arange(NUM_DATA))


def test_targets_of_other_data_are_refused() -> None:
    aligned = align(*programs(), density(NUM_DATA - 1))
    with pytest.raises(ValueError, match="a row for each of the 40 training data, got 39"):
        fitted(aligned)


def test_a_run_leaves_no_batch_behind() -> None:
    aligned = align(*programs(), density(), estimator="mean")
    fitted(aligned)
    aligned.model.train()
    with pytest.raises(ValueError, match="told which data these are"):
        aligned.model(data()[:8])


@pytest.mark.parametrize("kind", ["direct", "flow"])
@pytest.mark.parametrize("estimator", ["sample", "mean"])
def test_stock_svi_takes_the_same_steps(kind: Any, estimator: Any) -> None:
    """SVI with Pyro's objective and a loop of its own against pvae.fit, for the same noise."""
    ours = align(*programs("gmm"), density(), kind=kind, estimator=estimator)
    batches = data_set().train
    trainer = Trainer(*ours, total_steps=10, lr=1e-2, seed=3)
    with trainer.generator():
        for batch in batches.batches(8, seed=0, epoch=0, drop_last=True):
            trainer.step(batch)

    stock = align(*programs("gmm"), density(), kind=kind, estimator=estimator)
    # The optimiser's step does not depend on the scale of the loss, which is a sum over the batch in SVI.
    optimizer = pyro.optim.Adam({"lr": 1e-2, "eps": 8e-8})
    model, guide = registered(stock.model, "model"), registered(stock.guide, "guide")
    svi = SVI(poutine.scale(model, scale=1.0), guide, optimizer, Trace_ELBO())
    torch.manual_seed(3)
    for step, batch in enumerate(batches.batches(8, seed=0, epoch=0, drop_last=True)):
        stock.model.on_step((batch.x,), batch.index, step, 10)
        assert math.isfinite(svi.step(batch.x))
    wanted = program_state(*ours)
    for name, tensor in program_state(*stock).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["direct", "flow"])
@pytest.mark.parametrize("prior", ["gmm", "flow"])
def test_no_evaluation_sees_it(prior: str, kind: Any) -> None:
    aligned = align(*programs(prior), density(), kind=kind, gamma=1.0)
    fitted(aligned, epochs=2)
    for mode in (False, True):  # after training, and in the middle of it
        aligned.model.train(mode)
        aligned.guide.train(mode)
        found = []
        for pair in (aligned, aligned.bare):
            args = arguments(aligned.bare[0], torch.arange(12))
            x, y = args[0], args[1] if len(args) > 1 else None
            estimate = pvae.log_likelihood(*pair, x, y, num_particles=20, seed=4)
            units = active_units(*pair, x, y)
            found.append((estimate.log_prob, estimate.elbo, units.variance))
        for one, other in zip(*found, strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_validation_is_that_of_the_bare_bound() -> None:
    aligned = align(*programs("gmm"), density(), gamma=1.0)
    bare = programs("gmm")
    first = fitted(aligned, epochs=1, lr=1e-12).history[-1]["valid_loss"]
    run = pvae.fit(*bare, data_set(), epochs=1, batch_size=8, lr=1e-12, progress=False)
    assert first == pytest.approx(run.history[-1]["valid_loss"], rel=1e-6)


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's number is asked for, which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_step_never_waits_for_the_device(settings: dict[str, Any]) -> None:
    aligned = align(*programs("vamp"), density(), **settings)
    trainer = Trainer(*aligned, total_steps=10)
    batch = data_set().train.sample(torch.arange(8))
    with trainer.generator():
        trainer.step(batch)
        with CountReads() as reads:
            trainer.step(batch)
    assert reads.count == 0


@pytest.mark.slow
def test_it_makes_log_p_z_follow_the_density() -> None:
    """Four blobs in 10 dimensions of which two matter, under a learned mixture and their exact density."""
    torch.manual_seed(0)
    centres = torch.tensor([[2.5, 0.0], [0.0, 2.5], [-2.5, 0.0], [0.0, -2.5]])
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.4, 0.3, 0.2, 0.1])),
        torch.distributions.Independent(torch.distributions.Normal(centres, 0.5), 1),
    )
    u = truth.sample((1000,))
    x = u @ torch.linalg.qr(torch.randn(10, 2)).Q.T + 0.02 * torch.randn(1000, 10)
    found = {}
    for gamma in (0.0, 1.0):
        torch.manual_seed(1)
        encoder = MLPEncoder((10,), 2, hidden=(32,))
        model = VAE(GaussianMixture(2, 4), MLPDecoder(2, (10,), hidden=(32,)), Normal(value=0.1))
        target = Density(truth.log_prob(u), torch.full((1000,), 0.2), u)
        warm: Any = LinearWarmup(0.5, gamma) if gamma else 0.0
        aligned = align(model, NormalGuide(encoder), target, gamma=warm, normalize=False)
        pvae.fit(*aligned, x, epochs=80, batch_size=100, lr=5e-3, progress=False)
        with torch.no_grad():
            s = model.prior().log_prob(encoder(x)[0])
        r = torch.corrcoef(torch.stack([s, truth.log_prob(u)]))[0, 1]
        found[gamma] = (float(r), float((s - truth.log_prob(u)).mean().abs()))
    assert found[1.0][0] > max(0.9, found[0.0][0])
    assert found[1.0][1] < 0.3 < found[0.0][1]
