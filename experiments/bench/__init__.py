"""What a training step and an evaluation cost, as ratios to hand-written PyTorch, to the bare networks of
every recipe, and to other libraries (see docs/benchmarks.md).
"""

from .compare import Comparison, Stored, compare, read_stored
from .run import run_bench
from .steps import CASES, Case
from .table import format_table
from .timing import interleave, machine_of
from .training import OpCounter, StepCounts, SyncCounter, count_step, count_syncs

__all__ = [
    "CASES",
    "Case",
    "Comparison",
    "OpCounter",
    "StepCounts",
    "Stored",
    "SyncCounter",
    "compare",
    "count_step",
    "count_syncs",
    "format_table",
    "interleave",
    "machine_of",
    "read_stored",
    "run_bench",
]
