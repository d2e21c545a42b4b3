"""Data sets, their protocols, and batches of them."""

from .dataset import Data
from .errors import CorruptData, DataError, MissingData, MissingPart
from .load import load, names
from .protocol import Protocol
from .split import Batch, Split
from .streaming import StreamingSplit, from_datasets
from .tensors import from_tensors

__all__ = [
    "Batch",
    "CorruptData",
    "Data",
    "DataError",
    "MissingData",
    "MissingPart",
    "Protocol",
    "Split",
    "StreamingSplit",
    "from_datasets",
    "from_tensors",
    "load",
    "names",
]
