"""The room has one name, and its command starts without the heavy libraries."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import pvae.experiments

HEAVY = ("matplotlib", "sklearn", "torchvision", "arviz_stats", "rich", "scipy", "pandas", "PIL", "xarray")


def test_the_room_refuses_another_name() -> None:
    spec = importlib.util.spec_from_file_location("experiments", Path(pvae.experiments.__file__ or ""))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r"import this package as pvae\.experiments, not as experiments"):
        spec.loader.exec_module(module)


def test_public_names_are_there() -> None:
    assert all(hasattr(pvae.experiments, name) for name in pvae.experiments.__all__)


def test_the_command_starts_light() -> None:
    program = (
        "import sys, torch, pyro\n"
        "before = set(sys.modules)\n"
        "import pvae\n"
        "assert 'pydantic' not in sys.modules and 'typer' not in sys.modules\n"
        "import pvae.experiments.cli\n"
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
