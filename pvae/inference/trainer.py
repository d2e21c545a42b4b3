"""The state of one training run and its single step; the loop around it is in :mod:`pvae.inference.fit`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.data import Batch

from .engine import make_engine
from .isolation import Generators, device_of, isolated_rng
from .objective import ELBO
from .program import SiteRecorder, load_program_state, parameters_of, program_state
from .schedule import Schedule, schedule, warm_up

__all__ = ["NonFiniteLoss", "OptimizerChoice", "Trainer", "arguments"]

# Prefix, in a checkpoint, of what a model has beside its state that only training needs.
_BESIDE = "training."

OptimizerChoice = str | Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the term, the step and the data of its batch."""


class Trainer:
    """Model, guide, optimiser and random generator of one run, moved one step at a time.

    It draws from generators of its own and gives the process's back after every block, so two trainers
    that take turns train exactly as each alone. Nothing in a step waits for the device.

    A model may ask to be told more than a program is (:class:`pvae.alignment.AlignedModel` does), by methods:
    ``check_data(num_data)`` once, before training; ``on_batch(index)`` with the positions of the data of a
    batch, before the check; ``on_step(args, index, step, total_steps)`` before each step, inside
    :meth:`generator`; ``training_state()`` and ``load_training_state(tensors)``, for what it has beside its
    state that the next step depends on.

    Args:
        model: The model program.
        guide: The guide program.
        total_steps: Length of the run, for the schedule.
        objective: What is minimised.
        optimizer: ``"adam"``, ``"adamw"``, ``"adamax"``, ``"sgd"``, or a function of the parameters.
        lr: Learning rate, before the schedule.
        rates: Schedule of the learning rate.
        beta_steps: Steps over which the KL weight rises from 0 to 1; 0 for none.
        grad_clip: Largest gradient norm (of the loss in nats per datum); ``None`` for no clipping.
        ema: Decay of an exponential moving average of the parameters; ``None`` for none.
        engine: ``"eager"`` or ``"graph"``.
        compile: Whether the graph engine compiles its graph.
        seed: Seed of this run's generator.
        window: Steps whose losses are kept on the device until they are read.

    Raises:
        TypeError: If a program is not an ``nn.Module``.
        ValueError: For a setting out of its range, or programs without trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        *,
        total_steps: int,
        objective: ELBO | None = None,
        optimizer: OptimizerChoice = "adam",
        lr: float = 1e-3,
        rates: str | Schedule | None = None,
        beta_steps: float = 0,
        grad_clip: float | None = None,
        ema: float | None = None,
        engine: str = "eager",
        compile: bool = True,
        seed: int = 0,
        window: int = 100,
    ) -> None:
        _check_settings(lr, beta_steps, grad_clip, ema)
        self.model, self.guide = model, guide
        self.objective = objective if objective is not None else ELBO()
        self.parameters = [parameter for _, parameter in parameters_of(model, guide)]
        if not self.parameters:
            raise ValueError("model and guide must have trainable parameters, got none")
        self.device = device_of(model, guide)
        self.total_steps, self.lr, self.grad_clip, self.ema = total_steps, lr, grad_clip, ema
        self.rates, self.beta_steps = schedule(rates), beta_steps
        self.optimizer = _optimizer(optimizer, self.parameters, lr)
        self.engine = make_engine(engine, self.objective, model, guide, compile)
        self.averages = [p.detach().clone() for p in self.parameters] if ema is not None else []
        self.step_count = 0
        self._beta = torch.zeros((), device=self.device, dtype=self.parameters[0].dtype)
        self._losses: Tensor | None = None
        self._window, self._filled = window, 0
        with isolated_rng(self.device, seed):
            self._generators = Generators.now(self.device)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.lr * self.rates(self.step_count, self.total_steps)

    @property
    def beta(self) -> float:
        """The KL weight of the next step."""
        return warm_up(self.step_count, self.beta_steps)

    @contextmanager
    def generator(self) -> Iterator[None]:
        """Run a block on this run's random generator, with Pyro's validation off."""
        with isolated_rng(self.device), pyro.validation_enabled(False):
            self._generators.resume(self.device)
            try:
                yield
            finally:
                self._generators = Generators.now(self.device)

    def check(self, batch: Batch) -> None:
        """Run both programs once on a batch with Pyro's validation on, changing nothing.

        Raises:
            ValueError: In one sentence, for data outside the likelihood's support or of another shape than
                the model's, sites outside the plate, latents that differ, or a latent that cannot be
                reparameterised.
        """
        likelihood_check = getattr(getattr(self.model, "likelihood", None), "check", None)
        if likelihood_check is not None:
            likelihood_check(batch.x)
        args = self.arguments(batch)
        on_batch = getattr(self.model, "on_batch", None)
        if on_batch is not None:
            on_batch(batch.index)
        labels_check = getattr(self.model, "check_labels", None)
        if labels_check is not None and len(args) > 1:
            labels_check(args[1])
        with (
            isolated_rng(self.device, 0),
            pyro.validation_enabled(True),
            torch.no_grad(),
            _buffers_kept(self.model, self.guide),
        ):
            with SiteRecorder() as recorder:
                self.model(*args)
            for name, site in recorder.sites.items():
                if site.value is batch.x and site.fn.event_shape != batch.x.shape[1:]:
                    shapes = f"{tuple(batch.x.shape[1:])}, got {tuple(site.fn.event_shape)}"
                    raise ValueError(
                        f"the likelihood at site {name!r} must have event_shape {shapes}: "
                        "build the decoder with likelihood.param_shape(x_shape)"
                    )
            self.objective.terms(self.model, self.guide, *args)

    def arguments(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the programs are called with: ``x``, and ``y`` too for a model that says it is conditional."""
        return arguments(self.model, batch)

    def step(self, batch: Batch) -> None:
        """Take one optimisation step; call it inside :meth:`generator`."""
        self._beta.fill_(self.beta)
        args = self.arguments(batch)
        on_step = getattr(self.model, "on_step", None)
        if on_step is not None:
            on_step(args, batch.index, self.step_count, self.total_steps)
        losses = self.engine(args, self._beta)
        if self.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.grad_clip, foreach=True)
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step_count += 1
        if self.ema is not None:
            # The decay starts low, so that a short run is not held by its random start.
            decay = min(self.ema, self.step_count / (self.step_count + 10))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        if self._losses is None or self._losses.shape[1] != len(losses):
            self._losses = losses.new_zeros(self._window, len(losses))
        self._losses[self._filled] = losses
        self._filled += 1

    @property
    def window_full(self) -> bool:
        """Whether the kept losses must be read before the next step."""
        return self._filled == self._window

    def read_losses(self) -> dict[str, float]:
        """Mean of each part of the loss over the kept steps, nats per datum; the one place that waits.

        Raises:
            NonFiniteLoss: If one was NaN or infinite.
        """
        losses = self.check_losses()
        self._filled = 0
        return dict(zip(self.engine.names, losses.mean(0).tolist(), strict=True)) if len(losses) else {}

    def check_losses(self) -> Tensor:
        """Return the kept losses, shape ``(steps, parts)``, or raise as :meth:`read_losses` does."""
        if self._losses is None or not self._filled:
            return torch.zeros(0, 0)
        losses = self._losses[: self._filled].double().cpu()
        bad = ~losses.isfinite()
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            parts = [
                n for n, b in zip(self.engine.names, bad[row].tolist(), strict=True) if b and n != "loss"
            ]
            raise _NonFinite(parts[0] if parts else "loss", self.step_count - self._filled + row)
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averaged parameters in the programs for a block, if there are any."""
        if not self.averages:
            yield
            return
        raw = [p.detach().clone() for p in self.parameters]
        self.use(self.averages)
        try:
            yield
        finally:
            self.use(raw)

    def use(self, values: list[Tensor]) -> None:
        """Copy values into the parameters."""
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.parameters], values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the next step depends on: tensors, and the rest as JSON."""
        tensors = program_state(self.model, self.guide)
        moments: dict[str, Any] = self.optimizer.state_dict()["state"]
        tensors |= {
            f"optimizer.{i}.{key}": torch.as_tensor(value)
            for i, state in moments.items()
            for key, value in state.items()
        }
        tensors |= {f"ema.{i}": average for i, average in enumerate(self.averages)}
        tensors |= {f"rng.{name}": state for name, state in self._generators.tensors.items()}
        beside: dict[str, Tensor] = getattr(self.model, "training_state", dict)()
        tensors |= {f"{_BESIDE}{name}": tensor for name, tensor in beside.items()}
        if self._losses is not None:
            tensors["losses"] = self._losses[: self._filled]
        meta = {
            "step": self.step_count,
            "names": list(self.engine.names),
            "rng": self._generators.meta,
        }
        return tensors, meta

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Take up a state that :meth:`state` returned.

        Raises:
            RuntimeError: If it is of other programs.
        """
        beside = {n.removeprefix(_BESIDE): t for n, t in tensors.items() if n.startswith(_BESIDE)}
        load = getattr(self.model, "load_training_state", None)
        if load is not None:
            load(beside)
        elif beside:
            raise RuntimeError(
                f"the saved model has a training state ({next(iter(beside))}), this one has none"
            )
        load_program_state(self.model, self.guide, tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        for i, average in enumerate(self.averages):
            average.copy_(tensors[f"ema.{i}"])
        states = {n.removeprefix("rng."): t for n, t in tensors.items() if n.startswith("rng.")}
        self._generators = Generators(states, meta["rng"])
        self.step_count = meta["step"]
        self.engine.names = tuple(meta["names"])
        losses = tensors.get("losses")
        if losses is not None and losses.numel():
            self._losses = losses.new_zeros(self._window, losses.shape[1]).to(self.device)
            self._losses[: len(losses)] = losses.to(self.device)
            self._filled = len(losses)


def arguments(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """What programs are called with: ``x``, and ``y`` too for a model that says it is conditional."""
    if batch.y is not None and getattr(model, "conditional", False):
        return batch.x, batch.y
    return (batch.x,)


@contextmanager
def _buffers_kept(*programs: nn.Module) -> Iterator[None]:
    """Give the programs' buffers (running statistics) back as they were after a block."""
    before = [(buffer, buffer.clone()) for program in programs for buffer in program.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class _NonFinite(NonFiniteLoss):
    """Carries what the loop needs to name the batch."""

    def __init__(self, part: str, step: int) -> None:
        super().__init__(f"{part} became non-finite at step {step}")
        self.part, self.step = part, step


def _optimizer(choice: OptimizerChoice, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if not isinstance(choice, str):
        return choice(parameters)
    if choice == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    if choice == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, fused=True)
    if choice == "adamax":
        return torch.optim.Adamax(parameters, lr=lr, foreach=True)
    if choice == "sgd":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    raise ValueError(f"optimizer must be adam, adamw, adamax, sgd or a function, got {choice!r}")


def _check_settings(lr: float, beta_steps: float, grad_clip: float | None, ema: float | None) -> None:
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if beta_steps < 0:
        raise ValueError(f"beta_warmup must not be negative, got {beta_steps}")
    if grad_clip is not None and not grad_clip > 0:
        raise ValueError(f"grad_clip must be positive, got {grad_clip}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must lie between 0 and 1, got {ema}")
