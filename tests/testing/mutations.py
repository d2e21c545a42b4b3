"""Plant faults in a copy of the package and see that a test breaks: ``python -m tests.testing.mutations``.

Each mutation exchanges one piece of source text in a temporary copy of the checkout and runs the part
of the kit's tests that is there to notice. The process exits with 1 if a mutation survives, 2 if one does
not apply any more or the unchanged copy does not pass.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "Mutation", "main", "mutated", "run"]

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
        'log_w[chunk] += _log_prob(site, shape, "model")',
        'log_w[: shape[0]] += _log_prob(site, shape, "model")',
        _LIKELIHOOD,
    ),
    Mutation(
        "factors of the model counted",
        "pvae/evaluation/weights.py",
        "            if not site.is_factor:\n",
        "            if site is not None:\n",
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


def main(report: Callable[[str], object] = sys.stdout.write) -> int:
    """Run every mutation; return the process's exit status."""
    with tempfile.TemporaryDirectory() as folder:
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


def run(root: Path, tests: tuple[str, str]) -> str | None:
    """Run tests in a checkout; return the first that breaks with its complaint, or ``None`` if all pass.

    Raises:
        RuntimeError: If pytest could not run them.
    """
    path, expression = tests
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "300",
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", path, "-k", expression],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode == 1 and failed:
        return failed[0].removeprefix("FAILED ").removeprefix(f"{path}::")
    if result.returncode != 0:
        raise RuntimeError(f"pytest could not run {path}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return None


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=ignore)
    else:
        shutil.copy2(source, target)


if __name__ == "__main__":
    raise SystemExit(main())
