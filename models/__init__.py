"""Models: p(x, z | y) as Pyro programs."""

if __name__ != "pvae.models":
    raise ImportError(f"import this package as pvae.models, not as {__name__}")

from .autoencoder import Autoencoder
from .conditional import ConditionalVAE
from .hvae import HVAE
from .ladder import Ladder
from .vae import VAE
from .x_vae import XVAE

__all__ = ["HVAE", "VAE", "XVAE", "Autoencoder", "ConditionalVAE", "Ladder"]
