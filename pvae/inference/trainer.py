"""The state of one training run and its single step; the loop around it is in :mod:`pvae.inference.fit`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.data import Batch, Split
from pvae.moments import moments, restore_moments

from .cuda_graph import CAPTURES, NotCapturable, WholeStep, capturable, obstacle
from .distributed import Team, shared_engine
from .door import one_precision
from .engine import AutoEngine, Engine
from .isolation import Generators, device_of, isolated_rng
from .objective import ELBO
from .precision import LowPrecision, check_precision
from .program import SiteRecorder, load_program_state, parameters_of, program_state
from .schedule import Schedule, schedule, warm_up
from .watch import Watch

__all__ = ["NonFiniteLoss", "OptimizerChoice", "Trainer", "arguments"]

# Prefix, in a checkpoint, of what a model has beside its state that only training needs.
_BESIDE = "training."

OptimizerChoice = str | Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class NonFiniteLoss(RuntimeError):
    """The loss, a gradient or a parameter became NaN or infinite, and training stopped.

    The message names the term or the parameter, the step and some of the data of its batch. The programs
    hold the parameters and buffers of the last row of the history before (or of the start), which were sound.

    Attributes:
        step: Number of the step, ``None`` where several may have been it.
        index: Positions of all data of its batch in their split, as far as they are known.
    """

    step: int | None = None
    index: tuple[int, ...] = ()


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
        engine: ``"eager"``, ``"graph"``, or ``"cuda_graph"``: the whole step captured, if it can be.
        compile: Whether the graph engine compiles its graph, and what is captured is such a graph.
        precision: ``"float32"``, or ``"bf16"``: the networks under autocast
            (:class:`~pvae.inference.precision.Networks`), in training alone.
        seed: Seed of this run's generator.
        window: Steps whose losses are kept on the device until they are read.
        team: The processes that share each batch, if there are several: each takes steps on its own share.

    Attributes:
        notes: What is done in another way than was asked for, and why, one sentence each.

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
        precision: str = "float32",
        seed: int = 0,
        window: int = 100,
        team: Team | None = None,
    ) -> None:
        _check_settings(lr, beta_steps, grad_clip, ema)
        check_precision(precision, model, guide)
        self.model, self.guide = model, guide
        self.objective = objective if objective is not None else ELBO()
        self.parameters = [parameter for _, parameter in parameters_of(model, guide)]
        if not self.parameters:
            raise ValueError("model and guide must have trainable parameters, got none")
        self.device = device_of(model, guide)
        self.total_steps, self.lr, self.grad_clip, self.ema = total_steps, lr, grad_clip, ema
        self.rates, self.beta_steps = schedule(rates), beta_steps
        self.optimizer = _optimizer(optimizer, self.parameters, lr)
        self.team = team if team is not None else Team()
        self.notes: list[str] = []
        self._compile = compile
        # What trains may compute in another precision than what validates.
        self._trained = (
            self.objective if precision == "float32" else LowPrecision(self.objective, model, guide)
        )
        self._whole: WholeStep | None = None
        self._rate: Tensor | None = None
        self._split: Split | None = None
        self._window, self._filled = window, 0
        self.engine = self._start(engine)
        self.averages = [p.detach().clone() for p in self.parameters] if ema is not None else []
        self.step_count = 0
        self._beta = torch.zeros((), device=self.device, dtype=self.parameters[0].dtype)
        self._losses: Tensor | None = None
        # How many of the kept losses are means over the team.
        self._averaged = 0
        self.watch = Watch(model, guide, window)
        with isolated_rng(self.device, self.team.seed(seed)):
            self._generators = Generators.now(self.device)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self._scalars(self.step_count)[1]

    @property
    def beta(self) -> float:
        """The KL weight of the next step."""
        return self._scalars(self.step_count)[0]

    @contextmanager
    def generator(self) -> Iterator[None]:
        """Run a block on this run's random generator, with Pyro's validation off."""
        with isolated_rng(self.device), pyro.validation_enabled(False), self.team.sharing():
            self._generators.resume(self.device)
            try:
                yield
            finally:
                self._generators = Generators.now(self.device)

    def check(self, batch: Batch) -> None:
        """Run both programs once on a batch with Pyro's validation on, changing nothing.

        Raises:
            ValueError: In one sentence, for a parameter that is not finite, data outside the likelihood's
                support or of another shape than the model's, sites outside the plate, latents that differ, or
                a latent that cannot be reparameterised.
        """
        unsound = self.watch.unsound()
        if unsound is not None:
            raise ValueError(f"parameter {unsound} must be finite before training, got nan or inf")
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
            one_precision(batch.x, self.model, self.guide),
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
            if isinstance(self._trained, LowPrecision):
                reason = self._trained.obstacle(*args)
                if reason is not None:
                    self.notes.append(
                        f"precision 'bf16' cannot run these programs ({reason}): 'float32' in its place"
                    )
                    self._trained = self.objective
                    self.engine = self._engine(self._name)

    def arguments(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the programs are called with: ``x``, and ``y`` too for a model that says it is conditional."""
        return arguments(self.model, batch)

    def batches(
        self, split: Split, batch_size: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[Batch | Tensor]:
        """Iterate over one epoch, as :meth:`pvae.data.Split.batches`, in the form that suits :meth:`step`.

        Where the whole step is captured, the gathering of its data with it, that is their positions alone.
        """
        if self._whole is not None and not split.fits_device:
            self._fall_back("needs data that lie on the device, got data that are read as they are needed")
        self._split = split
        if self._whole is None:
            return split.batches(batch_size, seed=seed, epoch=epoch, drop_last=True, start=start)
        return split.indices(batch_size, seed=seed, epoch=epoch, drop_last=True, start=start)

    def step(self, batch: Batch | Tensor) -> None:
        """Take one optimisation step; call it inside :meth:`generator`.

        Args:
            batch: Data; or, of the split that :meth:`batches` was last called with, their positions.
        """
        if not self.watch.keeps:
            self.watch.keep()
        if isinstance(batch, Tensor):
            if self._whole is not None and self._replayed(self._whole, batch):
                return
            assert self._split is not None
            batch = self._split.sample(batch)
        beta, rate, weight = self._scalars(self.step_count)
        self._beta.fill_(beta)
        args = self.arguments(batch)
        on_step = getattr(self.model, "on_step", None)
        if on_step is not None:
            on_step(args, batch.index, self.step_count, self.total_steps)
        if self._rate is not None:
            self._rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        losses = self._descend(args, self._filled)
        if self.averages:
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], weight)
        self._room(losses)[self._filled] = losses
        self._advance()

    def _scalars(self, step: int) -> tuple[float, float, float]:
        """Weight of the KL, learning rate, and weight of the new parameters in their average, of a step."""
        # The decay starts low, so that a short run is not held by its random start.
        decay = 1.0 if self.ema is None else min(self.ema, (step + 1) / (step + 11))
        rate = self.lr * self.rates(step, self.total_steps)
        return warm_up(step, self.beta_steps), rate, 1 - decay

    def _descend(self, args: tuple[Tensor, ...], row: int | Tensor) -> Tensor:
        """Find the loss and its gradients, clip those, and let the optimiser take its step."""
        losses = self.engine(args, self._beta)
        norms = self.watch.note(row)
        if self.grad_clip is not None:
            total = torch.linalg.vector_norm(norms)
            nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, total, foreach=True)
        self.optimizer.step()
        return losses

    def _room(self, losses: Tensor) -> Tensor:
        """Where losses are kept until they are read, a row for each step."""
        if self._losses is None or self._losses.shape[1] != len(losses):
            self._losses = losses.new_zeros(self._window, len(losses))
        return self._losses

    def _advance(self) -> None:
        self.step_count += 1
        self._filled += 1

    def _start(self, engine: str) -> Engine:
        """Make the engine; for a whole step, make also what captures it, or say why that cannot be."""
        if engine == "cuda_graph":
            reason = obstacle(self.device, self.optimizer, self.model, self.team.alone)
            if reason is None:
                self._rate = capturable(self.optimizer, self.lr, self.device)
                capture = CAPTURES[self.device.type](self.device)
                self._whole = WholeStep(self._body, capture, self._window, self.device)
            engine = "graph" if self._compile or reason is not None else "eager"
            if reason is not None:
                self._say(engine, reason)
        return self._engine(engine)

    def _engine(self, name: str) -> Engine:
        self._name = name
        engine = shared_engine(name, self._trained, self.model, self.guide, self._compile, self.team)
        if isinstance(engine, AutoEngine):
            engine.note = self.notes.append
        return engine

    def _say(self, engine: str, reason: str) -> None:
        self.notes.append(f"engine 'cuda_graph' {reason}: engine {engine!r} in its place")

    def _fall_back(self, reason: str, engine: str = "graph") -> None:
        """Go on without a captured step."""
        self._whole = None
        self._say(engine, reason)
        self.engine = self._engine(engine)

    def _replayed(self, whole: WholeStep, index: Tensor) -> bool:
        """Take a step as a whole; whether that was possible."""
        if not whole.expects(self.step_count, self._filled):
            ahead = range(min(self._window - self._filled, max(1, self.total_steps - self.step_count)))
            rows = [self._scalars(self.step_count + i) for i in ahead]
            whole.send(self.step_count, self._filled, rows)
        before = None if whole.captured else (Generators.now(self.device), _buffers(self.model, self.guide))
        try:
            whole(index)
        except NotCapturable as reason:
            assert before is not None  # a replay raises none
            before[0].resume(self.device)
            for buffer, value in before[1]:
                buffer.copy_(value)
            # Whatever it was, it may be in the way of tracing too.
            self._fall_back(str(reason), "eager")
            return False
        self._advance()
        return True

    def _body(self, index: Tensor, scalars: Tensor, slot: Tensor) -> None:
        """What is captured: :meth:`step` as a function of tensors on the device."""
        assert self._split is not None
        assert self._rate is not None
        beta, rate, weight = scalars.unbind()
        self._beta.copy_(beta)
        self._rate.copy_(rate)
        losses = self._descend(self.arguments(self._split.sample(index)), slot)
        if self.averages:
            # As torch._foreach_lerp_, whose weight would have to be known here.
            moved = torch._foreach_sub([p.detach() for p in self.parameters], self.averages)
            torch._foreach_mul_(moved, weight.to(moved[0].dtype))
            torch._foreach_add_(self.averages, moved)
        self._room(losses).index_copy_(0, slot, losses.unsqueeze(0))

    @property
    def window_full(self) -> bool:
        """Whether the kept losses must be read before the next step."""
        return self._filled == self._window

    def read_losses(self) -> dict[str, float]:
        """Mean of each part of the loss over the kept steps, nats per datum; the one place that waits.

        Raises:
            NonFiniteLoss: If one, or a gradient, was NaN or infinite, or a parameter is.
        """
        losses = self.check_losses()
        self._filled = self._averaged = 0
        self.watch.keep()
        return dict(zip(self.engine.names, losses.mean(0).tolist(), strict=True)) if len(losses) else {}

    def check_losses(self, alone: bool = False) -> Tensor:
        """Return the kept losses, shape ``(steps, parts)``, or raise as :meth:`read_losses` does.

        Args:
            alone: Whether to look at this process's share of them, when others of the team may not look.
        """
        if self._losses is None or not self._filled:
            return torch.zeros(0, 0)
        if not alone and self._averaged < self._filled:
            fresh = self._losses[self._averaged : self._filled]
            fresh.copy_(self.team.mean(fresh))
            self._averaged = self._filled
        losses = self._losses[: self._filled].double().cpu()
        bad = (~losses.isfinite()).any(1).nonzero()
        wrong = self.watch.finding(self._filled)
        # In one step the loss comes before its gradient.
        if len(bad) and (wrong is None or int(bad[0]) <= wrong[0]):
            row = int(bad[0])
            parts = zip(self.engine.names, losses[row].isfinite().tolist(), strict=True)
            wrong = row, next((name for name, finite in parts if name != "loss" and not finite), "loss")
        first, unsound = self.step_count - self._filled, None if wrong is not None else self.watch.unsound()
        if wrong is not None or unsound is not None:
            self.watch.put_back()
        if wrong is not None:
            raise _NonFinite(wrong[1], first + wrong[0])
        if unsound is not None:
            raise NonFiniteLoss(
                f"parameter {unsound} became non-finite in the steps {first} ... {self.step_count - 1}, with "
                "finite losses and gradients: the learning rate or the optimizer made it so"
            )
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
        tensors |= moments(self.optimizer)
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
        restore_moments(self.optimizer, tensors)
        if self._rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate  # of which there is a copy now
        if self._whole is not None:
            self._whole.reset()
        for i, average in enumerate(self.averages):
            if tensors[f"ema.{i}"].shape != average.shape:
                raise RuntimeError(f"ema.{i} must have shape {tuple(average.shape)}")
            average.copy_(tensors[f"ema.{i}"])
        states = {n.removeprefix("rng."): t for n, t in tensors.items() if n.startswith("rng.")}
        self._generators = Generators.saved(states, meta["rng"], self.device)
        self.step_count = meta["step"]
        self.engine.names = tuple(meta["names"])
        losses = tensors.get("losses")
        if losses is not None:
            terms = len(meta["names"])
            if losses.ndim != 2 or len(losses) > self._window or losses.shape[1] != terms:
                raise RuntimeError(
                    f"losses must have shape (at most {self._window}, {terms}), got {tuple(losses.shape)}"
                )
            self._losses = losses.new_zeros(self._window, losses.shape[1]).to(self.device)
            self._losses[: len(losses)] = losses.to(self.device)
            self._filled = self._averaged = len(losses)


def arguments(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """What programs are called with: ``x``, and ``y`` too for a model that says it is conditional."""
    if batch.y is not None and getattr(model, "conditional", False):
        return batch.x, batch.y
    return (batch.x,)


@contextmanager
def _buffers_kept(*programs: nn.Module) -> Iterator[None]:
    """Give the programs' buffers (running statistics) back as they were after a block."""
    before = _buffers(*programs)
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _buffers(*programs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The programs' buffers, each with a copy of what it holds."""
    return [(buffer, buffer.clone()) for program in programs for buffer in program.buffers()]


class _NonFinite(NonFiniteLoss):
    """Carries what the loop needs to name the batch."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} became non-finite at step {step}")
        self.step = step


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
