"""A compiler's cache that a kill has damaged is mended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pvae.inference.recompiling import recompiling


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "zw").mkdir(parents=True)
    return tmp_path / "cache"


def _loader(*libraries: Path) -> tuple[list[int], object]:
    """A function that fails while one of some files is there, as the compiler does."""
    calls: list[int] = []

    def compiled(x: int) -> int:
        calls.append(x)
        for path in libraries:
            if path.exists():
                try:
                    raise ImportError(f"{path}: file too short")
                except ImportError as error:
                    raise RuntimeError("backend='inductor' raised:") from error
        return x + 1

    return calls, compiled


def test_a_library_that_cannot_be_loaded_is_removed_and_compiled_again(cache: Path) -> None:
    libraries = [cache / "zw" / f"{name}.main.so" for name in "ab"]
    for path in libraries:
        path.touch()
    calls, compiled = _loader(*libraries)
    assert recompiling(compiled)(1) == 2  # type: ignore[arg-type]
    assert calls == [1, 1, 1]
    assert not any(path.exists() for path in libraries)


def test_nothing_else_is_removed(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "libsystem.so"
    other.touch()
    _, compiled = _loader(other)
    with pytest.raises(RuntimeError, match="inductor"):
        recompiling(compiled)(1)  # type: ignore[arg-type]
    assert other.exists()

    def broken(x: int) -> int:
        raise RuntimeError(f"{cache}/zw/a.so: a fault of the program")

    (cache / "zw" / "a.so").touch()
    with pytest.raises(RuntimeError, match="a fault"):
        recompiling(broken)(1)
    assert (cache / "zw" / "a.so").exists()


PROGRAM = """
import torch
from pvae.inference.recompiling import recompiling
compiled = recompiling(torch.compile(lambda x: (x.sin() * 2 + x.cos()).sum(0), fullgraph=True))
print(float(compiled(torch.arange(64.0).reshape(8, 8)).sum()))
"""


@pytest.mark.slow
def test_the_compiler_finds_a_truncated_library(cache: Path) -> None:
    def run() -> str:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    wanted = run()
    (library,) = cache.glob("*/*.main.so")
    whole = library.stat().st_size
    os.truncate(library, 100)
    assert run() == wanted
    assert library.stat().st_size == whole
