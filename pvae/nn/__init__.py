"""Networks, for any number of leading dimensions; no probability but r(u | x), which is one of them."""

from .conv_decoder import ConvDecoder
from .conv_encoder import ConvEncoder
from .coupling import CouplingNet
from .denoiser import MLPDenoiser, UNetDenoiser
from .derivatives import check_forward_mode
from .encoder import LOG_VAR_RANGE, Encoder
from .gated import GatedLinear
from .labels import LabelEmbedding, LabelSpace
from .ladder_bottom_up import BottomUp
from .ladder_spec import LadderSpec
from .ladder_top_down import Descent, TopDown
from .mlp import MLP
from .mlp_decoder import MLPDecoder
from .mlp_encoder import MLPEncoder
from .pair_mlp import PairDecoder, PairEncoder, PairMLP
from .pseudoinput import DCTPseudoinput, DownsampledPseudoinput, LinearPseudoinput, Pseudoinput
from .pseudoinput_posterior import PseudoinputPosterior
from .standardise import standardise_
from .whitened import WhitenedDecoder, WhitenedEncoder

__all__ = [
    "LOG_VAR_RANGE",
    "MLP",
    "BottomUp",
    "ConvDecoder",
    "ConvEncoder",
    "CouplingNet",
    "DCTPseudoinput",
    "Descent",
    "DownsampledPseudoinput",
    "Encoder",
    "GatedLinear",
    "LabelEmbedding",
    "LabelSpace",
    "LadderSpec",
    "LinearPseudoinput",
    "MLPDecoder",
    "MLPDenoiser",
    "MLPEncoder",
    "PairDecoder",
    "PairEncoder",
    "PairMLP",
    "Pseudoinput",
    "PseudoinputPosterior",
    "TopDown",
    "UNetDenoiser",
    "WhitenedDecoder",
    "WhitenedEncoder",
    "check_forward_mode",
    "standardise_",
]
