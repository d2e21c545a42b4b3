"""Every recipe, small: the same seed gives the same bytes, whatever drew, measured or stopped in between."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae.data import Data
from pvae.evaluation import active_units, latent_scores, layer_report, log_likelihood
from pvae.experiments import Spec, load_spec
from pvae.experiments.aligning import aligned, estimate
from pvae.experiments.monitors import jacobian_monitor
from pvae.experiments.program import Program
from pvae.experiments.spec import recipes
from pvae.experiments.stages import pretrain
from pvae.inference import Run, Trainer, fit, measure_sigma
from pvae.inference.program import program_state
from pvae.likelihoods import Normal

from .test_recipes import FOR_A_GPU, NARROW, _load, _short

ROOT = Path(__file__).parents[2]
STEPS = 3
SIZES = {"train": 48, "valid": 4, "test": 4}
# Widths of the largest networks, and numbers of what is made of data or drawn as data.
LESS = {
    "cvae-nf-celeba": ["encoder.channels=[8, 8, 8, 8]", "decoder.channels=[8, 8, 8, 8]"],
    "cvae-nf-sprites": ["data.num_train=200"],
    "divae-synthetic": ["data.num_train=200", "align.max_neighbors=20"],
    "divae-mnist-direct": ["align.max_neighbors=20"],
    "divae-mnist-flow": ["align.max_neighbors=20"],
    "dvp-mnist-small": NARROW,
    "five-cifar10": ["encoder.hidden=[16]", "decoder.hidden=[16]"],
    "hvae-mnist": ["prior.components=20"],
    "vampprior-mnist": ["prior.components=20"],
    **{f"x-vae-{data}": ["autoencoder.batch_size=32"] for data in ("digits", "mnist", "fashion")},
}
LADDERS = ("ladder", "hvae")
TINY = ["z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]


class Stopped(Exception):
    """Training was cut on purpose."""


def small(name: str) -> tuple[Spec, Data]:
    """A recipe with its data, or a stand-in of their shape."""
    spec = _short(name, *LESS.get(name, []))
    data = _load(spec)
    parts = {part: getattr(data, part)[: SIZES[part]] for part in data.parts}
    return spec, Data(parts, protocol=data.protocol, num_classes=data.num_classes)


def prepare(spec: Spec, data: Data) -> tuple[Program, Any]:
    """What a run does before its training: build, first stage, alignment. Returns the bare pair and the one
    that is trained.
    """
    program = spec.build(data)
    if spec.autoencoder is not None:
        pretrain(spec, program, data, progress=False)
    if spec.align is None:
        return program, program
    return program, aligned(spec, program, data, estimate(spec.align, data))


def train(spec: Spec, data: Data, pair: Any, **more: Any) -> Run:
    """Train for three steps of eight data, a row for each."""
    model, guide = pair
    small: dict[str, Any] = {"epochs": None, "steps": STEPS, "batch_size": 8, "log_every": 1}
    plain: dict[str, Any] = {"engine": "eager", "patience": None, "progress": False}
    return fit(model, guide, data, **spec.fit.arguments() | small | plain | more)


def weights(program: Program) -> str:
    """Names and bytes of all parameters and buffers."""
    return digest(program_state(*program))


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def judged(data: Data, program: Program) -> str:
    """Bytes of what evaluation says of a few held-out data."""
    estimate = log_likelihood(*program, data.test[:3], num_particles=3, progress=False)
    return digest({"log_prob": estimate.log_prob, "pareto_k": estimate.pareto_k, "ess": estimate.ess})


def disturb() -> None:
    """Leave all global generators in a state that nobody foresaw."""
    torch.manual_seed(20_261_121)
    np.random.seed(11)  # noqa: NPY002
    random.seed(21)
    torch.rand(3)


def measure(spec: Spec, data: Data, run: Run) -> None:
    """Everything that may be asked between two steps of training; draws of its own go on meanwhile."""
    disturb()
    model, guide, test = run.model, run.guide, data.test
    if getattr(getattr(model, "likelihood", None), "profiled", False):
        measure_sigma(model, guide, data.train[:16])
    log_likelihood(model, guide, test[:3], num_particles=2, progress=False)
    if spec.model.kind in LADDERS:
        layer_report(model, guide, test[:3], num_samples=2, progress=False)
    else:
        latent_scores(model, guide, test[:3], num_samples=2, progress=False)
        active_units(model, guide, test[:3], num_draws=2, num_bootstrap=4)
    y = test[:2].y if getattr(model, "conditional", False) else None
    bare: Any = getattr(model, "program", model)
    bare.sample(2, y) if y is not None else bare.sample(2)
    disturb()


@pytest.mark.parametrize("name", list(recipes()))
def test_a_recipe_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Once straight on, most from a graph; once by the programs, with other generators around, measured after
    the first step, stopped after the second, and taken up again.
    """
    spec, data = small(name)
    program, pair = prepare(spec, data)
    # The deep ladders take ten seconds to record, and have no layer that the small ones lack.
    straight = train(spec, data, pair, engine="eager" if name in FOR_A_GPU else "traced")
    wanted, said = weights(program), judged(data, program)

    def look(run: Run, row: dict[str, float]) -> None:
        if row["step"] == 2:
            raise Stopped
        measure(spec, data, run)

    disturb()
    spec, data = small(name)
    program, pair = prepare(spec, data)
    monitor = jacobian_monitor(program, data)
    watching = [look] if monitor is None else [monitor, look]
    with pytest.raises(Stopped):
        train(spec, data, pair, out=tmp_path / "run", checkpoint_every=0, callbacks=watching)
    disturb()
    program, pair = prepare(spec, data)
    resumed = train(spec, data, pair, out=tmp_path / "run", resume=True)
    assert weights(program) == wanted
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in straight.history]
    disturb()
    assert judged(data, program) == said


IN_A_PROCESS = """
import torch
from tests.experiments.test_determinism import judged, prepare, small, train, weights
torch.set_num_threads(1)
for name in {names}:
    spec, data = small(name)
    program, pair = prepare(spec, data)
    train(spec, data, pair)
    print(weights(program), judged(data, program))
"""


def test_another_process_gives_the_same_bytes() -> None:
    """With another order of sets and dictionaries' hashes, and nothing imported before."""
    names = ["vae", "x-vae-digits"]
    wanted = []
    for name in names:
        spec, data = small(name)
        program, pair = prepare(spec, data)
        train(spec, data, pair)
        wanted.append(f"{weights(program)} {judged(data, program)}")
    environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_A_PROCESS.format(names=names)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == wanted


def streams(*overrides: str) -> dict[str, str]:
    """What each purpose draws, on programs and data that the others' seeds do not move."""
    spec = load_spec("vae", ["data.binarize=static", *TINY, *overrides])
    data = spec.load_data()
    fixed, x = load_spec("vae", ["data.binarize=static", *TINY]).build(data), torch.zeros(4, 1, 8, 8)
    seed = spec.fit.arguments()["seed"]
    order = next(data.train.batches(8, seed=seed, epoch=0, drop_last=True)).index
    trainer = Trainer(*fixed, total_steps=1, seed=seed)
    with trainer.generator():
        noise = torch.rand(4)
    estimate = log_likelihood(*fixed, x, num_particles=3, seed=spec.evaluate.seed, progress=False)
    return {
        "initialisation": weights(spec.build(data)),
        "order": digest({"": order}),
        "draws": digest({"": noise}),
        "binarisation": digest({"": data.test.x}),
        "evaluation": digest({"": estimate.log_prob}),
    }


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("fit.seed=1", {"initialisation", "order", "draws"}),
        ("data.seed=1", {"binarisation"}),
        ("evaluate.seed=1", {"evaluation"}),
    ],
)
def test_a_seed_moves_what_it_is_for_and_nothing_else(override: str, moved: set[str]) -> None:
    before, after = streams(), streams(override)
    assert {name for name in before if before[name] != after[name]} == moved


def test_order_and_draws_follow_from_the_seed_on_their_own() -> None:
    """Draws do not move the order, nor does the order move the draws; fitted statistics move neither."""
    spec = load_spec("vae", TINY)
    data = spec.load_data()
    batches = [list(data.train.batches(400, seed=0, epoch=2, drop_last=True)) for _ in range(2)]
    assert all(torch.equal(a.index, b.index) for a, b in zip(*batches, strict=True))
    # Binarised anew, with other noise.
    assert not torch.equal(batches[0][0].x, batches[1][0].x)
    found = []
    for measured in (False, True):
        program = spec.build(data)
        program.model.likelihood = Normal("batch")
        trainer = Trainer(*program, total_steps=3, seed=5)
        if measured:
            measure_sigma(*program, data.train[:16], seed=9)
        with trainer.generator():
            found.append(torch.rand(4))
    assert torch.equal(*found)


def test_validation_draws_the_same_whatever_the_seed_of_the_run() -> None:
    spec = load_spec("vae", TINY)
    data = spec.load_data()
    losses = []
    for seed in (0, 1):
        program = load_spec("vae", TINY).build(data)
        # A rate at which no weight moves: only the draws of training and its order differ.
        run = fit(*program, data, steps=2, lr=1e-30, seed=seed, progress=False)
        losses.append((run.history[-1]["valid_loss"], run.history[-1]["loss"]))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
