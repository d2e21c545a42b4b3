r"""Pseudoinputs u = f(x) of a diffusion-based VampPrior (Kuzina & Tomczak 2024, arXiv:2412.01373v1).

The paper gives f as a discrete cosine transform; how it is scaled, the way back and the two alternatives are
those of the authors' code.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.ops import dct_matrix

from .leading import check_event, check_size, check_sizes

__all__ = ["DCTPseudoinput", "DownsampledPseudoinput", "LinearPseudoinput", "Pseudoinput"]

# Coefficients this near to a whole number are rounded to it before their floor is taken, so that no last bit
# of a sum decides about a scale.
_DECIMALS = 9


class Pseudoinput(nn.Module, ABC):
    r"""Base class of the deterministic maps between an image and a small one.

    ``forward`` is :math:`f`, the mean of :math:`r(u \mid x)`; ``context`` is the way back, to the low-pass
    image that the priors :math:`p(z_l \mid z_{>l}, u)` see.

    Args:
        x_shape: Shape ``(C, H, W)`` of one image.
        size: :math:`k`, the height and width of u.
        bounds: Range of x, which ``context`` is clipped to.

    Attributes:
        x_shape: Shape of one image.
        u_shape: ``(C, k, k)``.
        bounds: Range of x.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If ``x_shape`` does not hold three positive sizes, ``size`` is not positive or above the
            shorter side of the image, or ``bounds`` are not in order.
    """

    def __init__(self, x_shape: Sequence[int], size: int, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.x_shape = check_sizes("x_shape", x_shape, 3)
        channels, height, width = self.x_shape
        size = check_size("size", size)
        if size > min(height, width):
            raise ValueError(
                f"size must be at most {min(height, width)}, the shorter side of x_shape {self.x_shape}, "
                f"got {size}"
            )
        low, high = bounds
        if not low < high:
            raise ValueError(f"bounds must be in order, got {tuple(bounds)}")
        self.u_shape = (channels, size, size)
        self.bounds = (float(low), float(high))

    @abstractmethod
    def reduce(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, C, H, W)`` to ``(*batch, C, k, k)``, shapes unchecked."""

    @abstractmethod
    def restore(self, u: Tensor) -> Tensor:
        """Map ``u`` ``(*batch, C, k, k)`` to ``(*batch, C, H, W)``, shapes unchecked and nothing clipped."""

    def forward(self, x: Tensor) -> Tensor:
        r"""Return :math:`f(x)`, shape ``(*batch, C, k, k)``.

        Args:
            x: Images within ``bounds``, shape ``(*batch, C, H, W)``.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``.
        """
        check_event("x", x, self.x_shape)
        return self.reduce(x)

    def context(self, u: Tensor) -> Tensor:
        """Return the low-pass image of ``u``, within ``bounds``, shape ``(*batch, C, H, W)``.

        Args:
            u: Pseudoinputs, shape ``(*batch, C, k, k)``.

        Raises:
            ValueError: If the rightmost dimensions of ``u`` are not ``u_shape``.
        """
        check_event("u", u, self.u_shape)
        return self.restore(u).clamp(*self.bounds)


class DCTPseudoinput(Pseudoinput):
    r"""The lowest frequencies of an image, each in units of its own.

    .. math:: X = C_H \, x \, C_W^\top, \qquad f(x) = \mathrm{clamp}(X_{:k,:k} / S, -1, 1)

    per channel, for the orthonormal cosine transforms :math:`C` (:func:`pvae.ops.dct_matrix`). The way back
    multiplies by :math:`S`, puts zeros for the other coefficients and applies the inverse transforms. Without
    the clamp, there and back is an orthogonal projection. Nothing is centred: for images in [0, 1] the
    first coefficient of u lies in [0, 1].

    Args:
        x_shape: Shape ``(C, H, W)`` of one image.
        size: :math:`k`, the number of frequencies along each axis; at most the shorter side.
        scale: :math:`S`, shape ``(C, k, k)``; its type is that of the computation.
        bounds: Range of x, which ``context`` is clipped to.

    Attributes:
        scale: :math:`S`, all of this module that a checkpoint holds.

    Raises:
        TypeError: If a size is not an int.
        ValueError: As :class:`Pseudoinput`, or if ``scale`` has another shape or is not positive and finite.

    References:
        Kuzina & Tomczak (2024), arXiv:2412.01373v1.
    """

    scale: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        x_shape: Sequence[int],
        size: int,
        scale: Tensor,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(x_shape, size, bounds)
        if tuple(scale.shape) != self.u_shape:
            raise ValueError(f"scale must have shape {self.u_shape}, got {tuple(scale.shape)}")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            bad = scale[~(scale.isfinite() & (scale > 0))][0].item()
            raise ValueError(f"scale must be positive and finite, got {bad:g}")
        _, height, width = self.x_shape
        scale = scale.detach().clone()
        self.register_buffer("scale", scale)
        for name, side in (("rows", height), ("columns", width)):
            matrix = dct_matrix(side, scale.dtype)[:size].to(scale.device)
            self.register_buffer(name, matrix, persistent=False)

    @classmethod
    def from_data(
        cls,
        split: "_TrainingPart",
        size: int,
        *,
        grey: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 1000,
    ) -> Self:
        r"""Measure the scale on training data.

        .. math:: S = \max(1, \max_x |\lfloor X_{:k,:k} \rfloor|)

        a whole number for each coefficient and channel. A coefficient between :math:`S` and :math:`S + 1`
        passes for one of scale :math:`S`: of those of held-out MNIST about one in ten thousand is clipped.

        What is measured is what :math:`r(u \mid x)` will see. Where binarisation or dequantisation is drawn
        anew for each training batch, that is a draw and no fixed image: one draw of every datum is looked at,
        the one of the protocol's seed (``split.x``), so that two calls give the same scale and torch's
        generators are left alone; a later draw may be clipped where no value of the first one was. The
        authors' f sees grey images, whatever the likelihood is given; ``grey`` measures those.

        Args:
            split: The training part, such as ``data.train``: held-out data must not set the scale. Data are
                read ``batch_size`` at a time, on the CPU and in double precision, wherever they are.
            size: :math:`k`.
            grey: Whether to measure the data without the noise of their protocol (``split.clean``). Right
                only where f is given those too: grey values spread less than their binary draws, above all
                at high frequencies.
            bounds: Range of x, which ``context`` is clipped to.
            batch_size: Images per pass.

        Returns:
            A pseudoinput on the CPU, in torch's default type.

        Raises:
            TypeError: If ``split`` is no part of a data set.
            ValueError: If it is not the training part, its data are no images or lie outside ``bounds``,
                ``grey`` is asked of data without ``clean``, or a size is out of range.
        """
        if not isinstance(split, _TrainingPart):
            raise TypeError(
                f"split must be a part of a data set, such as data.train, got {type(split).__name__}"
            )
        if split.name != "train":
            raise ValueError(f"split must be the training part, got {split.name!r}")
        size, batch_size = check_size("size", size), check_size("batch_size", batch_size)
        x_shape = check_sizes("x_shape", split.x_shape, 3)
        measured = torch.ones(x_shape[0], size, size, dtype=torch.float64)
        found = cls(x_shape, size, measured, bounds)  # refuses its arguments before anything is read
        for start in range(0, len(split), batch_size):
            x = _images(split[start : start + batch_size], grey).to("cpu", torch.float64)
            if not bool(((x >= found.bounds[0]) & (x <= found.bounds[1])).all()):
                raise ValueError(
                    f"split must hold x within bounds {found.bounds}, got {x.min().item():g} ... "
                    f"{x.max().item():g}"
                )
            coefficients = found.coefficients(x).round(decimals=_DECIMALS)
            measured = torch.maximum(measured, coefficients.floor().abs().amax(0))
        return cls(x_shape, size, measured.to(torch.get_default_dtype()), bounds)

    def coefficients(self, x: Tensor) -> Tensor:
        """Return the lowest coefficients of ``x``, in its units, shape ``(*batch, C, k, k)``.

        Args:
            x: Images, shape ``(*batch, C, H, W)``.
        """
        return _both_sides(self.rows, x, self.columns)

    def share_clipped(self, x: Tensor) -> Tensor:
        """Share of the coefficients of ``x`` ``(*batch, C, H, W)`` that ``forward`` clips, shape ``()``.

        Raises:
            ValueError: If the rightmost dimensions of ``x`` are not ``x_shape``.
        """
        check_event("x", x, self.x_shape)
        return (self.coefficients(x).abs() > self.scale).to(self.scale.dtype).mean()

    def reduce(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, C, H, W)`` to scaled coefficients in [-1, 1], ``(*batch, C, k, k)``."""
        return (self.coefficients(x) / self.scale).clamp(-1.0, 1.0)

    def restore(self, u: Tensor) -> Tensor:
        """Map ``u`` ``(*batch, C, k, k)`` to images ``(*batch, C, H, W)``, nothing clipped."""
        return _both_sides(self.rows.mT, u * self.scale, self.columns.mT)


class DownsampledPseudoinput(Pseudoinput):
    r"""A smaller copy of an image, in the units of x.

    The way back is bilinear interpolation. All maps are kept as matrices, one for each axis: unlike the
    gradient of torch's interpolation, theirs is reproducible on a GPU.

    Args:
        x_shape: Shape ``(C, H, W)`` of one image.
        size: :math:`k`; at most the shorter side.
        mode: ``"average"``: each entry of u is the mean over its part of the image
            (``torch.nn.AdaptiveAvgPool2d``). ``"bilinear"``, the authors' choice: it is interpolated at the
            middle of that part, between four pixels, and most pixels are not looked at where the image is
            large.
        bounds: Range of x, which ``context`` is clipped to.

    Raises:
        TypeError: If a size is not an int.
        ValueError: As :class:`Pseudoinput`, or if ``mode`` is another word.
    """

    down_rows: Tensor
    down_columns: Tensor
    up_rows: Tensor
    up_columns: Tensor

    def __init__(
        self,
        x_shape: Sequence[int],
        size: int,
        mode: Literal["average", "bilinear"] = "average",
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(x_shape, size, bounds)
        if mode not in ("average", "bilinear"):
            raise ValueError(f"mode must be 'average' or 'bilinear', got {mode!r}")
        self.mode = mode
        reduce = _average if mode == "average" else _interpolate
        _, height, width = self.x_shape
        for axis, side in (("rows", height), ("columns", width)):
            self.register_buffer(f"down_{axis}", _matrix(reduce, side, size), persistent=False)
            self.register_buffer(f"up_{axis}", _matrix(_interpolate, size, side), persistent=False)

    def reduce(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, C, H, W)`` to ``(*batch, C, k, k)``."""
        return _both_sides(self.down_rows, x, self.down_columns)

    def restore(self, u: Tensor) -> Tensor:
        """Map ``u`` ``(*batch, C, k, k)`` to ``(*batch, C, H, W)``."""
        return _both_sides(self.up_rows, u, self.up_columns)


class LinearPseudoinput(Pseudoinput):
    r"""Learned linear maps of all pixels of all channels, there and back.

    .. math:: f(x) = A x + a, \qquad \mathrm{context}(u) = \mathrm{clamp}(B u + b)

    Training starts at :class:`DownsampledPseudoinput`: averages, and bilinear interpolation back. Nothing but
    the prior bounds u. The authors' code learns :math:`A` alone and interpolates back.

    Args:
        x_shape: Shape ``(C, H, W)`` of one image.
        size: :math:`k`; at most the shorter side.
        bounds: Range of x, which ``context`` is clipped to; a pixel outside it has no gradient.

    Raises:
        TypeError: If a size is not an int.
        ValueError: As :class:`Pseudoinput`.
    """

    def __init__(self, x_shape: Sequence[int], size: int, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(x_shape, size, bounds)
        start = DownsampledPseudoinput(self.x_shape, size, bounds=bounds)
        # Row by row, R X C^T has the entries of kron(R, C) vec(X).
        down = torch.kron(start.down_rows, start.down_columns)
        up = torch.kron(start.up_rows, start.up_columns)
        self.down = _affine(torch.kron(torch.eye(self.x_shape[0]), down))
        self.up = _affine(torch.kron(torch.eye(self.x_shape[0]), up))

    def reduce(self, x: Tensor) -> Tensor:
        """Map ``x`` ``(*batch, C, H, W)`` to ``(*batch, C, k, k)``."""
        return self.down(x.flatten(-3)).unflatten(-1, self.u_shape)

    def restore(self, u: Tensor) -> Tensor:
        """Map ``u`` ``(*batch, C, k, k)`` to ``(*batch, C, H, W)``."""
        return self.up(u.flatten(-3)).unflatten(-1, self.x_shape)


@runtime_checkable
class _TrainingPart(Protocol):
    """What :meth:`DCTPseudoinput.from_data` asks of a part of a data set (:class:`pvae.data.Split`)."""

    @property
    def name(self) -> str: ...

    @property
    def x_shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice) -> Any: ...


def _images(part: Any, grey: bool) -> Tensor:
    """The images of some data, ``(B, C, H, W)``."""
    if not grey:
        return part.x
    clean = getattr(part, "clean", None)
    if clean is None:
        raise ValueError(f"grey=True needs a split with clean data, got a {type(part).__name__} without")
    return clean


def _both_sides(a: Tensor, x: Tensor, b: Tensor) -> Tensor:
    r""":math:`A x B^\top` of every image ``(*batch, C, H, W)``."""
    return a @ x @ b.mT


def _average(x: Tensor, size: int) -> Tensor:
    return F.adaptive_avg_pool1d(x, size)


def _interpolate(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=size, mode="linear", align_corners=False)


def _matrix(resize: Callable[[Tensor, int], Tensor], old: int, new: int) -> Tensor:
    """The matrix ``(new, old)`` of a linear change of size, from its action on the unit vectors."""
    return resize(torch.eye(old).unsqueeze(0), new)[0].mT.contiguous()


def _affine(weight: Tensor) -> nn.Linear:
    """A layer with this weight ``(out, in)`` and no shift to begin with."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer
