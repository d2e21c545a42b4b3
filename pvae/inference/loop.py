"""The loop around a trainer: epochs, rows of the history, validation, early stopping, checkpoints."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pvae.data import Batch, Split
from pvae.priors import DiffusionPrior

from . import checkpoint
from .calibrate import calibrate_diffusion, measure_sigma
from .isolation import evaluating, isolated_rng
from .program import load_program_state, program_state
from .progress import Reporter
from .trainer import NonFiniteLoss, Trainer

__all__ = ["Callback", "Loop", "Monitor", "Run"]

Callback = Callable[["Run", dict[str, float]], None]

_VALIDATION_SEED = 20_140_501
_VALIDATION_BATCH = 1000
_VALIDATION_TIMES = 8
# Latent sites whose KL stands in the line of a progress bar; all of them are in the rows.
_MOST_SHOWN = 9


@dataclass
class Run:
    """What a training run did, and the programs it trained.

    Attributes:
        model: The trained model.
        guide: The trained guide.
        history: One row per log interval: ``step``, ``epoch``, ``loss`` and its parts in nats per datum
            (``reconstruction``, ``kl``, ``kl/<site>``, ``factor/<site>``, ``align``), ``lr``, ``beta``; at
            the end of an epoch also ``valid_loss`` where there is a validation split, and what monitors
            measured.
        steps: Steps taken.
        seconds: Wall time of this call.
        best: Lowest validation loss, nats per datum; infinite without validation.
        stopped: ``"finished"`` or ``"early"``.
        out: The run's folder.
    """

    model: nn.Module
    guide: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stopped: str = "finished"
    out: Path | None = None


@runtime_checkable
class Monitor(Protocol):
    """A callback that measures: what it finds stands in the rows, in ``metrics.jsonl`` too.

    It sees the parameters that validate (averaged ones, if there are any), may draw from torch's, NumPy's and
    Python's generators, and must change nothing in the programs. That a resumed run writes the rows of an
    uninterrupted one takes a monitor whose figures follow from the programs, the row and the rows before it
    alone.
    """

    def measure(self, run: Run, row: Mapping[str, float]) -> Mapping[str, float]:
        """Return figures under names of its own, or none, to be added to a row before it is written.

        Args:
            run: The run; its history ends before ``row``.
            row: The new row.
        """
        ...

    def finish(self, run: Run) -> None:
        """Look at the trained programs: called once, when the parameters are those that remain."""
        ...


@dataclass
class Loop:
    """Epochs, rows, validation, checkpoints and early stopping around a trainer."""

    trainer: Trainer
    train: Split
    valid: Split | None
    run: Run
    batch_size: int
    per_epoch: int
    patience: int | None
    seed: int
    checkpoint_every: float
    callbacks: tuple[Callback, ...]
    monitors: tuple[Monitor, ...] = ()
    best_state: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    waited: int = 0
    saved: float = field(default_factory=time.monotonic)

    def prepare(self, resume: bool) -> None:
        """Check the programs on a batch; take up a checkpoint, or make sure that none is overwritten."""
        check_data = getattr(self.trainer.model, "check_data", None)
        if check_data is not None:
            check_data(len(self.train))
        with isolated_rng(self.trainer.device, self.seed):
            self.trainer.check(next(self._batches(0, 0)))
        out = self.run.out
        if out is None:
            return
        if checkpoint.exists(out) and not resume:
            raise ValueError(f"out must be a new folder, but {out} holds a run: pass resume=True to go on")
        out.mkdir(parents=True, exist_ok=True)
        if checkpoint.exists(out):
            self._restore(out)
        else:
            (out / "metrics.jsonl").write_text("")

    def go(self, report: Reporter) -> None:
        """Train to the end."""
        trainer, run = self.trainer, self.run
        batches = self._batches(*divmod(trainer.step_count, self.per_epoch))
        with _stop_signals() as asked:
            while trainer.step_count < trainer.total_steps and not self._exhausted():
                with trainer.generator():
                    for batch in batches:
                        trainer.step(batch)
                        if asked.is_set() or trainer.step_count >= trainer.total_steps or trainer.window_full:
                            break
                self._end_of_interval(report)
                if asked.is_set():
                    self._save()
                    raise KeyboardInterrupt
                if trainer.step_count % self.per_epoch == 0:
                    batches = self._batches(trainer.step_count // self.per_epoch, 0)
        run.steps = trainer.step_count
        run.stopped = "early" if self._exhausted() else "finished"
        self._finish()
        for monitor in self.monitors:
            monitor.finish(run)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self.train.batches(self.batch_size, seed=self.seed, epoch=epoch, drop_last=True, start=start)

    def _end_of_interval(self, report: Reporter) -> None:
        """Read the losses, validate at the end of an epoch, tell everybody, save."""
        trainer, step = self.trainer, self.trainer.step_count
        ended = step % self.per_epoch == 0 or step >= trainer.total_steps
        if not (ended or trainer.window_full):
            return
        row: dict[str, float] = {"step": step, "epoch": step / self.per_epoch, **self._read()}
        row |= {"lr": trainer.learning_rate, "beta": trainer.beta}
        if ended and self.valid is not None:
            row["valid_loss"] = self._validate()
            self._judge(row["valid_loss"])
        row |= self._measure(row)
        self.run.history.append(row)
        if self.run.out is not None:
            with (self.run.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.monotonic() - self.saved >= self.checkpoint_every:
            self._save()
        report(step, _sentence(row))
        for callback in self.callbacks:
            callback(self.run, row)

    def _read(self) -> dict[str, float]:
        try:
            return self.trainer.read_losses()
        except NonFiniteLoss as error:
            raise self._named(error) from None

    def _named(self, error: Any) -> NonFiniteLoss:
        """Add the batch's data to the message; their order is a function of seed and epoch."""
        epoch, start = divmod(error.step, self.per_epoch)
        with isolated_rng(self.trainer.device):
            index = next(self._batches(epoch, start)).index.tolist()
        saved = self.run.out is not None and checkpoint.exists(self.run.out)
        kept = "; the last checkpoint is sound" if saved else ""
        shown = ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "")
        return NonFiniteLoss(f"{error} on training data [{shown}]{kept}")

    def _validate(self) -> float:
        """Minus the bound on the validation split, with the same draws every time."""
        assert self.valid is not None
        trainer, total = self.trainer, 0.0
        with trainer.averaged(), evaluating(trainer.model, trainer.guide), _bounding(trainer.model):
            torch.manual_seed(_VALIDATION_SEED)
            for batch in self.valid.batches(
                _VALIDATION_BATCH, seed=0, epoch=0, drop_last=False, shuffle=False
            ):
                args = trainer.arguments(batch)
                bound = trainer.objective.terms(trainer.model, trainer.guide, *args).bound
                total -= float(bound.double().sum())
        return total / len(self.valid)

    def _measure(self, row: Mapping[str, float]) -> dict[str, float]:
        """What monitors find, at the parameters that validate."""
        found: dict[str, float] = {}
        for monitor in self.monitors:
            with self.trainer.averaged(), isolated_rng(self.trainer.device):
                found |= monitor.measure(self.run, row)
        return found

    def _judge(self, valid_loss: float) -> None:
        """Keep the best parameters; count the epochs since."""
        if valid_loss < self.run.best:
            self.run.best, self.best_step, self.waited = valid_loss, self.trainer.step_count, 0
            with self.trainer.averaged():
                state = program_state(self.trainer.model, self.trainer.guide)
                self.best_state = {name: tensor.detach().clone() for name, tensor in state.items()}
        else:
            self.waited += 1

    def _exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def _finish(self) -> None:
        """Leave the averaged or the best parameters in the programs, measure there what training leaves open,
        and save all.
        """
        trainer = self.trainer
        if self.run.out is not None:
            self._save()
        if trainer.averages:
            trainer.use(trainer.averages)
        if self.patience is not None and self.best_state:
            load_program_state(trainer.model, trainer.guide, self.best_state)
        if getattr(getattr(trainer.model, "likelihood", None), "profiled", False):
            # At the parameters that remain, which may be other ones than the last batches were fitted with.
            measure_sigma(trainer.model, trainer.guide, self.train, seed=self.seed)
        if isinstance(getattr(trainer.model, "prior", None), DiffusionPrior):
            calibrate_diffusion(trainer.model, trainer.guide, self.train, seed=self.seed)
        trainer.model.eval()
        trainer.guide.eval()
        if self.run.out is not None:
            meta = {
                "step": trainer.step_count,
                "valid_loss": _json(self.run.best),
                "stopped": self.run.stopped,
            }
            checkpoint.save(self.run.out, "final", program_state(trainer.model, trainer.guide), meta)

    def _save(self) -> None:
        out = self.run.out
        if out is None:
            return
        try:
            self.trainer.check_losses()
        except NonFiniteLoss as error:
            raise self._named(error) from None
        tensors, meta = self.trainer.state()
        meta |= {"best": _json(self.run.best), "waited": self.waited, "seed": self.seed}
        meta |= {"batch_size": self.batch_size, "num_data": len(self.train), "rows": len(self.run.history)}
        if self.best_state:
            best = {"step": self.best_step, "valid_loss": self.run.best}
            checkpoint.save(out, "best", self.best_state, best)
        checkpoint.save(out, "last", tensors, meta)
        self.saved = time.monotonic()

    def _restore(self, out: Path) -> None:
        tensors, meta = checkpoint.load(out)
        for name, ours in (
            ("seed", self.seed),
            ("batch_size", self.batch_size),
            ("num_data", len(self.train)),
        ):
            if meta[name] != ours:
                raise ValueError(f"{name} must be {meta[name]}, as in the run that is resumed, got {ours}")
        try:
            self.trainer.restore(tensors, meta)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise checkpoint.CheckpointError(
                f"checkpoint {meta['file']} is of another program: {reason}"
            ) from None
        self.run.best = math.inf if meta["best"] is None else meta["best"]
        self.waited = meta["waited"]
        if checkpoint.exists(out, "best"):
            self.best_state, best = checkpoint.load(out, "best")
            self.best_step = best["step"]
        # Rows after the checkpoint belong to steps that are taken again.
        metrics = out / "metrics.jsonl"
        rows = metrics.read_text().splitlines()[: meta["rows"]]
        checkpoint.write_atomically(metrics, "".join(f"{row}\n" for row in rows).encode())
        self.run.history = [json.loads(row) for row in rows]


@contextmanager
def _bounding(model: nn.Module) -> Iterator[None]:
    """Let diffusion priors give their bound, as in training: its estimate by a path is not calibrated yet."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DiffusionPrior):
                stack.enter_context(module.using("vlb", num_times=_VALIDATION_TIMES))
        yield


def _sentence(row: dict[str, float]) -> str:
    parts = f"rec {row['reconstruction']:.2f} + kl {row['kl']:.2f}"
    sites = {name.removeprefix("kl/"): value for name, value in row.items() if name.startswith("kl/")}
    if 1 < len(sites) <= _MOST_SHOWN:
        parts += f" ({' '.join(f'{name} {value:.2f}' for name, value in sites.items())})"
    text = f"epoch {row['epoch']:.1f}  loss {row['loss']:.2f} = {parts}"
    return text + (f"  valid {row['valid_loss']:.2f}" if "valid_loss" in row else "")


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag, read between steps; a second one interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
