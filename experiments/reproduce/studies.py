"""The studies by name."""

from .cvae_nf import CVAENF
from .density import DensityStudy
from .divae import DiVAEStudy
from .dvp import DVPStudy
from .five import FiveStudy
from .overstatement import OverstatementStudy
from .study import AnyStudy
from .x_vae import XVAEStudy

__all__ = ["STUDIES"]

STUDIES: dict[str, AnyStudy] = {
    study.name: study
    for study in (
        CVAENF(),
        XVAEStudy(),
        FiveStudy(),
        DiVAEStudy(),
        DensityStudy(),
        DVPStudy(),
        OverstatementStudy(),
    )
}
