"""What one round of training is, and whether a step of it waits for its device."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.data import Split
from pvae.inference.trainer import Trainer

from ..program import Program

__all__ = ["BATCH_SIZE", "SyncCounter", "count_syncs", "placed", "training"]

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


def count_syncs(program: Program, split: Split, engine: str, **settings: Any) -> int:
    """Count the host synchronisations of one training step, drawing of the batch included.

    The graph engine is counted by its graph, before compilation: inductor adds no wait. ``settings`` are
    those of the trainer.
    """
    trainer = Trainer(*program, total_steps=2, engine=engine, compile=False, window=2, **settings)
    with trainer.generator():
        batches = split.batches(min(BATCH_SIZE, len(split) // 2), seed=0, epoch=0, drop_last=True)
        trainer.step(next(batches))  # traces, and makes the optimiser's state
        # Optimisers that are not fused read their step counters, and keep them on the host for that.
        counters = (state["step"] for state in trainer.optimizer.state.values() if "step" in state)
        with SyncCounter(counters) as counter:
            trainer.step(next(batches))
    return counter.count


def placed(program: Program, device: torch.device) -> Program:
    return Program(program.model.to(device), program.guide.to(device))


def training(
    program: Program, split: Split, engine: str, steps: int, batch_size: int = BATCH_SIZE, **settings: Any
) -> Callable[[], object]:
    """Return one round of what the inside of :func:`pvae.fit` does between two rows of its history.

    ``settings`` are those of the trainer.
    """
    trainer = Trainer(*program, total_steps=10**9, engine=engine, window=steps, **settings)

    def run() -> dict[str, float]:
        epoch = trainer.step_count // steps
        with trainer.generator():
            for batch in split.batches(batch_size, seed=0, epoch=epoch, drop_last=True):
                trainer.step(batch)
        return trainer.read_losses()

    return run
