"""What a model is conditioned on: class numbers or binary attributes, and their embedding."""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from .leading import check_size
from .mlp import MLP

__all__ = ["LabelEmbedding", "LabelSpace", "embedded"]


@dataclass(frozen=True)
class LabelSpace:
    """The values that a label y may have.

    Attributes:
        kind: ``"class"``: one of ``size`` numbers, y of shape ``(*batch,)``, int64. ``"attributes"``:
            ``size`` binary attributes, y of shape ``(*batch, size)``, float, each 0 or 1.
        size: Number of classes or of attributes.

    Raises:
        ValueError: If ``kind`` is another word, or ``size`` is not positive.

    Example:
        >>> LabelSpace("class", 3).encode(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    kind: Literal["class", "attributes"]
    size: int

    def __post_init__(self) -> None:
        if self.kind not in ("class", "attributes"):
            raise ValueError(f"kind must be 'class' or 'attributes', got {self.kind!r}")
        check_size("size", self.size)

    @classmethod
    def of(cls, num_classes: int | None, num_attributes: int | None) -> Self | None:
        """Return the space of so many classes or attributes, or ``None`` where there are neither."""
        if num_attributes:
            return cls("attributes", num_attributes)
        return cls("class", num_classes) if num_classes else None

    def encode(self, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Write labels as vectors: one-hot for classes, as they are for attributes; no synchronisation.

        Args:
            y: Labels, as :attr:`kind` says.
            dtype: Type of the result, torch's default if absent.

        Returns:
            Shape ``(*batch, size)``.

        Raises:
            TypeError: If classes come as floats.
            ValueError: If attributes have another shape. Values are checked by :meth:`check` alone.
        """
        dtype = dtype or torch.get_default_dtype()
        if self.kind == "class":
            if y.is_floating_point():
                raise TypeError(f"y must hold class numbers as integers, got {y.dtype}")
            return (y.unsqueeze(-1) == torch.arange(self.size, device=y.device)).to(dtype)
        if y.ndim < 1 or y.shape[-1] != self.size:
            raise ValueError(f"y must have shape (*batch, {self.size}), got {tuple(y.shape)}")
        return y.to(dtype)

    def check(self, y: Tensor) -> None:
        """Refuse labels outside the space. Synchronises with the host: for the doors, not for the loop.

        Raises:
            TypeError: If classes come as floats.
            ValueError: If y has another shape, an entry is no class number, or an attribute is neither 0 nor
                1 (a missing one is not supported).
        """
        self.encode(y)
        if self.kind == "class":
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.size:
                raise ValueError(
                    f"y must hold class numbers 0 ... {self.size - 1}, got {int(y.min())} ... {int(y.max())}"
                )
            return
        odd = (y != 0) & (y != 1)
        if bool(odd.any()):
            raise ValueError(f"y must hold attributes 0 or 1, none missing, got {y[odd][0].item():g}")


class LabelEmbedding(nn.Module):
    """Labels as vectors that a network can take in.

    Args:
        space: What the labels are.
        dim: Size of the embedding.
        kind: ``"mlp"``: a network of one hidden layer of ``dim`` units on the encoded label. ``"table"``: for
            classes a vector each; for attributes a vector for 0 and one for 1 that all of them share, side by
            side (arXiv:2511.08946, the author's code), so that ``dim`` is a multiple of their number.

    Raises:
        TypeError: If ``dim`` is no int.
        ValueError: If ``dim`` is not positive, or not a multiple of the number of attributes in a table, or
            ``kind`` is another word.
    """

    def __init__(self, space: LabelSpace, dim: int = 64, kind: Literal["mlp", "table"] = "mlp") -> None:
        super().__init__()
        self.space = space
        self.dim = check_size("dim", dim)
        if kind not in ("mlp", "table"):
            raise ValueError(f"kind must be 'mlp' or 'table', got {kind!r}")
        shared = kind == "table" and space.kind == "attributes"
        if shared and dim % space.size:
            raise ValueError(f"dim must be a multiple of the {space.size} attributes in a table, got {dim}")
        self.mlp = MLP(space.size, dim, (dim,), "silu") if kind == "mlp" else None
        rows, width = (2, dim // space.size) if shared else (space.size, dim)
        self.table = None if kind == "mlp" else nn.Parameter(torch.randn(rows, width))

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels.

        Args:
            y: Class numbers ``(*batch,)``, int64, or attributes ``(*batch, size)``.

        Returns:
            Shape ``(*batch, dim)``.

        Raises:
            TypeError: If classes come as floats.
            ValueError: If attributes have another shape.
        """
        weight = self.table if self.mlp is None else self.mlp.out.weight
        assert weight is not None
        encoded = self.space.encode(y, weight.dtype)
        if self.mlp is not None:
            return self.mlp(encoded)
        if self.space.kind == "class":
            return encoded @ weight
        return torch.lerp(weight[0], weight[1], encoded.unsqueeze(-1)).flatten(-2)


def embedded(labels: LabelEmbedding, y: Tensor | None, name: str) -> Tensor:
    """Embed the labels that network ``name`` needs.

    Raises:
        ValueError: If there are none.
    """
    if y is None:
        raise ValueError(f"y must be given: this {name} sees labels")
    return labels(y)
