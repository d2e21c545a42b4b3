"""torchvision is imported late, in one place, and past operators that do not load."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvae.data
from pvae.data import _torchvision

# Behaves as a torchvision whose compiled operators are missing: without the schemas its import fails.
BROKEN = """
import torch

@torch.library.register_fake("torchvision::nms")
def _(dets, scores, iou_threshold):
    return dets

@torch.library.register_fake("torchvision::qnms")
def _(dets, scores, iou_threshold):
    return dets
"""


def python(code: str, *paths: Path) -> str:
    """Run code in a process of its own where every warning is an error; return what it printed."""
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]}\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def fake(folder: Path, content: str) -> Path:
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import ops\n")
    (package / "ops.py").write_text(content)
    (package / "datasets.py").write_text("name = 'datasets'\n")
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process without torchvision, to be given another one; put right afterwards."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    for name in kept:
        del sys.modules[name]
    yield monkeypatch
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_the_room_imports_it_when_files_are_read_and_not_before() -> None:
    printed = python(
        """
        import pvae.data
        heavy = ("torchvision", "sklearn", "scipy", "matplotlib", "PIL", "pandas")
        print(sorted(name for name in heavy if name in sys.modules))
        for name in ("two_moons", "digits"):
            pvae.data.load(name)
        print("torchvision" in sys.modules)
        from pvae.data import _torchvision
        datasets = _torchvision.datasets()
        print(datasets.MNIST.__name__, datasets is _torchvision.datasets(), datasets.__name__)
        """
    )
    assert printed.splitlines() == ["[]", "False", "MNIST True torchvision.datasets"]


def test_missing_operators_are_declared(tmp_path: Path) -> None:
    printed = python(
        """
        try:
            import torchvision
        except RuntimeError as error:
            print(str(error).splitlines()[0])
        from pvae.data import _torchvision
        print(_torchvision.datasets().name, sys.modules["torchvision"].ops.__name__)
        """,
        fake(tmp_path, BROKEN),
    )
    assert printed.splitlines() == ["operator torchvision::nms does not exist", "datasets torchvision.ops"]


def test_nothing_is_declared_where_the_import_works(tmp_path: Path, unloaded: pytest.MonkeyPatch) -> None:
    unloaded.syspath_prepend(fake(tmp_path, "loaded_plainly = True\n"))
    unloaded.setattr(_torchvision, "_declare", lambda: pytest.fail("declared operators that load"))
    assert _torchvision.datasets.__wrapped__().name == "datasets"


def test_other_failures_are_not_hidden(tmp_path: Path, unloaded: pytest.MonkeyPatch) -> None:
    unloaded.syspath_prepend(fake(tmp_path, "raise RuntimeError('something else')\n"))
    unloaded.setattr(_torchvision, "_declare", lambda: pytest.fail("took another failure for this one"))
    with pytest.raises(RuntimeError, match="something else"):
        _torchvision.datasets.__wrapped__()


def test_no_other_module_imports_it() -> None:
    room = Path(pvae.data.__file__).parent
    for path in room.glob("*.py"):
        if path.name != "_torchvision.py":
            text = path.read_text()
            assert "import torchvision" not in text
            assert "from torchvision" not in text
            assert 'import_module("torchvision' not in text
