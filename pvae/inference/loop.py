"""The loop around a trainer: epochs, rows of the history, validation, early stopping, checkpoints."""

import hashlib
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pvae import files
from pvae.data import Batch, Split
from pvae.priors import DiffusionPrior

from . import checkpoint
from .calibrate import calibrate_diffusion, measure_sigma
from .distributed import Pulse
from .door import check_split
from .isolation import evaluating, isolated_rng
from .program import load_program_state, program_state
from .progress import Reporter
from .rows import parse_row
from .trainer import NonFiniteLoss, Trainer

__all__ = ["Callback", "Loop", "Monitor", "Run"]

Callback = Callable[["Run", dict[str, float]], None]

_VALIDATION_SEED = 20_140_501
_VALIDATION_BATCH = 1000
_VALIDATION_TIMES = 8
# Latent sites whose KL stands in the line of a progress bar; all of them are in the rows.
_MOST_SHOWN = 9
# What names of tensors begin with: a generator's state, that of another process, the best parameters.
_GENERATOR, _STREAM, _BEST = "rng.", "stream.", "best."


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
        notes: What was done in another way than was asked for (engine, precision), one sentence each.
    """

    model: nn.Module
    guide: nn.Module
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stopped: str = "finished"
    out: Path | None = None
    notes: list[str] = field(default_factory=list)


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
    # File and checksum of the best parameters, once they are saved.
    best_saved: dict[str, Any] | None = None
    waited: int = 0
    # Of the rows that were written, so that a checkpoint knows what comes before it.
    digest: Any = field(default_factory=hashlib.sha256)
    saved: float = field(default_factory=time.monotonic)
    # Generators of the other processes of a team, as a checkpoint has them, in the order of their numbers.
    streams: list[tuple[dict[str, Tensor], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find this process's share of each batch."""
        self.team = self.trainer.team
        # Made once, as a split keeps what it has encoded.
        self.own = self.train.share(self.team.rank, self.team.size)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from the run's folder while the block runs.

        Raises:
            pvae.files.Busy: If another process is at work there.
            pvae.files.WriteError: If nothing can be written there.
        """
        if self.run.out is None:
            yield
            return
        folder = self.run.out / "checkpoints"
        with ExitStack() as claim:
            with self.team.together():
                if self.team.leads:
                    claim.callback(_remove_if_empty, folder)  # as it is only where training was refused
                    claim.enter_context(files.locked(folder / ".lock", wait=False))
            yield

    def prepare(self, resume: bool) -> None:
        """Check the programs on a batch; take up a checkpoint, or make sure that none is overwritten."""
        self._check_team()
        with self.team.together():
            check_data = getattr(self.trainer.model, "check_data", None)
            if check_data is not None:
                check_data(len(self.train))
            with isolated_rng(self.trainer.device, self.seed):
                self.trainer.check(next(self._batches(0, 0, self.own)))
                for split in (self.train, self.valid):
                    if split is not None:
                        check_split(self.trainer.model, split)
            if self.team.leads:
                self._take_up(resume)
        self._equalise()

    def _check_team(self) -> None:
        """Refuse processes that cannot train together."""
        self.team.check_same(
            seed=self.seed,
            batch_size=self.batch_size,
            steps=self.trainer.total_steps,
            **{"number of training data": len(self.train), "out": str(self.run.out)},
            **{"shapes of the parameters": [list(p.shape) for p in self.trainer.parameters]},
        )
        self.team.check_devices(self.trainer.device)
        if self.batch_size % self.team.size:
            raise ValueError(
                f"batch_size must be divisible by the {self.team.size} processes that share each batch, "
                f"got {self.batch_size}"
            )

    def _take_up(self, resume: bool) -> None:
        """Open the run's folder."""
        out = self.run.out
        if out is None:
            return
        if checkpoint.exists(out) and not resume:
            raise ValueError(f"out must be a new folder, but {out} holds a run: pass resume=True to go on")
        out.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(out, out / "checkpoints")
        if checkpoint.exists(out):
            self._restore(out)
        else:
            files.write_atomically(out / "metrics.jsonl", b"")

    def _equalise(self) -> None:
        """Give all processes of a team the state of the leader; each goes on with a generator of its own."""
        team, trainer, run = self.team, self.trainer, self.run
        if team.alone:
            return
        tensors, meta = trainer.state()
        generator = {name: t for name, t in tensors.items() if name.startswith(_GENERATOR)}
        others = [other for _, other in self.streams]
        told: Any = team.tell([meta, others, _json(run.best), self.best_step, self.waited, run.history])
        given = team.give(tensors | _under(_BEST, self.best_state))
        streams = [team.give(stream) for stream, _ in self.streams or [({}, None)] * len(told[1])]
        with team.together():
            if not team.leads:
                theirs, others, best, self.best_step, self.waited, run.history = told
                run.best = math.inf if best is None else best
                self.best_state = _inside(_BEST, given)
                state = {name: t for name, t in given.items() if not name.startswith((_BEST, _GENERATOR))}
                if others:
                    generator, meta["rng"] = streams[team.rank - 1], others[team.rank - 1]
                trainer.restore(state | generator, theirs | {"rng": meta["rng"]})

    def go(self, report: Reporter) -> None:
        """Train to the end."""
        trainer, run = self.trainer, self.run
        batches = self._steps(*divmod(trainer.step_count, self.per_epoch))
        pulse = Pulse(self.team)
        with _stop_signals() as asked:
            while trainer.step_count < trainer.total_steps and not self._exhausted():
                with trainer.generator():
                    for batch in batches:
                        self._step(batch)
                        stop = pulse.heard(asked.is_set())
                        if stop or trainer.step_count >= trainer.total_steps or trainer.window_full:
                            break
                self._end_of_interval(report)
                if pulse.heard(asked.is_set(), now=True):
                    self._save()
                    raise KeyboardInterrupt
                if trainer.step_count % self.per_epoch == 0:
                    batches = self._steps(trainer.step_count // self.per_epoch, 0)
        run.steps = trainer.step_count
        run.stopped = "early" if self._exhausted() else "finished"
        self._finish()
        with self.team.together():
            for monitor in self.monitors if self.team.leads else ():
                monitor.finish(run)

    def _step(self, batch: Batch | Tensor) -> None:
        try:
            self.trainer.step(batch)
        except (RuntimeError, ValueError):
            # Programs whose parameters are NaN may raise anything before the losses are read: a decomposition
            # that fails, an index out of range. The first cause is then the one to tell.
            self._check(alone=True)
            raise

    def _steps(self, epoch: int, start: int) -> Iterator[Batch | Tensor]:
        """The batches of an epoch as the trainer takes them."""
        return self.trainer.batches(self.own, self.batch_size, seed=self.seed, epoch=epoch, start=start)

    def _batches(self, epoch: int, start: int, split: Split | None = None) -> Iterator[Batch]:
        split = self.train if split is None else split
        return split.batches(self.batch_size, seed=self.seed, epoch=epoch, drop_last=True, start=start)

    def _end_of_interval(self, report: Reporter) -> None:
        """Read the losses, validate at the end of an epoch, tell everybody, save."""
        trainer, step = self.trainer, self.trainer.step_count
        ended = step % self.per_epoch == 0 or step >= trainer.total_steps
        if not (ended or trainer.window_full):
            return
        self._share_buffers()
        row: dict[str, float] = {"step": step, "epoch": step / self.per_epoch, **self._read()}
        row |= {"lr": trainer.learning_rate, "beta": trainer.beta}
        if ended and self.valid is not None:
            row["valid_loss"] = self._validate()
            self._judge(row["valid_loss"])
        with self.team.together():
            row |= self._measure(row)
        row, due = self.team.tell((row, time.monotonic() - self.saved >= self.checkpoint_every))
        self.run.history.append(row)
        with self.team.together():
            if self.run.out is not None and self.team.leads:
                line = json.dumps(row) + "\n"
                files.append(self.run.out / "metrics.jsonl", line)
                self.digest.update(line.encode())
        if due:
            self._save()
        report(step, _sentence(row))
        with self.team.together():
            for callback in self.callbacks if self.team.leads else ():
                callback(self.run, row)

    def _share_buffers(self) -> None:
        """Give all processes of a team what layers of the leader's keep of their batches (running means)."""
        if self.team.alone:
            return
        programs = self.trainer.model, self.trainer.guide
        trained = {p.data_ptr() for program in programs for p in program.parameters()}
        buffers = {n: t for n, t in program_state(*programs).items() if t.data_ptr() not in trained}
        if buffers:
            for name, given in self.team.give(buffers).items():
                buffers[name].copy_(given)

    def _read(self) -> dict[str, float]:
        try:
            return self.trainer.read_losses()
        except NonFiniteLoss as error:
            raise self._named(error) from None

    def _check(self, alone: bool = False) -> None:
        try:
            self.trainer.check_losses(alone)
        except NonFiniteLoss as error:
            raise self._named(error) from None

    def _named(self, error: NonFiniteLoss) -> NonFiniteLoss:
        """Add the batch's data to the message; their order is a function of seed and epoch."""
        said, index = str(error), []
        if error.step is not None:
            epoch, start = divmod(error.step, self.per_epoch)
            with isolated_rng(self.trainer.device):
                index = next(self._batches(epoch, start)).index.tolist()
            said += f" on training data {_few(index)}"
        saved = self.run.out is not None and checkpoint.exists(self.run.out)
        named = NonFiniteLoss(said + ("; the last checkpoint is sound" if saved else ""))
        named.step, named.index = error.step, tuple(index)
        return named

    def _validate(self) -> float:
        """Minus the bound on the validation split, with the same draws every time."""
        assert self.valid is not None
        own = self.valid.share(self.team.rank, self.team.size)
        trainer, total, bad = self.trainer, 0.0, []
        with trainer.averaged(), evaluating(trainer.model, trainer.guide), _bounding(trainer.model):
            torch.manual_seed(self.team.seed(_VALIDATION_SEED))
            for batch in own.batches(_VALIDATION_BATCH, seed=0, epoch=0, drop_last=False, shuffle=False):
                args = trainer.arguments(batch)
                bound = trainer.objective.terms(trainer.model, trainer.guide, *args).bound
                loss = -float(bound.double().sum())
                if not math.isfinite(loss):
                    bad = batch.index[~bound.isfinite()].tolist()
                    break
                total += loss
        totals, all_bad = zip(*self.team.all((total, bad)), strict=True)
        if any(all_bad):
            raise NonFiniteLoss(
                f"the validation loss became non-finite at step {trainer.step_count} on validation "
                f"data {_few(list(chain.from_iterable(all_bad)))}, the training loss did not"
            )
        return sum(totals) / len(self.valid)

    def _measure(self, row: Mapping[str, float]) -> dict[str, float]:
        """What monitors find, at the parameters that validate."""
        found: dict[str, float] = {}
        for monitor in self.monitors if self.team.leads else ():
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
            self.best_saved = None
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
        with self.team.together():
            if self.team.leads:
                self._calibrate()
        if not self.team.alone:
            state = self.team.give(program_state(trainer.model, trainer.guide))
            load_program_state(trainer.model, trainer.guide, state)
        trainer.model.eval()
        trainer.guide.eval()
        with self.team.together():
            if self.run.out is not None and self.team.leads:
                self._save_final(self.run.out)

    def _calibrate(self) -> None:
        """Measure what training leaves open, at the parameters that remain."""
        trainer = self.trainer
        if getattr(getattr(trainer.model, "likelihood", None), "profiled", False):
            # These may be other parameters than the last batches were fitted with.
            measure_sigma(trainer.model, trainer.guide, self.train, seed=self.seed)
        if isinstance(getattr(trainer.model, "prior", None), DiffusionPrior):
            calibrate_diffusion(trainer.model, trainer.guide, self.train, seed=self.seed)

    def _save_final(self, out: Path) -> None:
        trainer = self.trainer
        meta = {
            "step": trainer.step_count,
            "valid_loss": _json(self.run.best),
            "stopped": self.run.stopped,
            **self._rows_so_far(),
        }
        checkpoint.save(out, "final", program_state(trainer.model, trainer.guide), meta)

    def _save(self) -> None:
        out = self.run.out
        if out is None:
            return
        self._share_buffers()
        self._check()
        self.team.check_parameters(self.trainer.parameters)
        tensors, meta = self.trainer.state()
        self._add_streams(tensors, meta)
        with self.team.together():
            if self.team.leads:
                self._write(out, tensors, meta)
        self.saved = time.monotonic()

    def _add_streams(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Add the generators of all processes of a team to the state of this one."""
        if self.team.alone:
            return
        own = {name: t for name, t in tensors.items() if name.startswith(_GENERATOR)}
        streams, others = self.team.gather(own), self.team.all(meta["rng"])
        for rank in range(1, self.team.size):
            tensors |= _under(f"{_STREAM}{rank}.", streams[rank])
        meta |= {"processes": self.team.size, "streams": others[1:]}

    def _write(self, out: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        meta |= {"best": _json(self.run.best), "waited": self.waited, "seed": self.seed}
        meta |= {"batch_size": self.batch_size, "num_data": len(self.train), **self._rows_so_far()}
        if self.best_state and self.best_saved is None:
            best = {"step": self.best_step, "valid_loss": self.run.best}
            self.best_saved = checkpoint.save(out, "best", self.best_state, best)
        meta["best_state"] = self.best_saved
        files.sync(out / "metrics.jsonl")  # the rows that the checkpoint counts, before it counts them
        checkpoint.save(out, "last", tensors, meta, previous="previous")

    def _rows_so_far(self) -> dict[str, Any]:
        return {"rows": len(self.run.history), "rows_sha256": self.digest.hexdigest()}

    def _restore(self, out: Path) -> None:
        """Take up the last checkpoint, or, where that is damaged, the one before it."""
        problem = ""
        for which in ("last", "previous"):
            try:
                tensors, meta, best, rows = self._read_checkpoint(out, which)
                break
            except checkpoint.CheckpointError as error:
                problem = problem or str(error)
        else:
            raise checkpoint.CheckpointError(
                f"{problem}, and there is no sound one before it: put it back, or train afresh (--force)"
            )
        try:
            history = [parse_row(row) for row in rows]
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{out / 'metrics.jsonl'} is damaged: {error}") from None
        for name, ours in (
            ("seed", self.seed),
            ("batch_size", self.batch_size),
            ("num_data", len(self.train)),
        ):
            saved = meta.get(name)
            if saved != ours:
                raise ValueError(f"{name} must be {saved}, as in the run that is resumed, got {ours}")
        processes = meta.get("processes", 1)
        if processes != self.team.size:
            raise ValueError(
                f"the number of processes must be {processes}, as in the run that is resumed, "
                f"got {self.team.size}"
            )
        self.streams = [
            (_inside(f"{_STREAM}{rank}.", tensors), meta["streams"][rank - 1]) for rank in range(1, processes)
        ]
        try:
            self.trainer.restore(tensors, meta)
        # Beyond the tensors of other programs: whatever a state is not that somebody else wrote.
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise checkpoint.CheckpointError(
                f"checkpoint {meta['file']} is of another program: {reason}"
            ) from None
        if which != "last":
            _warn(f"{problem}: training goes on from the checkpoint before it, at step {meta['step']}")
            checkpoint.adopt(out, which, instead_of="last")
        self.run.best = math.inf if meta.get("best") is None else meta["best"]
        self.waited = meta.get("waited", 0)
        if best is not None:
            self.best_state, self.best_step = best
        # Rows after the checkpoint belong to steps that are taken again.
        content = b"".join(rows)
        files.write_atomically(out / "metrics.jsonl", content)
        self.run.history = history
        self.digest.update(content)

    def _read_checkpoint(self, out: Path, which: str) -> Any:
        """Read a checkpoint with what belongs to it: its best parameters and their step, its rows."""
        most = checkpoint.most_bytes(self.trainer.model, self.trainer.guide)
        tensors, meta = checkpoint.load(out, which, most=most)
        best = None
        if "best_state" not in meta and checkpoint.exists(out, "best"):  # of an earlier version
            meta["best_state"] = checkpoint.pointer(out, "best")
        if meta.get("best_state") is not None:
            of_best = meta["best_state"]
            best = checkpoint.load_tensors_of(out, of_best, which, most=most), of_best["step"]
        path = out / "metrics.jsonl"
        if not path.exists():
            _warn(f"{path} is missing: training goes on without the rows before step {meta['step']}")
            return tensors, meta, best, []
        try:
            rows = path.read_bytes().splitlines(keepends=True)[: meta.get("rows", 0)]
        except OSError as error:
            raise checkpoint.CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        digest = hashlib.sha256(b"".join(rows)).hexdigest()
        if meta.get("rows_sha256", digest) != digest:
            raise checkpoint.CheckpointError(
                f"{path} is damaged: its rows are not those of {which}.json (delete it to go on without them)"
            )
        return tensors, meta, best, rows


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _inside(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _warn(sentence: str) -> None:
    warnings.warn(sentence, checkpoint.CheckpointWarning, stacklevel=5)


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


def _few(index: list[int]) -> str:
    return "[" + ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "") + "]"


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
