"""Tensor maths shared by every room; torch only, no host synchronisation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["has_float64", "log_mean_exp", "sample_categorical", "soft_clamp"]


def log_mean_exp(x: Tensor, dim: int | Sequence[int] = -1, keepdim: bool = False) -> Tensor:
    r"""Logarithm of the mean of exponentials.

    .. math:: \log \frac{1}{n} \sum_{i=1}^{n} e^{x_i}

    Args:
        x: Log-weights in nats, any shape; entries of ``-inf`` are weights of zero.
        dim: Dimension or dimensions averaged over; ``n`` is the product of their sizes.
        keepdim: Whether the averaged dimensions stay, with size 1.

    Returns:
        The log-mean in nats; ``-inf`` (never NaN) where every weight is zero.

    Raises:
        ValueError: If there is nothing to average over.
    """
    dims = [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    if count == 0:
        raise ValueError(f"x must have at least one entry along dim {dim}, got shape {tuple(x.shape)}")
    return torch.logsumexp(x, dims, keepdim=keepdim) - math.log(count)


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    r"""Squeeze the real line smoothly into ``(low, high)``.

    Inside, a few units away from both ends, this is the identity to within :math:`e^{-d}` (``d`` the
    distance to the nearer end); outside, unlike in a hard clamp, the gradient stays positive, so that a unit
    beyond an end can come back.

    Args:
        x: Any shape.
        low: Lower end; the infimum lies :math:`\log(1 + e^{low - high})` under it.
        high: Upper end, above ``low``.

    Returns:
        The squeezed values, shape of ``x``.
    """
    return high - F.softplus(high - low - F.softplus(x - low))


def sample_categorical(logits: Tensor, sample_shape: Sequence[int] = (), dim: int = -1) -> Tensor:
    """Draw indices with probabilities ``softmax(logits, dim)``, by the Gumbel-max identity.

    ``torch.multinomial`` checks its input on the host, which stalls a GPU; this does not.

    Args:
        logits: Unnormalised log-probabilities, any shape.
        sample_shape: Shape of independent draws, put in front.
        dim: Dimension of ``logits`` that holds the categories.

    Returns:
        ``int64`` indices, shape ``(*sample_shape, *logits.shape)`` without ``dim``.
    """
    dim = dim if dim < 0 else dim - logits.ndim
    shape = (*sample_shape, *logits.shape)
    # -log E is Gumbel distributed for E ~ Exponential(1).
    noise = torch.empty(shape, dtype=logits.dtype, device=logits.device).exponential_()
    return (logits.detach() - noise.log()).argmax(dim)


def has_float64(device: torch.device) -> bool:
    """Whether tensors of double precision exist on ``device`` (Apple's GPUs have none)."""
    return device.type != "mps"
