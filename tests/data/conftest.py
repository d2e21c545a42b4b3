"""Where the files are: real ones where there are any, built ones always."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .files import write_all


def real_root() -> Path | None:
    """The folder of real files: the one PVAE_DATA names, else ``shared/data`` beside the checkout."""
    named = os.environ.get("PVAE_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    for root in ([Path(named)] if named else []) + [beside]:
        if root.is_dir():
            return root
    return None


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with built files of every set; tests only read it."""
    root = tmp_path_factory.mktemp("built")
    write_all(root)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def real(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of links: to the real files, and to built ones for those that are not there."""
    root, found = tmp_path_factory.mktemp("real"), real_root()
    for path in built.rglob("*"):
        if path.is_file():
            file = path.relative_to(built)
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            there = found is not None and (found / file).is_file()
            (root / file).symlink_to(found / file if there and found is not None else path)
    return root


@pytest.fixture(params=["real", "built"])
def root(request: pytest.FixtureRequest) -> Path:
    """Real files, as far as there are any, and built ones, always."""
    path: Path = request.getfixturevalue(request.param)
    return path
