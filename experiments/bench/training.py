"""What one round of training is, and whether a step of it waits for its device."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.data import Batch, Split
from pvae.inference.trainer import Trainer

from ..program import Program, SpecError

__all__ = [
    "BATCH_SIZE",
    "OpCounter",
    "StepCounts",
    "SyncCounter",
    "count_step",
    "count_syncs",
    "placed",
    "prepare",
    "training",
]

BATCH_SIZE = 128
_SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class SyncCounter(TorchDispatchMode):
    """Counts operations that wait for the device, such as ``.item()`` and ``bool(tensor)``.

    Args:
        on_host: Tensors that stay on the host wherever the programs run: reading one waits for nothing.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.count = 0
        self._on_host = {id(tensor) for tensor in on_host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in _SYNCS and not (args and id(args[0]) in self._on_host)
        return func(*args, **(kwargs or {}))


class OpCounter(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher, those of backward passes and optimisers too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class StepCounts(NamedTuple):
    """What one training step does, in numbers that no clock disturbs.

    Attributes:
        operations: Operations that reach torch's dispatcher.
        syncs: Those at which Python waits for the device.
    """

    operations: int
    syncs: int


def count_step(
    program: Program, split: Split, engine: str, batch_size: int = BATCH_SIZE, **settings: Any
) -> StepCounts:
    """Count what one training step does, drawing of the batch included.

    Every other engine is counted as ``"traced"``, by the graph that it compiles or captures: inductor adds no
    wait.

    Args:
        program: Model and guide, on their device.
        split: The data, on the same; a batch is at most half of them.
        engine: ``"eager"``, or any other.
        batch_size: Data per step.
        **settings: Those of the trainer.
    """
    engine = "eager" if engine == "eager" else "traced"
    trainer = Trainer(*program, total_steps=2, engine=engine, compile=False, window=2, **settings)
    batch_size = min(batch_size, len(split) // 2)
    batches = split.batches(batch_size, seed=0, epoch=0, drop_last=True)
    prepare(trainer, split, batch_size)
    with trainer.generator():
        trainer.step(next(batches))  # traces, and makes the optimiser's state
        # Optimisers that are not fused read their step counters, and keep them on the host for that.
        counters = (state["step"] for state in trainer.optimizer.state.values() if "step" in state)
        with OpCounter() as operations, SyncCounter(counters) as syncs:
            trainer.step(next(batches))
    return StepCounts(operations.count, syncs.count)


def count_syncs(program: Program, split: Split, engine: str, **settings: Any) -> int:
    """Count the host synchronisations of one training step, as :func:`count_step` does."""
    return count_step(program, split, engine, **settings).syncs


def prepare(trainer: Trainer, split: Split, batch_size: int) -> None:
    """Run both programs once on a batch and check them, as :func:`pvae.fit` does before the first step."""
    trainer.check(next(split.batches(batch_size, seed=0, epoch=0, drop_last=True)))


def placed(program: Program, device: torch.device) -> Program:
    return Program(program.model.to(device), program.guide.to(device))


def training(
    program: Program, split: Split, engine: str, steps: int, batch_size: int = BATCH_SIZE, **settings: Any
) -> Callable[[], object]:
    """Return one round of what the inside of :func:`pvae.fit` does between two rows of its history.

    ``settings`` are those of the trainer. What is called raises SpecError where the trainer does something
    else than was asked for.
    """
    trainer = Trainer(*program, total_steps=10**9, engine=engine, window=steps, **settings)
    prepare(trainer, split, batch_size)

    def run() -> dict[str, float]:
        epoch = trainer.step_count // steps
        with trainer.generator():
            for batch in islice(_batches(trainer, split, batch_size, epoch), steps):
                trainer.step(batch)
        if trainer.notes:
            raise SpecError(trainer.notes[0])
        return trainer.read_losses()

    return run


def _batches(trainer: Trainer, split: Split, batch_size: int, epoch: int) -> Iterator[Batch | Tensor]:
    """Batches of one epoch after the other, as the trainer takes them."""
    return chain.from_iterable(trainer.batches(split, batch_size, seed=0, epoch=e) for e in count(epoch))
