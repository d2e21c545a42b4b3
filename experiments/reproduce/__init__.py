"""Studies that reproduce a paper's claims: many trainings, one table."""

from .ledger import Ledger, Record
from .report import report
from .runner import Plan, plan, run
from .studies import STUDIES
from .study import SCALES, AnyStudy, Cell, Context, Metrics, Outcome, Scale, Source, Study

__all__ = [
    "SCALES",
    "STUDIES",
    "AnyStudy",
    "Cell",
    "Context",
    "Ledger",
    "Metrics",
    "Outcome",
    "Plan",
    "Record",
    "Scale",
    "Source",
    "Study",
    "plan",
    "report",
    "run",
]
