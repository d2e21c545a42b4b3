"""Experiments: where models and guides meet, from a spec to a judged run."""

if __name__ != "pvae.experiments":
    raise ImportError(f"import this package as pvae.experiments, not as {__name__}")

from .program import Program, SpecError
from .runs import RunError, open_run
from .spec import Spec, load_spec

__all__ = ["Program", "RunError", "Spec", "SpecError", "load_spec", "open_run"]
