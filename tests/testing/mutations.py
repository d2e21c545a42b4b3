"""Plant faults in a copy of the package and see that a test breaks: ``python -m tests.testing.mutations``.

Each mutation exchanges one piece of source text in a temporary copy of the checkout and runs the part
of the kit's tests that is there to notice. The process exits with 1 if a mutation survives, 2 if one does
not apply any more or the unchanged copy does not pass.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["MUTATIONS", "Mutation", "Runner", "main", "mutated"]

ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("pvae", "models", "guides", "experiments", "tests", "pyproject.toml")
_LIKELIHOOD = ("tests/testing/test_likelihood.py", "ours")
_OURS = "tests/testing/test_ours.py"


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Args:
        name: What is wrong with it.
        path: The file it is planted in.
        old: Text that stands there exactly once.
        new: Text to put in its place.
        tests: A test file, and an expression for ``pytest -k``.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, str]


MUTATIONS = (
    Mutation(
        "log q dropped from the weights",
        "pvae/evaluation/weights.py",
        'log_q += _log_prob(site, shape, "guide")',
        '_log_prob(site, shape, "guide")',
        _LIKELIHOOD,
    ),
    Mutation(
        "mean of the log-weights instead of log-mean-exp",
        "pvae/evaluation/likelihood.py",
        "total - math.log(num_particles),",
        "log_w.mean(-1),",
        _LIKELIHOOD,
    ),
    Mutation(
        "one k-hat for the weights of all data",
        "pvae/evaluation/likelihood.py",
        "pareto_khat(log_w, rounding),",
        "pareto_khat(log_w.reshape(1, -1), rounding).expand(len(log_w)),",
        _LIKELIHOOD,
    ),
    Mutation(
        "k-hat of the inverse weights",
        "pvae/evaluation/pareto.py",
        "array_stats.psislw(-log_w, axis=-1)",
        "array_stats.psislw(log_w, axis=-1)",
        _LIKELIHOOD,
    ),
    Mutation(
        "weights of later particle chunks lost",
        "pvae/evaluation/weights.py",
        "        pieces.append(log_p)\n",
        "        pieces.append(log_p if not pieces else log_w[piece])\n",
        ("tests/testing/test_likelihood.py", "many_passes"),
    ),
    Mutation(
        "factors of the model counted",
        "pvae/evaluation/weights.py",
        "            if not (site.is_factor or site.name in estimated):\n",
        "            if site.name not in estimated:\n",
        _LIKELIHOOD,
    ),
    Mutation(
        "training scales counted",
        "pvae/evaluation/weights.py",
        "log_prob = site.log_prob()",
        "log_prob = site.scaled_log_prob()",
        _LIKELIHOOD,
    ),
    Mutation(
        "programs left in training mode",
        "pvae/inference/isolation.py",
        "module.training = False",
        "module.training = modules[module]",
        _LIKELIHOOD,
    ),
    Mutation(
        "wrong sign in the coupling's log-determinant",
        "pvae/distributions/affine_coupling.py",
        "return self._conditioner(x)[1].sum(-1)",
        "return -self._conditioner(x)[1].sum(-1)",
        (_OURS, "affine_coupling"),
    ),
    Mutation(
        "wrong sign in the flow prior's log-determinant",
        "pvae/distributions/affine_coupling.py",
        "log_scale.exp()), log_scale.sum(-1)",
        "log_scale.exp()), -log_scale.sum(-1)",
        (_OURS, "flow_normal"),
    ),
    Mutation(
        "coupling inverted with the scale not undone",
        "pvae/distributions/affine_coupling.py",
        "(y - shift) * torch.exp(-log_scale)",
        "(y - shift) * torch.exp(log_scale)",
        (_OURS, "affine_coupling"),
    ),
    Mutation(
        "last bin of the logistic mixture closed",
        "pvae/distributions/discretized_logistic_mixture.py",
        "below = F.logsigmoid(lower + width).masked_fill(last, 0.0)",
        "below = F.logsigmoid(lower + width)",
        (_OURS, "logistic"),
    ),
    Mutation(
        "mixture drawn with equal weights",
        "pvae/distributions/normal_mixture.py",
        "component = sample_categorical(self.logits, shape[:-1])",
        "component = sample_categorical(0 * self.logits, shape[:-1])",
        (_OURS, "normal_mixture"),
    ),
)


# What a Runner talks to: a line for each run, then a line with its exit status and all it printed.
_PARENT = """
import json, os, sys, tempfile
import pytest, torch, pyro, numpy, scipy.stats

for line in sys.stdin:
    root, path, expression = json.loads(line)
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            os.chdir(root)
            sys.path.insert(0, root)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", path, "-k", expression])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        print(json.dumps([code, printed.read()]), flush=True)
"""


def main(report: Callable[[str], object] = sys.stdout.write) -> int:
    """Run every mutation; return the process's exit status."""
    with tempfile.TemporaryDirectory() as folder, Runner() as run:
        copy = Path(folder)
        for name in _COPIED:
            _copy(ROOT / name, copy / name)
        for tests in sorted({mutation.tests for mutation in MUTATIONS}):
            if run(copy, tests) is not None:
                report(f"the copy without a mutation does not pass {' -k '.join(tests)}\n")
                return 2
        survived = 0
        for mutation in MUTATIONS:
            source = copy / mutation.path
            text = source.read_text()
            try:
                source.write_text(mutated(mutation, text))
            except ValueError as error:
                report(f"{error}\n")
                return 2
            start = time.monotonic()
            broken = run(copy, mutation.tests)
            source.write_text(text)
            survived += broken is None
            verdict = broken or f"SURVIVES {' -k '.join(mutation.tests)}"
            report(f"{mutation.name:<48}  {verdict}  ({time.monotonic() - start:.0f} s)\n")
        report(f"{len(MUTATIONS) - survived} of {len(MUTATIONS)} mutations break a test\n")
    return 1 if survived else 0


def mutated(mutation: Mutation, text: str) -> str:
    """Return ``text`` with the mutation in it.

    Raises:
        ValueError: If what it exchanges does not stand there exactly once.
    """
    found = text.count(mutation.old)
    if found != 1:
        raise ValueError(f"{mutation.path} must hold {mutation.old!r} exactly once, found it {found} times")
    return text.replace(mutation.old, mutation.new)


class Runner:
    """Runs tests of a checkout, each time in a process of its own that has imported nothing of it.

    The processes are forked from one that has imported what takes long and never changes: torch and Pyro.
    """

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-c", _PARENT]
        self._parent = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate()

    def __call__(self, root: Path, tests: tuple[str, str]) -> str | None:
        """Return the first test that breaks with its complaint, or ``None`` if all pass.

        Raises:
            RuntimeError: If pytest could not run them.
        """
        path, expression = tests
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([str(root), path, expression]) + "\n")
        self._parent.stdin.flush()
        code, output = json.loads(self._parent.stdout.readline())
        failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        if code == 1 and failed:
            return str(failed[0]).removeprefix("FAILED ").removeprefix(f"{path}::")
        if code != 0:
            raise RuntimeError(f"pytest could not run {path}: {output[-4000:]}")
        return None


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=ignore)
    else:
        shutil.copy2(source, target)


if __name__ == "__main__":
    raise SystemExit(main())
