"""Networks: no probability, any number of leading dimensions."""

from .conv_decoder import ConvDecoder
from .conv_encoder import ConvEncoder
from .coupling import CouplingNet
from .derivatives import check_forward_mode
from .encoder import LOG_VAR_RANGE, Encoder
from .gated import GatedLinear
from .labels import LabelEmbedding, LabelSpace
from .mlp import MLP
from .mlp_decoder import MLPDecoder
from .mlp_encoder import MLPEncoder
from .standardise import standardise_
from .whitened import WhitenedDecoder, WhitenedEncoder

__all__ = [
    "LOG_VAR_RANGE",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "CouplingNet",
    "Encoder",
    "GatedLinear",
    "LabelEmbedding",
    "LabelSpace",
    "MLPDecoder",
    "MLPEncoder",
    "WhitenedDecoder",
    "WhitenedEncoder",
    "check_forward_mode",
    "standardise_",
]
