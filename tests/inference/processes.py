"""Several processes that run one function together, as the tests of what is distributed need them."""

import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Command", "Ended", "as_torchrun", "run_together"]


class Ended(NamedTuple):
    """How a process ended: with what the function returned, or what it raised."""

    returned: Any
    raised: str | None
    kind: str | None
    exitcode: int | None
    at: float


def run_together(
    function: Callable[..., Any], folder: Path, *args: Any, size: int = 2, timeout: float = 60.0
) -> list[Ended]:
    """Run ``function(*args)`` in forked processes of one gloo group; return how each ended.

    A process that has not ended in time is killed, which its exit code tells.
    """
    # Forked, as starting Python and torch anew takes seconds.
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    store = folder / f"store-{time.monotonic_ns()}"
    processes = [
        context.Process(target=_one, args=(rank, size, store, results, function, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, tuple[Any, ...]] = {}
    end = time.monotonic() + timeout
    while time.monotonic() < end and len(found) < size:
        try:
            rank, *rest = results.get(timeout=0.05)
            found[rank] = tuple(rest)
        except queue.Empty:
            if not any(process.is_alive() for process in processes) and results.empty():
                break
    for process in processes:
        process.join(1.0 if process.exitcode is None and len(found) == size else 0.1)
        if process.exitcode is None:
            process.kill()
            process.join()
    nothing = (None, None, None, time.monotonic())
    ended = []
    for rank, process in enumerate(processes):
        returned, raised, kind, at = found.get(rank, nothing)
        ended.append(Ended(returned, raised, kind, process.exitcode, at))
    return ended


def _one(
    rank: int, size: int, store: Path, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result: Any = (rank, function(*args), None, None, time.monotonic())
    except BaseException as error:
        if os.environ.get("SHOW"):
            traceback.print_exc()
        result = (rank, None, str(error), type(error).__name__, time.monotonic())
    results.put(result)
    results.close()
    results.join_thread()
    os._exit(0)  # without what the parent would do at its end


class Command(NamedTuple):
    """How the processes of a command ended."""

    exitcodes: list[int | None]
    out: str
    err: str


def as_torchrun(
    arguments: list[str], folder: Path, size: int = 2, prepare: Callable[[], None] | None = None
) -> Command:
    """Run the command ``pvae`` in forked processes that find what ``torchrun`` tells its own.

    Args:
        arguments: Of the command.
        folder: Where what they print is kept.
        size: Number of processes.
        prepare: Called in each process before.
    """
    # As the agent of torchrun does, which outlives its processes.
    service: Any = dist
    store = service.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    files = {name: folder / f"{name}-{time.monotonic_ns()}" for name in ("out", "err")}
    processes = [
        context.Process(target=_command, args=(rank, size, store.port, files, arguments, prepare))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 300
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    said = {name: path.read_text() if path.exists() else "" for name, path in files.items()}
    return Command([process.exitcode for process in processes], said["out"], said["err"])


def _command(
    rank: int,
    size: int,
    port: int,
    files: dict[str, Path],
    arguments: list[str],
    prepare: Callable[[], None] | None,
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)  # type: ignore[misc]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    sys.argv = ["pvae", *arguments]
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    from pvae.experiments.cli import main

    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
