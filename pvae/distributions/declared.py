"""What a distribution says of itself beyond its density."""

from typing import Any

from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution

__all__ = ["declared"]


def declared(fn: Any, name: str, otherwise: Any) -> Any:
    """Read an attribute of a distribution, through wrappers that do not hand it on.

    Args:
        fn: The distribution, maybe masked or expanded by Pyro.
        name: Of the attribute, such as ``density`` of :class:`Diffusion`.
        otherwise: The answer of one that has no such attribute.
    """
    while isinstance(fn, MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return getattr(fn, name, otherwise)
