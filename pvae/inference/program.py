"""Running a Pyro program once and keeping, site by site, what an objective or an evaluation needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae.alignment import TRAINING_ONLY

__all__ = [
    "Program",
    "Site",
    "SiteRecorder",
    "load_program_state",
    "parameters_of",
    "particle_plate",
    "program_state",
    "registered",
]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """One sample statement as it was executed: its distribution, its value, and Pyro's weights on it."""

    name: str
    fn: Any
    value: Any
    observed: bool
    scale: float | Tensor
    mask: Any
    # What a factor is made of that belongs to training alone: "draw" or "expectation".
    training_only: str | None = None

    @property
    def is_factor(self) -> bool:
        """Whether this is a ``pyro.factor`` statement, which is a term of an objective, not of a density."""
        return isinstance(self.fn, dist.Unit)

    @cached_property
    def bare_log_prob(self) -> Tensor:
        """Log-density of the value in nats, neither masked nor scaled, computed once."""
        return self.fn.log_prob(self.value)

    def log_prob(self) -> Tensor:
        """Log-density of the value in nats, masked but not scaled; shape: the site's batch shape."""
        return scale_and_mask(self.bare_log_prob, 1.0, self.mask)

    def scaled_log_prob(self) -> Tensor:
        """Log-density with the scale that ``poutine.scale`` or a subsampling plate put on the site."""
        return self.scaled(self.bare_log_prob)

    def scaled(self, log_prob: Tensor) -> Tensor:
        """Put the site's scale and mask on a quantity of the site's batch shape."""
        return scale_and_mask(log_prob, self.scale, self.mask)


class SiteRecorder(Messenger):
    """Collect the sample sites of a program without building a trace; replay values where given.

    A ``pyro.poutine.trace`` node carries log-probabilities, summed and scaled, and synchronises with
    the device to check them. Everything here stays lazy, per datum and on the device.

    Args:
        values: Values for latent sites of the same name; they are not drawn again.
        replace: Called with every latent site's name and distribution before a value is drawn; its result
            takes the distribution's place.
    """

    def __init__(
        self, values: Mapping[str, Tensor] | None = None, replace: Callable[[str, Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.values = values or {}
        self.replace = replace
        self.sites: dict[str, Site] = {}

    def __enter__(self) -> "SiteRecorder":
        self.sites = {}
        super().__enter__()
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        if self.replace is not None:
            msg["fn"] = self.replace(msg["name"], msg["fn"])
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":  # a plate's own index draw
            return
        name = msg["name"]
        if name in self.sites:
            raise ValueError(f"sample sites must have different names, got {name!r} twice")
        mark = (msg["infer"] or {}).get(TRAINING_ONLY)
        self.sites[name] = Site(
            name, msg["fn"], msg["value"], bool(msg["is_observed"]), msg["scale"], msg["mask"], mark
        )


def particle_plate(num_particles: int) -> Any:
    """The outer plate, at dim -2, over Monte-Carlo particles."""
    return pyro.plate("particles", num_particles, dim=-2)


def parameters_of(*programs: Program) -> list[tuple[str, nn.Parameter]]:
    """Name the trainable parameters of several programs once each, in a stable order.

    A part that two programs share (an encoder inside a prior) is listed under the first one's name.

    Raises:
        TypeError: If a program is not an ``nn.Module``.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for label, program in zip(("model", "guide"), programs, strict=False):
        if not isinstance(program, nn.Module):
            raise TypeError(f"{label} must be an nn.Module to be trained, got {type(program).__name__}")
        for name, parameter in program.named_parameters():
            if parameter.requires_grad:
                found.setdefault(id(parameter), (f"{label}.{name}", parameter))
    return list(found.values())


def program_state(model: Program, guide: Program) -> dict[str, Tensor]:
    """Parameters and persistent buffers of both programs under their checkpoint names."""
    return {
        f"{label}.{name}": tensor
        for label, program in (("model", model), ("guide", guide))
        if isinstance(program, nn.Module)
        for name, tensor in program.state_dict().items()
        if isinstance(tensor, Tensor)
    }


def load_program_state(model: nn.Module, guide: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what :func:`program_state` returned back into the programs; other names are passed over.

    Raises:
        RuntimeError: If names or shapes do not fit, before anything is changed.
    """
    parts = []
    for label, program in (("model", model), ("guide", guide)):
        own = {name.removeprefix(f"{label}."): t for name, t in state.items() if name.startswith(f"{label}.")}
        theirs = {name: tensor.shape for name, tensor in program.state_dict().items()}
        found = {name: tensor.shape for name, tensor in own.items()}
        if theirs != found:
            odd = sorted(n for n in theirs.keys() | found.keys() if theirs.get(n) != found.get(n))
            raise RuntimeError(
                f"{label} has another {odd[0]}: {_shape(theirs, odd[0])} here, {_shape(found, odd[0])} saved"
            )
        parts.append((program, own))
    for program, own in parts:
        program.load_state_dict(own)


def registered(program: nn.Module, name: str) -> Program:
    """Wrap a program for stock :class:`pyro.infer.SVI`, which trains only what ``pyro.module`` registered.

    Without it SVI runs, prints losses and moves no parameter.

    Args:
        program: A model or guide.
        name: Prefix of its parameters in Pyro's param store; different for model and guide.

    Returns:
        A callable with the program's arguments.

    Raises:
        TypeError: If ``program`` is not an ``nn.Module``.
    """
    if not isinstance(program, nn.Module):
        raise TypeError(f"program must be an nn.Module, got {type(program).__name__}")
    return _Registered(program, name)


@dataclass(frozen=True)
class _Registered:
    """Calls a module after registering its parameters; ``program`` is the module itself."""

    program: nn.Module
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pyro.module(self.name, self.program)
        return self.program(*args, **kwargs)


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "absent"
