"""What a number was measured on: the data, their split, and how levels became ``x``, under one hash."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Binarize", "Protocol", "Scale", "Values"]

Binarize = Literal["dynamic", "static", "threshold"]
Scale = Literal["unit", "count", "real"]
Values = Literal["binary", "unit", "count", "real"]

# Enters every hash. It moves when the meaning of a field moves, for instance how fixed noise is drawn.
_VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """Everything that decides whether two likelihoods may stand in one table.

    Args:
        name: Name of the data set.
        split: How the parts were made, in words.
        sizes: Number of data of each part, ``(("train", 50000), ...)``.
        x_shape: Shape of one datum.
        binarize: ``"dynamic"``: drawn again for each training batch, once for validation and test;
            ``"static"``: drawn once; ``"threshold"``: levels of at least one half; ``None``: as stored.
        scale: ``"unit"``: grey levels on [0, 1]; ``"count"``: whole numbers; ``"real"``: as given.
        dequantize: Whether uniform noise was added, (k + u) / levels.
        values: What ``x`` holds, which a likelihood can refuse: ``"binary"``, ``"unit"``, ``"count"``,
            ``"real"``.
        levels: Number of distinct values of ``x`` where that is finite (2, 17, 256), else ``None``.
        seed: Seed of binarisation and dequantisation, of a shuffled split, of synthetic data; ``None`` where
            nothing was drawn by it, so that it tells no two equal protocols apart.
        sha256: Digest of the stored data of all parts, labels included.
        part: ``"train"``, ``"valid"`` or ``"test"``; ``None`` for the whole data set.
        subset: Which data of the part, ``None`` for all of them.
        note: What a reader must know before comparing; not part of the hash.
    """

    name: str
    split: str
    sizes: tuple[tuple[str, int], ...]
    x_shape: tuple[int, ...]
    binarize: Binarize | None
    scale: Scale
    dequantize: bool
    values: Values
    levels: int | None
    seed: int | None
    sha256: str
    part: str | None = None
    subset: str | None = None
    note: str = ""

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, equal for equal protocols on every machine."""
        fields = {key: value for key, value in self._fields().items() if key != "note"}
        text = json.dumps({"version": _VERSION, **fields}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the hash, in types that JSON knows."""
        return {**self._fields(), "hash": self.hash}

    def _fields(self) -> dict[str, Any]:
        return {**asdict(self), "sizes": dict(self.sizes), "x_shape": list(self.x_shape)}

    def __str__(self) -> str:
        what = self.name if self.part is None else f"{self.name}/{self.part}"
        if self.subset is not None:
            what += f"[{self.subset}]"
        how = [f"{self.values} values"]
        if self.binarize is not None:
            how = [f"binarized ({self.binarize})"]
        elif self.levels is not None:
            how.append(f"{self.levels} levels")
        if self.dequantize:
            how.append("dequantized")
        if self.seed is not None:
            how.append(f"seed {self.seed}")
        sizes = " / ".join(f"{part} {size}" for part, size in self.sizes)
        return f"{what}: {', '.join(how)}; {sizes} ({self.split}); protocol {self.hash}"
