"""The studies by name."""

from .cvae_nf import CVAENF
from .five import FiveStudy
from .study import Study
from .x_vae import XVAEStudy

__all__ = ["STUDIES"]

STUDIES: dict[str, Study] = {study.name: study for study in (CVAENF(), XVAEStudy(), FiveStudy())}
