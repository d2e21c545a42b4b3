"""Running programs without leaving a trace on the process: generators, flags, param store, gradients."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

__all__ = ["Generators", "device_of", "evaluating", "isolated_rng"]


def device_of(*programs: Any) -> torch.device:
    """The device that holds the programs' parameters and buffers; the CPU where they have none.

    Raises:
        ValueError: If they lie on several devices.
    """
    modules = [program for program in programs if isinstance(program, nn.Module)]
    tensors: Iterator[Tensor] = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and guide must lie on one device, got {names}")
    return devices.pop() if devices else torch.device("cpu")


@dataclass(frozen=True)
class Generators:
    """State of the process's random generators, in what a checkpoint can hold.

    Attributes:
        tensors: ``cpu`` and, on a GPU, ``cuda`` (torch), ``numpy`` (the words of its global generator).
        meta: The rest of NumPy's and Python's states, as JSON.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> "Generators":
        """Read the generators of the CPU and of ``device``."""
        state: Any = np.random.get_state()  # noqa: NPY002
        kind, words, *rest = state
        tensors = {"cpu": torch.get_rng_state(), "numpy": torch.from_numpy(words.astype(np.int64))}
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        version, python_words, gauss = random.getstate()
        return cls(tensors, {"numpy": [kind, *rest], "python": [version, list(python_words), gauss]})

    @classmethod
    def saved(cls, tensors: dict[str, Tensor], meta: Any, device: torch.device) -> "Generators":
        """Take states out of a file, once they are tried: NumPy reads where its position points to.

        Raises:
            RuntimeError: If they are no states of the generators.
        """
        states = cls(tensors, meta)
        try:
            kind, position, has_gauss, _ = meta["numpy"]
            if kind != "MT19937" or position not in range(625) or has_gauss not in (0, 1):
                raise ValueError(f"{kind!r} at {position!r}")
            with isolated_rng(device):
                states.resume(device)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RuntimeError(f"the states of the generators are none: {error!r}") from None
        return states

    def resume(self, device: torch.device) -> None:
        """Make the generators go on from here."""
        torch.set_rng_state(self.tensors["cpu"])
        if "cuda" in self.tensors and device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["cuda"], device)
        kind, *rest = self.meta["numpy"]
        words = self.tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((kind, words, *rest))  # noqa: NPY002
        version, python_words, gauss = self.meta["python"]
        random.setstate((version, tuple(python_words), gauss))


@contextmanager
def isolated_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Give back every generator (torch, NumPy, Python) as it was; start from ``seed`` inside, if given."""
    before = Generators.now(device)
    try:
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  # the global generator is what others draw from
            random.seed(seed)
        yield
    finally:
        before.resume(device)


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Run programs in evaluation mode without gradients, and give everything back as it was.

    Training flags are restored module by module, Pyro's param store is a copy inside, torch's
    generators return to their state before, and Pyro's validation is off.
    """
    modules = {m: m.training for p in programs if isinstance(p, nn.Module) for m in p.modules()}
    store = pyro.get_param_store()
    with (
        isolated_rng(device_of(*programs)),
        store.scope(state=store.get_state()),
        pyro.validation_enabled(False),
        torch.no_grad(),
    ):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in modules.items():
                module.training = training
