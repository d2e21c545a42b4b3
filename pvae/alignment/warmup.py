"""Warm-up of the weight of an alignment (DiVAE 2025, arXiv:2512.03928v1)."""

from dataclasses import dataclass

__all__ = ["LinearWarmup"]


@dataclass(frozen=True)
class LinearWarmup:
    r"""A weight that rises linearly from 0 and then stays.

    .. math:: \gamma_t = \gamma_{max} \min(1, t / (\mathrm{share} \cdot T))

    A pure function of the step, so that a resumed run needs no state of it. (The released code moves it by
    epochs.)

    Args:
        share: Share of the training over which it rises, in (0, 1].
        peak: Where it arrives, not negative.

    Raises:
        ValueError: If one is out of range.
    """

    share: float = 0.5
    peak: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")
        if not 0 <= self.peak < float("inf"):
            raise ValueError(f"peak must be finite and not negative, got {self.peak}")

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the weight of step ``step`` (from 0) of ``total_steps``."""
        return self.peak * min(1.0, step / (self.share * total_steps))
