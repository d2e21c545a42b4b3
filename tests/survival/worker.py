"""A process that has imported everything, and forks a child for each command that can be told when to die."""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

__all__ = ["Ended", "Moment", "Worker"]

ROOT = Path(__file__).parents[2]
# What commands import when they need it, which takes longer than they do.
_PRELOADED = [f"pvae.experiments.{name}" for name in ("jobs", "diagnosing", "evidence_parts", "report")]
_PRELOADED += [
    "torch._dynamo",
    "arviz_stats.base",
    "scipy.stats",
    "sklearn.datasets",
    "sklearn.decomposition",
]
_PRELOADED += [
    "sklearn.mixture",
    "sklearn.neighbors",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
]


class Moment(NamedTuple):
    """When a child sends itself a signal.

    Attributes:
        of: A function, ``module:name`` or ``module:class.name``, by the name that its caller uses.
        number: At which of its calls, from 1.
        when: ``"before"`` or ``"after"`` the call; ``"half"``, of ``os:fsync``: when half of a file that is
            written anew is there.
        signal: The signal.
    """

    of: str
    number: int = 1
    when: str = "before"
    signal: int = signal.SIGKILL


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        code: Its exit code, or minus the signal that killed it.
        stdout: What it printed.
        stderr: What it said.
        counts: How often it called the functions that were counted, by name; nothing if a signal ended it.
    """

    code: int
    stdout: str
    stderr: str
    counts: dict[str, int]

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL


class Worker:
    """Runs ``pvae`` in forked processes: a command costs what it does, not what imports cost.

    Args:
        folder: Where the children's output goes, and their working folder.
        environment: Variables beside those of this process.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self._folder = folder
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "default"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.survival.worker"],
            cwd=folder,
            env=os.environ | ours | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()  # everything is imported

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def start(
        self,
        *arguments: object,
        moment: Moment | None = None,
        counted: tuple[str, ...] = (),
        prepare: str | None = None,
    ) -> int:
        """Begin a command and return the process' number; :meth:`end` must follow.

        Args:
            *arguments: Of the command.
            moment: When the child gets a signal.
            counted: Functions whose calls are counted, named as in :class:`Moment`.
            prepare: A function of no arguments that the child calls first, ``module:name``.
        """
        asked = {"arguments": [str(a) for a in arguments], "moment": moment, "counted": counted}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asked | {"prepare": prepare}) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def end(self) -> Ended:
        """Wait for the child that was begun last."""
        code = int(self._answer())
        out, err = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        # A signal may have come while they were written.
        counts = {} if code < 0 else json.loads((self._folder / "counts.json").read_text())
        return Ended(code, out, err, counts)

    def run(self, *arguments: object, **options: Any) -> Ended:
        """Run a command to its end."""
        self.start(*arguments, **options)
        return self.end()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker has died with exit code {self._server.wait(60)}")
        return line


def serve() -> None:
    """Fork a child for each line of standard input, and answer with its number and its end."""
    import torch

    from pvae import canvas

    for name in _PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    with canvas.look():  # loads matplotlib
        canvas.figure(1, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        Path("counts.json").unlink(missing_ok=True)
        child = os.fork()
        if not child:
            _child(**json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(arguments: list[str], moment: Any, counted: list[str], prepare: str | None) -> None:
    """Run a command and leave, whatever happens."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        counts = dict.fromkeys(counted, 0)
        Path("counts.json").write_text(json.dumps(counts))
        if prepare is not None:
            _found(prepare)[2]()
        for name in counted:
            _patch(name, functools.partial(_counting, counts, name))
        if moment is not None:
            _patch(moment[0], functools.partial(_dying, Moment(*moment)))
        sys.argv = ["pvae", *arguments]
        from pvae.experiments.cli import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        Path("counts.json").write_text(json.dumps(counts))
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _found(name: str) -> tuple[Any, str, Any]:
    """The owner of a function, its name there, and the function."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, last, getattr(owner, last)


def _patch(name: str, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner, last, function = _found(name)
    setattr(owner, last, wrapped(function))


def _counting(counts: dict[str, int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def _dying(moment: Moment, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != moment.number:
            return function(*args, **kwargs)
        result = function(*args, **kwargs) if moment.when == "after" else None
        # No kill takes back what an earlier call has written to the end of a file.
        if moment.when == "half" and os.readlink(f"/proc/self/fd/{args[0]}").endswith(".tmp"):
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        os.kill(os.getpid(), moment.signal)
        return result if moment.when == "after" else function(*args, **kwargs)

    return call


if __name__ == "__main__":
    serve()
