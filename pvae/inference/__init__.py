"""Training: objectives, the loop, schedules and checkpoints."""

from .calibrate import calibrate_diffusion, measure_sigma
from .checkpoint import CheckpointError, load_parameters
from .distributed import PeerFailure, Team
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
    "PeerFailure",
    "Run",
    "Team",
    "Trainer",
    "calibrate_diffusion",
    "fit",
    "load_parameters",
    "measure_sigma",
    "registered",
]
