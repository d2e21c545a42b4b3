"""All latents of a model in one vector, for what moves or fits them together."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.inference.program import Program, Site

from .latents import _run

__all__ = ["Layout", "check_real", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """Where the numbers of each latent site stand in one vector.

    Attributes:
        shapes: Event shape of each site, in the model's order.
        dtype: Precision that the programs compute in.
    """

    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Number D of latent numbers of a datum."""
        return sum(shape.numel() for shape in self.shapes.values())

    def sites(self, z: Tensor) -> dict[str, Tensor]:
        """Cut vectors ``(*batch, D)`` into values of the sites, ``(*batch, *event_shape)``."""
        parts = z.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(*z.shape[:-1], *shape).to(self.dtype)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def vectors(self, values: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Put values ``(*batch, *event_shape)`` side by side, ``(*batch, D)``, as ``dtype`` or their own."""
        parts = [
            values[name].reshape(*values[name].shape[: values[name].ndim - len(shape)], -1)
            for name, shape in self.shapes.items()
        ]
        return torch.cat(parts, -1).to(dtype or parts[0].dtype)


def layout_of(model: Program, x: Tensor, y: Tensor | None) -> Layout:
    """Lay out the latents of a model, which must be real numbers.

    Raises:
        ValueError: If a latent is discrete or bounded.
    """
    sites = _run(model, x[:1], None if y is None else y[:1])
    check_real(sites, "model")
    latents = {name: site for name, site in sites.items() if not (site.observed or site.is_factor)}
    dtype = next((site.value.dtype for site in latents.values()), x.dtype)
    return Layout({name: site.value.shape[1:] for name, site in latents.items()}, dtype)


def check_real(sites: Mapping[str, Site], where: str) -> None:
    """Refuse latents that are not real numbers: no Gaussian lives there, and no gradient leads along.

    Args:
        sites: The sites of a program.
        where: ``"model"`` or ``"guide"``, for the message.

    Raises:
        ValueError: If a latent is discrete or bounded.
    """
    for site in sites.values():
        if site.observed or site.is_factor:
            continue
        support = site.fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if not isinstance(support, type(constraints.real)):
            raise ValueError(f"{where} site {site.name!r} must be real, got support {support}")
