"""A compiled function that mends its cache: a kill within the compilation leaves half a library behind."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["recompiling"]

# How a loader begins to say that it cannot load a library.
_LIBRARY = re.compile(r"^\s*(?:ImportError: |OSError: )?(?P<path>/\S+\.(?:so|dylib)): ", re.MULTILINE)
# Libraries of one graph that may be damaged at once.
_MOST = 20


def recompiling(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Let a compiled function compile again what it finds damaged in the compiler's cache.

    The compiler writes a library under its final name, so a process that is killed meanwhile leaves one that
    every later process fails to load. Such a library is removed, and the function called again.

    Args:
        compiled: What ``torch.compile`` returned.
    """

    def call(*args: Any) -> Any:
        for _ in range(_MOST):
            try:
                return compiled(*args)
            except (RuntimeError, ImportError, OSError) as error:
                removed = [path for path in _unloadable(error) if _remove(path)]
                if not removed:
                    raise
        return compiled(*args)

    return call


def _unloadable(error: BaseException) -> Iterator[Path]:
    """Libraries in the compiler's cache that could not be loaded, by the error and what caused it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    root = Path(cache_dir()).resolve()
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ImportError | OSError | torch._dynamo.exc.BackendCompilerFailed):
            for found in _LIBRARY.finditer(str(seen)):
                path = Path(found["path"])
                if root in path.resolve().parents:
                    yield path
        seen = seen.__cause__ or seen.__context__


def _remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
