"""Leading dimensions: networks see one batch dimension, callers may have any number."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_event", "check_size", "check_sizes", "flatten_leading"]


def check_size(name: str, size: int) -> int:
    """Return ``size``, refused unless it is a positive int.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is not positive.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be positive, got {size}")
    return size


def check_sizes(name: str, sizes: Sequence[int], length: int | None = None) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple of positive ints.

    Args:
        name: What the caller calls ``sizes``.
        sizes: Positive integers.
        length: How many there must be; any number if ``None``.

    Raises:
        TypeError: If ``sizes`` is no sequence of ints.
        ValueError: If a size is not positive, or their number is not ``length``.
    """
    is_sequence = isinstance(sizes, Sequence) and not isinstance(sizes, str)
    if not is_sequence or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        raise TypeError(f"{name} must be a sequence of ints, got {sizes!r}")
    if any(s < 1 for s in sizes):
        raise ValueError(f"{name} must hold positive sizes, got {tuple(sizes)}")
    if length is not None and len(sizes) != length:
        raise ValueError(f"{name} must have {length} entries, got {tuple(sizes)}")
    return tuple(sizes)


def check_event(name: str, x: Tensor, event_shape: tuple[int, ...]) -> None:
    """Refuse ``x`` unless its rightmost dimensions are ``event_shape`` (shapes only: no synchronisation).

    Raises:
        ValueError: If they are not.
    """
    if x.ndim < len(event_shape) or tuple(x.shape[x.ndim - len(event_shape) :]) != event_shape:
        wanted = ", ".join(["*batch", *map(str, event_shape)])
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(x.shape)}")


def flatten_leading(x: Tensor, event_dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """Merge all dimensions left of the last ``event_dim`` into one.

    Args:
        x: Shape ``(*batch, *event_shape)``; ``batch`` may be empty or hold zeros.
        event_dim: Number of dimensions of one datum.

    Returns:
        The tensor with shape ``(n, *event_shape)``, ``n`` the product of ``batch``, and ``batch``.
    """
    split = x.ndim - event_dim
    return x.reshape(-1, *x.shape[split:]), tuple(x.shape[:split])
