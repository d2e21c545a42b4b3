"""The batches of CIFAR-10, which are pickles: only bytes of a known sum are unpickled, and only to arrays."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

__all__ = ["read_batch"]

# Bytes of a batch; the published ones have 31,035,999 at most.
_LARGEST = 2**25
# What the pickles of arrays call, by the names of NumPy 1 and 2: nothing that does more than make one.
_CALLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def read_batch(path: Path, md5: str) -> Any:
    """Unpickle a file, once its sum is that of the published one.

    Args:
        path: The file.
        md5: Its sum, in hexadecimal digits.

    Raises:
        ValueError: If it has another sum.
        pickle.UnpicklingError: If it would call anything but what makes arrays.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    # The sum is that of the bytes in hand, which nobody can exchange any more.
    if len(content) > _LARGEST or hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path.name} does not have the published sum")
    return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that finds nothing but what arrays are made with."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of few functions of NumPy.

        Raises:
            pickle.UnpicklingError: For any other name.
        """
        if (module, name) not in _CALLED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no array needs")
        return super().find_class(module, name)
