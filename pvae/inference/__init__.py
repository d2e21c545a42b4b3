"""Training: objectives, the loop, schedules and checkpoints."""

from .calibrate import measure_sigma
from .checkpoint import CheckpointError, load_parameters
from .fit import fit
from .loop import Monitor, Run
from .objective import ELBO
from .program import registered
from .trainer import NonFiniteLoss, Trainer

__all__ = [
    "ELBO",
    "CheckpointError",
    "Monitor",
    "NonFiniteLoss",
    "Run",
    "Trainer",
    "fit",
    "load_parameters",
    "measure_sigma",
    "registered",
]
