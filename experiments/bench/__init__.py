"""What a training step and an evaluation cost, as ratios to hand-written PyTorch (see docs/benchmarks.md)."""

from .run import run_bench
from .steps import CASES, Case
from .table import format_table
from .timing import interleave
from .training import SyncCounter, count_syncs

__all__ = ["CASES", "Case", "SyncCounter", "count_syncs", "format_table", "interleave", "run_bench"]
