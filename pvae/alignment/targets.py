r"""What log p(z) is aligned with, datum by datum (DiVAE 2025, arXiv:2512.03928v1)."""

import hashlib
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["DensityLike", "Target", "Weighting"]

Weighting = Literal["precision", "inverse", "none"]

# Least standard error under "inverse", and the largest weight, as in the released code.
_LEAST_ERROR = 1e-3
_LARGEST_WEIGHT = 1e6
# Share of all weight that the heaviest hundredth of the data may have.
_HEAVY = 0.2


class DensityLike(Protocol):
    """The log-density of training data with an error bar, such as a :class:`pvae.density.DensityTarget`.

    Attributes:
        log_density: In nats, shape ``(N,)``; row i is training datum i.
        standard_error: Its standard error in nats, shape ``(N,)``.
        embedding: What it is the density of, shape ``(N, d)``; or ``None``. A flow needs it.
    """

    log_density: Tensor
    standard_error: Tensor
    embedding: Any


class Target(nn.Module):
    r"""Direct alignment: the target is the log-density itself, with weight :math:`1 / \sigma_i^2`.

    Args:
        density: The log-density of the training data.
        weight: ``"precision"``: :math:`w = 1 / (\sigma^2 + \tau^2)`; ``"inverse"``, as in the released code:
            :math:`1 / \max(\sigma, 0.001)` with :math:`\sigma^2 + \tau^2` in the place of
            :math:`\sigma^2`; ``"none"``: 1.
        floor: :math:`\tau`, in nats, not negative: an error that the estimate's own does not know of.
        clip: Quantile of the weights, in (0, 1), above which they are cut off; ``None`` for none.
        normalize: Whether weights are divided by their mean.

    Attributes:
        log_density: Shape ``(N,)``, nats.
        weight: Shape ``(N,)``.

    Raises:
        TypeError: If ``density`` is no log-density with an error.
        ValueError: If it is not finite, the error is not positive where it is needed, or a setting is out of
            range.
    """

    log_density: Tensor
    weight: Tensor

    def __init__(
        self,
        density: DensityLike,
        weight: Weighting = "precision",
        floor: float = 0.0,
        clip: float | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if weight not in ("precision", "inverse", "none"):
            raise ValueError(f"weight must be 'precision', 'inverse' or 'none', got {weight!r}")
        if not 0 <= floor < float("inf"):
            raise ValueError(f"floor must be finite and not negative, got {floor}")
        if clip is not None and not 0 < clip < 1:
            raise ValueError(f"clip must be a quantile between 0 and 1, got {clip}")
        rho, sigma = _checked(density)
        weights = _weights(sigma, weight, floor)
        if not weights.isfinite().all():
            raise ValueError(
                f"standard_error must be positive for weight={weight!r} without a floor, got "
                f"{float(sigma.min()):g}"
            )
        if clip is not None:
            weights = weights.clamp(max=float(_quantile(weights, clip)))
        if normalize:
            weights = weights / weights.mean()
        # In the dtype of the programs later; by then sums over all data have been made in double precision.
        self.register_buffer("log_density", rho, persistent=False)
        self.register_buffer("weight", weights, persistent=False)

    def __len__(self) -> int:
        return len(self.log_density)

    def forward(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return targets in nats and weights, each ``(B,)``, of the data at ``rows`` (of all if ``None``)."""
        if rows is None:
            return self.log_density, self.weight
        return self.log_density.index_select(0, rows), self.weight.index_select(0, rows)

    def step(self, prior: Any, rows: Tensor, first: bool) -> None:
        """Take a training step of the target's own; a direct target has none."""

    def log_det_at(self, u: Tensor) -> Tensor:
        """Return what targets would be below the log-density by at embeddings ``(M, d)``: zeros ``(M,)``."""
        return self.log_density.new_zeros(len(u))

    @property
    def own_training(self) -> bool:
        """Whether :meth:`step` does anything."""
        return False

    @property
    def heavy_share(self) -> float:
        """Share of all weight that the heaviest hundredth of the data has."""
        weights = self.weight.double().sort(descending=True).values
        return float(weights[: max(1, len(weights) // 100)].sum() / weights.sum())

    @property
    def is_heavy(self) -> bool:
        """Whether the heaviest hundredth has so much weight that the others hardly count."""
        return len(self) >= 100 and self.heavy_share > _HEAVY

    def digest(self) -> bytes:
        """SHA-256 of log-density and weights."""
        digest = hashlib.sha256()
        for tensor in (self.log_density, self.weight):
            digest.update(tensor.detach().double().cpu().numpy().astype("<f8").tobytes())
        return digest.digest()

    def training_state(self) -> dict[str, Tensor]:
        """What the next :meth:`step` depends on."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`training_state` returned."""


def _checked(density: Any) -> tuple[Tensor, Tensor]:
    """Log-density and standard error, in double precision on the CPU."""
    columns = []
    for name in ("log_density", "standard_error"):
        column = getattr(density, name, None)
        if column is None:
            raise TypeError(
                f"target must have log_density and standard_error, as a DensityTarget has, got "
                f"{type(density).__name__}"
            )
        column = torch.as_tensor(column).detach().double().cpu()
        if column.ndim != 1 or len(column) < 1:
            raise ValueError(f"{name} must have shape (N,), got {tuple(column.shape)}")
        if not column.isfinite().all():
            raise ValueError(
                f"{name} must be finite, got {int((~column.isfinite()).sum())} values that are not"
            )
        columns.append(column)
    rho, sigma = columns
    if len(rho) != len(sigma):
        raise ValueError(f"standard_error must have the {len(rho)} rows of log_density, got {len(sigma)}")
    if (sigma < 0).any():
        raise ValueError(f"standard_error must not be negative, got {float(sigma.min()):g}")
    return rho, sigma


def _weights(sigma: Tensor, weight: Weighting, floor: float) -> Tensor:
    if weight == "none":
        return torch.ones_like(sigma)
    total = sigma.square() + floor**2
    if weight == "precision":
        return 1 / total
    return (1 / total.sqrt().clamp(min=_LEAST_ERROR)).clamp(max=_LARGEST_WEIGHT)


def _quantile(values: Tensor, share: float) -> Tensor:
    """Quantile without the size limit of ``torch.quantile``."""
    return values.sort().values[round(share * (len(values) - 1))]
