"""The step and the evaluation of every recipe, as ratios to what its networks alone cost."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import pvae
from pvae.data import Data, DataError, MissingData, from_tensors
from pvae.inference import ELBO, measure_sigma
from pvae.inference.trainer import Trainer

from ..aligning import aligned, estimate
from ..program import Program, SpecError
from ..spec import Spec, load_spec
from ..stages import pretrain
from .floor import Floor, Recorder
from .timing import Row, clock_of, interleave, left_out, row
from .training import count_step, placed, training

__all__ = ["LIMITS", "Limits", "Recipe", "drawn_data", "time_recipe"]


@dataclass(frozen=True)
class Limits:
    """What bounds the sizes, in operations of the networks alone (two for a multiplication and an addition).

    Sizes follow from counts and not from a clock, so that two machines time the same thing. A core does
    about 3e10 operations in a second.

    Attributes:
        step: Of the largest step, forward and backward: a larger batch is halved until it fits.
        evaluation: Of the largest evaluation: particles are halved until it fits.
        round: As many steps are a round.
        max_steps: Most steps of a round.
        evaluations: Evaluations of a round, where one has fewer operations than that.
        num_rows: Most training data.
        num_data: Data to evaluate: as many as the guide sees at once.
        num_particles: Most particles.
    """

    step: float = 6e10
    evaluation: float = 3.2e10
    round: float = 6e9
    max_steps: int = 40
    evaluations: int = 5
    num_rows: int = 1536
    num_data: int = 32
    num_particles: int = 64


LIMITS = Limits()

# Next to nothing: any number of steps on few data leaves the parameters where they are, and costs the same.
_LR = 1e-9

# Shape, number of classes and binarisation by default of the data sets that are files.
_FILES: dict[str, tuple[tuple[int, ...], int, str | None]] = {
    "mnist": ((1, 28, 28), 10, "dynamic"),
    "fashion_mnist": ((1, 28, 28), 10, None),
    "kmnist": ((1, 28, 28), 10, "dynamic"),
    "emnist": ((1, 28, 28), 26, "dynamic"),
    "omniglot": ((1, 28, 28), 50, "dynamic"),
    "freyfaces": ((1, 28, 20), 0, None),
    "cifar10": ((3, 32, 32), 10, None),
}


class Recipe:
    """A recipe as it is timed: few data, a first stage of one epoch, a target of alignment where it has one.

    Args:
        name: Its name.
        device: Where to run.

    Attributes:
        name: Its name.
        spec: Its spec.
        drawn: Whether its data are noise of their shape, as the files are not there.

    Raises:
        SpecError: If it cannot be built.
        pvae.data.DataError: If its data cannot be had, nor drawn.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        spec = load_spec(name)
        self.name = name
        self.spec = spec if spec.autoencoder is None else load_spec(name, ["autoencoder.epochs=1"])
        self._device = device
        try:
            data, self.drawn = self.spec.load_data(), False
        except MissingData:
            data, self.drawn = drawn_data(self.spec, LIMITS.num_rows), True
        self._data = _few(data, LIMITS.num_rows)
        self.train = self._data.train.to(device)
        # Few data are told that they are few: warnings about codes and targets mean nothing here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.program = placed(self.spec.build(self._data), device)
            if self.spec.autoencoder is not None:
                pretrain(self.spec, self.program, self._data, device=device, progress=False)
            align = self.spec.align
            self._target = None if align is None else estimate(align, self._data, progress=False)

    def pair(self) -> Program:
        """What is trained: a copy of model and guide, with its alignment."""
        program = copy.deepcopy(self.program)
        if self._target is None:
            return program
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Program(*aligned(self.spec, program, self._data, self._target, self._device))

    def settings(self) -> dict[str, Any]:
        """Arguments of the trainer, but for the learning rate."""
        keys = self.spec.fit.arguments()
        same = {name: keys[name] for name in ("optimizer", "grad_clip", "ema")}
        objective = ELBO(keys["objective"], keys["num_particles"], keys["free_bits"])
        return {"objective": objective, "rates": keys["schedule"], "lr": _LR, **same}

    def floor(self, batch_size: int) -> Floor:
        """Record one step, and return what its networks alone do in it."""
        trainer = Trainer(*self.pair(), total_steps=10**9, **self.settings())
        batch = next(self.train.batches(batch_size, seed=0, epoch=0, drop_last=True))
        trainer.check(batch)
        with trainer.generator(), Recorder() as recorder:
            trainer.step(batch)
        return Floor(recorder.calls, trainer)

    def batch_size(self) -> tuple[int, float, float]:
        """Return the batch size that is timed, the operations of a step, and what each datum adds to them."""
        size = min(int(self.spec.fit.arguments()["batch_size"]), len(self.train))
        one = self.floor(1).flops()
        if 2 * one > LIMITS.step:
            return 1, one, one
        each = self.floor(2).flops() - one
        while size > 1 and one + (size - 1) * each > LIMITS.step:
            size //= 2
        return size, one + (size - 1) * each, each

    def evaluation(self, num_particles: int) -> Callable[[], object]:
        """Return the evaluation of some held-out data under the recipe's own proposal."""
        model, guide = self.program
        if getattr(getattr(model, "likelihood", None), "profiled", False):
            measure_sigma(model, guide, self.train[: LIMITS.num_data])
        split = self._data.test[: LIMITS.num_data].to(self._device)
        return lambda: pvae.log_likelihood(model, guide, split, num_particles=num_particles, progress=False)


def time_recipe(name: str, device: torch.device, rounds: int, engines: tuple[str, ...]) -> list[Row]:
    """Time a recipe's training step and its evaluation, each beside the floor of its own networks.

    What the floor holds says :class:`.floor.Floor`. What is too large for minutes (:data:`LIMITS`) is timed
    on a smaller batch or fewer particles, or left out; the row says which.

    Args:
        name: The recipe.
        device: Where to run.
        rounds: Interleaved rounds.
        engines: Engines to time.

    Returns:
        A row for the step under each engine, and one for the evaluation. Beside what all rows have: ``size``,
        what was timed, and ``note``.
    """
    benchmark = f"recipe:{name}"
    try:
        recipe = Recipe(name, device)
    except (SpecError, DataError) as error:
        return [left_out(benchmark, f"{engine}, step", "networks", str(error)) for engine in engines]
    drawn = ["drawn data"] if recipe.drawn else []
    whole = int(recipe.spec.fit.arguments()["batch_size"])
    size, flops, each = recipe.batch_size()
    note = ", ".join([*drawn, *([] if size == whole else [f"batch {size}, not {whole}"])])
    try:
        steps = _steps(recipe, benchmark, device, rounds, engines, size, flops)
        rows = [found | {"size": f"batch {size}", "note": note} for found in steps]
    except SpecError as error:
        rows = [left_out(benchmark, f"{engine}, step", "networks", str(error)) for engine in engines]
    return [*rows, _evaluation(recipe, benchmark, device, rounds, each / 3)]


def _steps(
    recipe: Recipe,
    benchmark: str,
    device: torch.device,
    rounds: int,
    engines: tuple[str, ...],
    batch_size: int,
    flops: float,
) -> list[Row]:
    steps = max(1, min(LIMITS.max_steps, int(LIMITS.round / flops)))
    floor = recipe.floor(batch_size)

    contenders: dict[str, Callable[[], object]] = {"networks": _repeated(floor.step, steps)}
    for engine in engines:
        contenders[f"{engine}, step"] = training(
            recipe.pair(), recipe.train, engine, steps, batch_size, **recipe.settings()
        )
    # One batch beside the other needs two of them.
    few = min(batch_size, 2)
    syncs = {
        f"{engine}, step": count_step(recipe.pair(), recipe.train, engine, few, **recipe.settings()).syncs
        for engine in engines
    }
    seconds = interleave(contenders, rounds, clock_of(device))
    return [row(benchmark, ours, "networks", seconds, steps, None, count) for ours, count in syncs.items()]


def _evaluation(recipe: Recipe, benchmark: str, device: torch.device, rounds: int, each: float) -> Row:
    """Time the evaluation, where ``each`` operations for every datum and particle allow it."""
    particles = min(LIMITS.num_particles, recipe.spec.evaluate.num_particles)
    while particles > 2 and LIMITS.num_data * particles * each > LIMITS.evaluation:
        particles //= 2
    needed = LIMITS.num_data * particles * each
    if needed > LIMITS.evaluation:
        reason = f"{particles} particles for {LIMITS.num_data} data take over {needed:.0e} operations"
        return left_out(benchmark, "log_likelihood", "networks", reason)
    run = recipe.evaluation(particles)
    with Recorder() as recorder:
        run()
    floor, times = Floor(recorder.calls), 1 if needed > LIMITS.round else LIMITS.evaluations
    contenders = {"log_likelihood": _repeated(run, times), "networks": _repeated(floor.passes, times)}
    seconds = interleave(contenders, rounds, clock_of(device))
    found = row(benchmark, "log_likelihood", "networks", seconds, times, None, None)
    return found | {"size": f"{LIMITS.num_data} data, {particles} particles", "note": ""}


def _repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def drawn_data(spec: Spec, num: int) -> Data:
    """Draw noise of the shape, labels and encoding of a spec's data.

    Args:
        spec: The spec; its data are a set that is read from files.
        num: Number of training data.

    Raises:
        MissingData: If the set is not known here.
    """
    keys = spec.data.arguments()
    name = keys["name"]
    shape: tuple[int, ...]
    if name == "celeba":
        shape, classes, default = (3, *(keys.get("size", 86),) * 2), 0, None
    elif name in _FILES:
        shape, classes, default = _FILES[name]
    else:
        raise MissingData(f"the files of {name} are not there, and noise in place of them is not known")
    total = num + 2 * LIMITS.num_data
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (total, *shape), dtype=torch.uint8, generator=generator)
    y = torch.arange(total) % classes if classes else None
    if name == "celeba":
        columns = keys.get("attributes", 30)
        columns = columns if isinstance(columns, int) else len(columns)
        y = torch.randint(2, (total, columns), generator=generator).float()
    bounds = {
        "train": slice(num),
        "valid": slice(num, num + LIMITS.num_data),
        "test": slice(num + LIMITS.num_data, None),
    }
    plain = keys["scale"] != "count" and not keys["dequantize"]
    binarize = (default if plain else None) if keys["binarize"] == "default" else keys["binarize"]
    return from_tensors(
        *(x[part] for part in bounds.values()),
        y=None if y is None else {part: y[where] for part, where in bounds.items()},
        name=name,
        binarize=binarize,
        scale=keys["scale"],
        dequantize=keys["dequantize"],
        class_names=[str(label) for label in range(classes)] or None,
    )


def _few(data: Data, num: int) -> Data:
    """The first data of every part."""
    return Data(
        {part: getattr(data, part)[:num] for part in data.parts},
        protocol=data.protocol,
        num_classes=data.num_classes,
        log_density=data.log_density,
        log_density_intrinsic=data.log_density_intrinsic,
        truth=data.truth,
    )
