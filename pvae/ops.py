"""Tensor maths shared by every room; torch only, no host synchronisation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "batch_mean",
    "batch_mean_gradients",
    "dct_matrix",
    "gram_tril",
    "has_float64",
    "inverse_tril",
    "jacobian_columns",
    "jacobian_rows",
    "log_mean_exp",
    "pull_back",
    "push_forward",
    "sample_categorical",
    "sharing_batches",
    "soft_clamp",
]

# Their annotations allow for a third result, and not for an output without a batch.
_jvp: Any = torch.func.jvp
_vjp: Any = torch.func.vjp
_vmap: Any = torch.vmap

# Rows of the batch, one for each datum and direction, in one pass of a network: bounds the memory of a
# Jacobian.
_PASS_ROWS = 2048

# How the processes that share batches average a tensor, innermost last; empty in a process alone.
_across: list[Callable[[Tensor], Tensor]] = []


@contextmanager
def sharing_batches(mean: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Say for a while that every process sees an equal share of each batch.

    Args:
        mean: Averages a tensor over the processes; all of them call it at the same places.
    """
    _across.append(mean)
    try:
        yield
    finally:
        _across.pop()


def batch_mean(statistic: Tensor) -> Tensor:
    """Return the mean of a statistic over a whole batch, where this process may see a share of it only.

    Whatever a training step makes of its batch as a whole, and not datum by datum, is made of such means: a
    step on several processes is then that of one process on their data together.

    Args:
        statistic: Mean over this process's share, any shape, without gradient.

    Returns:
        The same tensor outside :func:`sharing_batches`.
    """
    return _across[-1](statistic) if _across else statistic


def batch_mean_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients of a loss that is a mean over a share of a batch by those over all of it.

    Args:
        parameters: With ``.grad``, or without: all processes must agree in which have one.
    """
    if not _across:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        some = [g for g in gradients if g.dtype == dtype]
        # One message for all, always laid out in the same order: so sums are rounded alike in every run.
        flat = batch_mean(torch.cat([g.flatten() for g in some]))
        parts = flat.split([g.numel() for g in some])
        torch._foreach_copy_(some, [part.view_as(g) for part, g in zip(parts, some, strict=True)])


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


def dct_matrix(n: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""Matrix of the orthonormal discrete cosine transform of type II.

    .. math:: C_{ai} = c_a \cos\frac{\pi a (i + 1/2)}{n}, \qquad c_0 = \sqrt{1/n}, \; c_a = \sqrt{2/n}

    :math:`C v` are the coefficients of a vector, the mean's first, and :math:`C^\top` is the inverse;
    :math:`C X C^\top` are those of an image.

    Args:
        n: Length of the vectors.
        dtype: Type of the result, torch's default one if ``None``; computed in double precision.

    Returns:
        Shape ``(n, n)``, on the CPU.

    Raises:
        ValueError: If ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    index = torch.arange(n)
    # The angle in units of pi / (2 n), brought into one turn while it is a whole number: no digits are lost.
    angle = torch.outer(index, 2 * index + 1) % (4 * n)
    matrix = math.sqrt(2 / n) * torch.cos(angle.to(torch.float64) * (math.pi / (2 * n)))
    matrix[0] = math.sqrt(1 / n)
    return matrix.to(torch.get_default_dtype() if dtype is None else dtype)


def has_float64(device: torch.device) -> bool:
    """Whether tensors of double precision exist on ``device`` (Apple's GPUs have none)."""
    return device.type != "mps"


def push_forward(f: Callable[[Tensor], Tensor], x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value of ``f`` and its derivative along several directions :math:`f'(x) v`, by forward mode.

    One pass for the value serves all directions. Gradients reach what ``f`` closes over, through both
    results.

    Args:
        f: Treats the leading dimensions of ``x`` one by one, as networks do.
        x: Shape ``(*batch, *x_shape)``.
        tangents: Directions, shape ``(n, *batch, *x_shape)`` with ``n`` at least 1, in the type of ``x``.

    Returns:
        ``f(x)``, shape ``(*batch, *y_shape)``, and the derivatives, shape ``(n, *batch, *y_shape)``.
    """
    x = x.contiguous()  # a dual number cannot be made of an expanded tensor
    if len(tangents) == 1:
        value, image = _jvp(f, (x,), (tangents[0],))
        return value, image.unsqueeze(0)

    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return _jvp(f, (x,), (tangent,))

    value, images = _vmap(along, out_dims=(None, 0))(tangents)
    return value, images


def pull_back(f: Callable[[Tensor], Tensor], x: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value of ``f`` and its transposed derivative :math:`f'(x)^\top w` on several ``w``, by reverse mode.

    Args:
        f: As in :func:`push_forward`.
        x: Shape ``(*batch, *x_shape)``.
        cotangents: Shape ``(n, *batch, *y_shape)`` with ``n`` at least 1, in the type of ``f(x)``.

    Returns:
        ``f(x)``, shape ``(*batch, *y_shape)``, and the products, shape ``(n, *batch, *x_shape)``.
    """
    value, transposed = _vjp(f, x)
    if len(cotangents) == 1:
        return value, transposed(cotangents[0])[0].unsqueeze(0)
    return value, _vmap(transposed)(cotangents)[0]


def jacobian_rows(f: Callable[[Tensor], Tensor], x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Value and full Jacobian of a map to vectors, row by row in reverse mode.

    Rows are taken in chunks of at most 2048 data times directions, so that a Jacobian of 256 rows fits.

    Args:
        f: Maps ``(*batch, *x_shape)`` to ``(*batch, size)`` and treats leading dimensions one by one.
        x: Shape ``(*batch, *x_shape)``.
        size: Size of the vectors.

    Returns:
        ``f(x)`` and the Jacobian, shape ``(*batch, size, *x_shape)``.
    """
    value, transposed = _vjp(f, x)
    rows = _vmap(transposed)
    parts = [rows(part)[0] for part in _basis(value, size)]
    return value, torch.cat(parts).movedim(0, value.ndim - 1)


def jacobian_columns(g: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and full Jacobian of a map of vectors, column by column in forward mode, in chunks of rows.

    Args:
        g: Maps ``(*batch, size)`` to ``(*batch, *y_shape)`` and treats leading dimensions one by one.
        z: Shape ``(*batch, size)``.

    Returns:
        ``g(z)`` and the Jacobian, shape ``(*batch, *y_shape, size)``.
    """
    parts = [push_forward(g, z, part) for part in _basis(z, z.shape[-1])]
    return parts[0][0], torch.cat([columns for _, columns in parts]).movedim(0, -1)


def _basis(like: Tensor, size: int) -> tuple[Tensor, ...]:
    """Unit vectors for every row of ``like`` ``(*batch, size)``, shapes ``(n, *batch, size)``, in chunks."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    eye = eye.reshape(size, *(1,) * (like.ndim - 1), size).expand(size, *like.shape)
    return eye.split(max(1, _PASS_ROWS // max(1, like[..., 0].numel())))


def gram_tril(a: Tensor) -> Tensor:
    r"""Cholesky factor of :math:`A A^\top` without forming the product, whose condition number is squared.

    Args:
        a: Wide matrices of full row rank, shape ``(*batch, d, n)`` with ``n`` at least ``d``.

    Returns:
        Lower triangular :math:`L` with a positive diagonal and :math:`L L^\top = A A^\top`, shape
        ``(*batch, d, d)``; differentiable.
    """
    upper = torch.linalg.qr(a.mT, mode="reduced").R
    # Q R = (Q D) (D R) for a diagonal D of signs.
    diagonal = upper.detach().diagonal(dim1=-2, dim2=-1)
    sign = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    return upper.mT * sign.unsqueeze(-2)


def inverse_tril(precision: Tensor) -> Tensor:
    r"""Cholesky factor of an inverse.

    Args:
        precision: Positive definite :math:`H`, shape ``(*batch, d, d)``.

    Returns:
        Lower triangular :math:`L` with :math:`L L^\top = H^{-1}`; differentiable. NaN, never an error, where
        :math:`H` is not positive definite: to find that out would wait for a GPU.
    """
    # H turned by half a turn is M M^T, so that M turned, an upper triangle U, gives H = U U^T.
    lower, info = torch.linalg.cholesky_ex(precision.flip(-2, -1))
    upper = lower.flip(-2, -1).masked_fill((info > 0)[..., None, None], math.nan)
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True).mT
