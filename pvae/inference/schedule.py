"""Schedules: pure functions of the step, so that a resumed run needs no state of theirs."""

import math
from collections.abc import Callable

__all__ = ["Schedule", "schedule", "warm_up"]

Schedule = Callable[[int, int], float]
"""Maps ``(step, total_steps)`` to a factor of the learning rate."""

_WARM_UP_SHARE = 0.02


def constant(step: int, total: int) -> float:
    """Keep the learning rate."""
    return 1.0


def cosine(step: int, total: int) -> float:
    """Rise linearly over the first 2 % of the steps, then fall to zero along half a cosine."""
    rise = max(1, round(_WARM_UP_SHARE * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def linear(step: int, total: int) -> float:
    """Rise linearly over the first 2 % of the steps, then fall linearly to zero."""
    rise = max(1, round(_WARM_UP_SHARE * total))
    return (step + 1) / rise if step < rise else (total - step) / max(1, total - rise)


_NAMED: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear}


def schedule(choice: str | Schedule | None) -> Schedule:
    """Look up a schedule by name, or pass a function of ``(step, total_steps)`` through.

    Raises:
        ValueError: For an unknown name.
    """
    if choice is None:
        return constant
    if callable(choice):
        return choice
    if choice not in _NAMED:
        raise ValueError(f"schedule must be one of {', '.join(_NAMED)} or a function, got {choice!r}")
    return _NAMED[choice]


def warm_up(step: int, steps: float) -> float:
    """Rise linearly from 0 at the first step to 1 after ``steps`` steps."""
    return 1.0 if steps <= 0 else min(1.0, step / steps)
