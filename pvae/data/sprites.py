"""Drawn shapes with ten known binary attributes, some of them correlated and some combinations rare."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._request import Request
from ._seeds import derive_seed
from ._synthetic import affordable
from .dataset import Source
from .errors import DataError

__all__ = ["ATTRIBUTES", "Attribute", "Sprites", "sprites"]

_SIZE = 32
_NUISANCES = 6


@dataclass(frozen=True)
class Attribute:
    """One binary attribute and how it is drawn.

    Args:
        name: Its name.
        meaning: What the picture shows where it is 1 and where it is 0.
        parent: The earlier attribute it depends on, or ``None``.
        probability: P(1) where the parent is 0 and where it is 1 (twice the same without a parent).
    """

    name: str
    meaning: str
    parent: str | None
    probability: tuple[float, float]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("round", "an ellipse, not a rectangle (both 1.6 times as long as wide)", None, (0.5, 0.5)),
    Attribute("large", "half-length 8 pixels, not 5.2", None, (0.4, 0.4)),
    Attribute("filled", "the inside at half the tone of the outline, not empty", "large", (0.35, 0.85)),
    Attribute("striped", "stripes in the outline's tone across the inside", "filled", (0.08, 0.45)),
    Attribute("rotated", "turned by 45 degrees, not lying", "round", (0.5, 0.2)),
    Attribute("left", "centred in the left half, not the right", None, (0.5, 0.5)),
    Attribute("top", "centred in the upper half, not the lower", "left", (0.25, 0.7)),
    Attribute("light", "drawn in a light tone, not a dark one", "filled", (0.75, 0.4)),
    Attribute("bordered", "a frame around the picture", "large", (0.03, 0.12)),
    Attribute("dotted", "a disc in the corner that the shape leaves free", "bordered", (0.3, 0.02)),
)


class Sprites:
    """The distribution of attributes, and the pictures that follow from them.

    Args:
        attributes: The sampling table, parents before children.
    """

    def __init__(self, attributes: tuple[Attribute, ...] = ATTRIBUTES) -> None:
        self.attributes = attributes
        self.names = tuple(attribute.name for attribute in attributes)

    def log_prob(self, y: Tensor) -> Tensor:
        """Return log P(y) in nats of attributes ``y``, ``(*batch, L) -> (*batch,)``, values 0 or 1."""
        values = y.detach().cpu().numpy()
        given = self._probability(values)
        chosen = np.where(values > 0.5, given, 1 - given)
        return torch.as_tensor(np.log(chosen).sum(-1)).to(y)

    def rate(self, **values: int) -> float:
        """Return the probability that the named attributes have these values, whatever the others are.

        Example:
            >>> round(Sprites().rate(bordered=1, dotted=1), 5)
            0.00132
        """
        unknown = set(values) - set(self.names)
        if unknown:
            raise ValueError(
                f"attributes must be among {', '.join(self.names)}, got {', '.join(sorted(unknown))}"
            )
        every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(self.names))
        fits = torch.ones(len(every), dtype=torch.bool)
        for name, value in values.items():
            fits &= every[:, self.names.index(name)] == value
        return float(self.log_prob(every[fits]).exp().sum())

    def draw(self, generator: np.random.Generator, n: int) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pictures, uint8 ``(n, 1, 32, 32)``, and their attributes, float32 ``(n, L)``."""
        uniform = generator.random((n, len(self.names)))
        y = np.zeros((n, len(self.names)))
        for column in range(len(self.names)):
            # A column's probability reads only columns to its left, which are already drawn.
            y[:, column] = uniform[:, column] < self._probability(y)[:, column]
        attributes = torch.from_numpy(y).to(torch.float32)
        return self.render(attributes, torch.from_numpy(generator.random((n, _NUISANCES)))), attributes

    def render(self, y: Tensor, nuisance: Tensor | None = None) -> Tensor:
        """Draw the pictures of attributes.

        Args:
            y: Attributes, shape ``(n, L)``, values 0 or 1.
            nuisance: What attributes do not say (two of the position, size, angle, tone, background), shape
                ``(n, 6)``, each in [0, 1); ``None`` for the middle of each range.

        Returns:
            Pictures, uint8, shape ``(n, 1, 32, 32)``.
        """
        if y.ndim != 2 or y.shape[1] != len(self.names) or not bool(((y == 0) | (y == 1)).all()):
            raise ValueError(
                f"y must have shape (n, {len(self.names)}) and values 0 or 1, got {tuple(y.shape)}"
            )
        if nuisance is None:
            nuisance = torch.full((len(y), _NUISANCES), 0.5, dtype=torch.float64)
        if nuisance.shape != (len(y), _NUISANCES):
            raise ValueError(
                f"nuisance must have shape ({len(y)}, {_NUISANCES}), got {tuple(nuisance.shape)}"
            )
        chosen, jitter = y.cpu().numpy() > 0.5, nuisance.cpu().numpy().astype(np.float64)
        chunks = [
            _render(
                {name: chosen[at : at + 512, i] for i, name in enumerate(self.names)}, jitter[at : at + 512]
            )
            for at in range(0, len(y), 512)
        ]
        return torch.from_numpy(np.concatenate(chunks)).unsqueeze(1)

    def _probability(self, y: NDArray[np.floating]) -> NDArray[np.float64]:
        """P(attribute = 1) given its parent's value, elementwise."""
        probability = np.empty(y.shape)
        for column, attribute in enumerate(self.attributes):
            off, on = attribute.probability
            given = 0.0 if attribute.parent is None else y[..., self.names.index(attribute.parent)]
            probability[..., column] = np.where(np.greater(given, 0.5), on, off)
        return probability


def sprites(
    request: Request, *, balanced: bool = False, num_train: int = 8_000, num_test: int = 2_000
) -> Source:
    """Draw sprites, ``x_shape (1, 32, 32)``, ``y`` the ten attributes, float32 ``(N, 10)``.

    The sampling table; an attribute depends on its parent alone:

    ========  ======  ================  ================
    name      parent  P(1), parent 0    P(1), parent 1
    ========  ======  ================  ================
    round             0.5
    large             0.4
    filled    large   0.35              0.85
    striped   filled  0.08              0.45
    rotated   round   0.5               0.2
    left              0.5
    top       left    0.25              0.7
    light     filled  0.75              0.4
    bordered  large   0.03              0.12
    dotted    bordered 0.3              0.02
    ========  ======  ================  ================

    So size goes with filling, place with place, tone against filling; a striped shape that is not filled
    has rate 0.036, a small one with a border 0.018, border and dot together 0.00132.
    ``data.truth.rate(...)`` gives the rate of any combination, ``data.truth.render(y)`` its picture.
    Position, size, angle, tone and background vary within ranges that do not overlap between the values of
    an attribute.

    Args:
        request: What is asked for; ``valid`` is the size of the validation part (1,000).
        balanced: Whether all attributes are independent coins instead.
        num_train: Size of the training part.
        num_test: Size of the test part.
    """
    table = ATTRIBUTES
    if balanced:
        table = tuple(Attribute(entry.name, entry.meaning, None, (0.5, 0.5)) for entry in ATTRIBUTES)
    truth = Sprites(table)
    sizes = {
        "train": num_train,
        "valid": 1_000 if request.valid is None else request.valid,
        "test": num_test,
    }
    if num_train < 1 or num_test < 1 or sizes["valid"] < 0:
        raise DataError(
            f"num_train, valid and num_test must be positive, got {', '.join(map(str, sizes.values()))}"
        )
    for part, size in sizes.items():
        affordable(**{part if part == "valid" else f"num_{part}": size}, pixels=_SIZE**2, most=2**30)
    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    for part, size in sizes.items():
        if size > 0:
            parts[part] = truth.draw(np.random.default_rng(derive_seed("sprites", request.seed, part)), size)
    return Source(
        kind="levels",
        levels=256,
        binarize=None,
        split="independent draws, balanced attributes" if balanced else "independent draws",
        seeded=True,
        parts=parts,
        attribute_names=truth.names,
        truth=truth,
    )


def _render(is_: dict[str, NDArray[np.bool_]], jitter: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Draw pictures by signed distances in pixels, negative inside; an edge is one pixel of linear ramp.

    Args:
        is_: Value of each attribute, ``(n,)``.
        jitter: Nuisances, ``(n, 6)``.

    Returns:
        Pictures, ``(n, 32, 32)``.
    """
    spread = 2 * jitter - 1
    column = np.arange(_SIZE, dtype=np.float64)
    middle = (_SIZE - 1) / 2

    def scalar(values: NDArray[Any]) -> NDArray[Any]:
        return values[:, None, None]

    centre_x = scalar(middle + np.where(is_["left"], -4.5, 4.5) + 0.8 * spread[:, 0])
    centre_y = scalar(middle + np.where(is_["top"], -4.5, 4.5) + 0.8 * spread[:, 1])
    length = scalar(np.where(is_["large"], 8.0, 5.2) + 0.3 * spread[:, 2])
    angle = scalar(math.pi / 180 * (np.where(is_["rotated"], 45.0, 0.0) + 8.0 * spread[:, 3]))
    ink = scalar(np.where(is_["light"], 0.95, 0.6) + 0.05 * spread[:, 4])
    background = scalar(0.08 + 0.04 * spread[:, 5])

    # Coordinates along (u) and across (v) the shape's long axis; the axis of rows points down.
    dx, dy = column[None, None, :] - centre_x, column[None, :, None] - centre_y
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = np.cos(angle) * dy - np.sin(angle) * dx
    shape = np.where(
        scalar(is_["round"]), _ellipse(u, v, length, length / 1.6), _box(u, v, length, length / 1.6)
    )
    outline = np.abs(shape + 0.65) - 0.65
    stripes = np.maximum(np.abs((u % 3.4) - 1.7) - 0.6, shape)
    dot_x = middle - 10.5 * np.sign(centre_x - middle)
    dot_y = middle - 10.5 * np.sign(centre_y - middle)
    dot = np.hypot(column[None, None, :] - dot_x, column[None, :, None] - dot_y) - 2.2
    edge = np.minimum(column, _SIZE - 1 - column)
    frame = np.broadcast_to(np.minimum(edge[None, None, :], edge[None, :, None]) - 1.0, shape.shape)

    picture = np.broadcast_to(background, shape.shape).copy()
    for present, distance, tone in (
        (is_["filled"], shape, 0.5 * ink),
        (is_["striped"], stripes, ink),
        (np.ones_like(is_["filled"]), outline, ink),
        (is_["dotted"], dot, ink),
        (is_["bordered"], frame, ink),
    ):
        cover = scalar(present) * np.clip(0.5 - distance, 0.0, 1.0)
        picture += cover * (tone - picture)
    return np.floor(255 * picture + 0.5).astype(np.uint8)


def _box(
    u: NDArray[np.float64], v: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Signed distance to a rectangle of half-axes ``a``, ``b``."""
    du, dv = np.abs(u) - a, np.abs(v) - b
    outside = np.hypot(np.maximum(du, 0.0), np.maximum(dv, 0.0))
    return outside + np.minimum(np.maximum(du, dv), 0.0)


def _ellipse(
    u: NDArray[np.float64], v: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Signed distance to an ellipse of half-axes ``a``, ``b``, to first order at its edge."""
    level = np.hypot(u / a, v / b)
    slope = np.hypot(u / a**2, v / b**2)
    # At the centre both vanish; any clearly negative value means inside there.
    return np.where(slope > 0, level * (level - 1) / np.where(slope > 0, slope, 1.0), -b)
