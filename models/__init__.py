"""Models: p(x, z | y) as Pyro programs."""

if __name__ != "pvae.models":
    raise ImportError(f"import this package as pvae.models, not as {__name__}")

from .vae import VAE

__all__ = ["VAE"]
