"""Running a study's cells: one after the other, or in worker processes of one thread each."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from pvae.data import DataError
from pvae.files import locked, remove_leftovers
from pvae.inference.progress import reporting

from ..program import SpecError
from ..runs import RunError, environment
from .ledger import Ledger, Record
from .study import AnyStudy, Cell, Context

__all__ = ["Plan", "plan", "run", "run_cell"]

_PATIENCE = 10.0  # seconds that a worker has to end by itself


@dataclass(frozen=True)
class Plan:
    """What a study has done and what is left.

    Attributes:
        cells: Cells that were asked for.
        missing: Those that are not finished.
        seconds: Expected wall time of the missing ones on one core: the study's own figures, corrected by
            those finished cells of the same data set that it knows.
    """

    cells: list[Cell]
    missing: list[Cell]
    seconds: float


def plan(study: AnyStudy, context: Context, only: Sequence[str] = ()) -> Plan:
    """Find out what is left of a study.

    Args:
        study: The study.
        context: Where it runs.
        only: Parts of the cells' names, see :meth:`Study.selected`.

    Raises:
        SpecError: If no cell is asked for, or a recipe cannot be read.
        RunError: If the folder holds cells of other settings.
    """
    cells = study.selected(context.scale, only)
    if not cells:
        example = study.cells(context.scale)[0].name
        raise SpecError(f"--only must match a cell such as {example}, got {' '.join(only)}")
    ledger = Ledger(context.out)
    missing = ledger.missing(cells, context.scale.settings())
    figures = {cell.name: cell.seconds for cell in study.cells(context.scale)}
    timed: dict[str, list[tuple[float, float]]] = {}
    for record in ledger.read():
        timed.setdefault(record.factors["data"], []).append((record.seconds, figures.get(record.cell, 0.0)))
    pace = {
        name: sum(took for took, _ in pairs) / sum(figure for _, figure in pairs)
        for name, pairs in timed.items()
        if sum(figure for _, figure in pairs) > 0
    }
    expected = sum(cell.seconds * pace.get(cell.factors["data"], 1.0) for cell in missing)
    return Plan(cells, missing, expected)


def run(
    study: AnyStudy,
    scale: str,
    context: Context,
    *,
    jobs: int = 1,
    only: Sequence[str] = (),
    progress: bool | None = None,
) -> list[Record]:
    """Run what is left of a study and return all its records.

    Every finished cell is kept at once: a study that was interrupted or killed goes on with the others.

    Args:
        study: The study.
        scale: Name of its size.
        context: Where it runs.
        jobs: Worker processes; with one, cells run in this process.
        only: Parts of the cells' names.
        progress: Whether to show a bar; by default on a terminal only.

    Raises:
        SpecError: If a cell cannot be built.
        RunError: If the folder holds cells of other settings.
        pvae.files.Busy: If another process is at work in the folder.
        pvae.data.DataError: If data cannot be loaded.
        KeyboardInterrupt: On SIGINT or SIGTERM; what is finished is kept.
    """
    context.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(context.out)
    with locked(context.out / ".lock", wait=False):
        remove_leftovers(context.out)
        todo = plan(study, context, only)
        done = len(todo.cells) - len(todo.missing)
        with reporting(study.name, len(todo.cells), progress) as report, _terminable():
            report(done)
            answers = (
                _alone(study, scale, todo.missing, context)
                if jobs == 1
                else _spread(study, scale, todo.missing, context, min(jobs, len(todo.missing)))
            )
            with closing(answers):  # ends the workers whatever happens here
                for record in answers:
                    ledger.append(record)
                    done += 1
                    report(done, record.cell)
    return ledger.read()


def run_cell(study: AnyStudy, scale: str, cell: Cell, context: Context) -> Record:
    """Run one cell in this process.

    Raises:
        SpecError: If it cannot be built.
        pvae.data.DataError: If its data cannot be loaded.
    """
    start = time.monotonic()
    outcome = study.run(cell, context)
    settings = context.scale.settings()
    return Record(
        study=study.name,
        scale=scale,
        cell=cell.name,
        key=cell.key(settings),
        factors=dict(cell.factors),
        seed=cell.seed,
        metrics=outcome.metrics,
        failure=outcome.failure,
        protocol=outcome.protocol,
        settings=settings,
        seconds=round(time.monotonic() - start, 3),
        environment=environment(context.device),
    )


def _alone(
    study: AnyStudy, scale: str, cells: Sequence[Cell], context: Context
) -> Generator[Record, None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in cells:
            yield run_cell(study, scale, cell, context)
    finally:
        torch.set_num_threads(threads)


def _spread(
    study: AnyStudy, scale: str, cells: Sequence[Cell], context: Context, jobs: int
) -> Generator[Record, None, None]:
    """Hand cells to workers as they become free, and yield records as they come back."""
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    waiting = list(reversed(cells))
    workers: dict[Any, Any] = {}
    try:
        with _one_thread():
            for _ in range(jobs):
                ours, theirs = spawn.Pipe()
                worker = spawn.Process(target=_work, args=(theirs, study, scale, context), daemon=True)
                worker.start()
                theirs.close()  # so that the death of either side is seen by the other
                workers[ours] = worker
        busy = set()
        for pipe in workers:
            pipe.send(waiting.pop())
            busy.add(pipe)
        while busy:
            ready: list[Any] = list(wait(list(busy)))
            for pipe in ready:
                yield _answer(pipe, workers[pipe])
                if waiting:
                    pipe.send(waiting.pop())
                else:
                    busy.remove(pipe)
    finally:
        for pipe in workers:
            pipe.close()
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(_PATIENCE)
            if worker.is_alive():
                worker.kill()


def _answer(pipe: Any, worker: Any) -> Record:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        worker.join(_PATIENCE)
        raise RuntimeError(f"a worker process died with exit code {worker.exitcode}") from None
    if isinstance(answer, Record):
        return answer
    raise answer


def _work(pipe: "Connection[Any, Any]", study: AnyStudy, scale: str, context: Context) -> None:
    """Run the cells that come through the pipe until nobody sends any more."""
    torch.set_num_threads(1)
    while True:
        try:
            pipe.send(run_cell(study, scale, pipe.recv(), context))
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return  # the parent has gone, or was interrupted too
        except Exception as error:
            pipe.send(_portable(error))
            return


def _portable(error: Exception) -> Exception:
    """An error that can be sent to the parent: bad input as it is, a fault of the code with its traceback."""
    if isinstance(error, SpecError | DataError | RunError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Start processes whose numerical libraries have one thread each."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as SIGINT, so that workers end and the lock goes."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, which alone hears signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
