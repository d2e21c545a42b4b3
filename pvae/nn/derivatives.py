"""Which networks have a forward-mode derivative with a right gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from pvae.ops import push_forward

from .leading import check_sizes

__all__ = ["check_forward_mode"]

# Relative error above which two routes to one gradient disagree. Single precision costs about 1e-5; the
# silent errors of normalisation layers are 3 % and more.
_TOLERANCE = 1e-3


def check_forward_mode(
    name: str,
    module: nn.Module,
    f: Callable[[Tensor], Tensor] | None = None,
    x_shape: tuple[int, ...] = (),
    reverse: bool = True,
) -> None:
    r"""Refuse a network whose Jacobian-vector product cannot be trusted. For the doors, not for the loop.

    In PyTorch the gradient of a forward-mode derivative is silently wrong behind ``LayerNorm``,
    ``InstanceNorm`` and a training ``BatchNorm`` (which also makes every datum depend on its batch); those
    layers are refused by name, and so is dropout, under which :math:`f'` belongs to a mask. Any other layer
    is tried: the gradient of :math:`w^\top f'(x) v` with respect to the parameters, taken in reverse over
    forward mode, must equal the one in reverse over reverse mode on random input.

    Args:
        name: What the caller calls ``module``.
        module: The network.
        f: The function of ``x`` that is differentiated; ``None`` to go by the names of layers alone.
        x_shape: Shape of one ``x``.
        reverse: Whether gradients are taken of the product. Where it is only evaluated, ``LayerNorm`` and
            ``InstanceNorm`` are right.

    Raises:
        ValueError: If a layer is one of those named, has no such derivative, or the gradients differ.
    """
    for path, layer in module.named_modules():
        reason = _reason(layer, reverse)
        if reason is not None:
            raise ValueError(
                f"{name} must not hold {type(layer).__name__} (layer {path or 'itself'!r}): {reason}"
            )
    if f is not None:
        _try(name, module, f, check_sizes("x_shape", x_shape), reverse)


def _reason(layer: nn.Module, reverse: bool) -> str | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return "in training its derivative couples the data of a batch; use GroupNorm"
    if isinstance(layer, _DropoutNd):
        return "its derivative is that of a random mask"
    if reverse and isinstance(layer, nn.LayerNorm | _NormBase):
        return "PyTorch's gradient of its forward-mode derivative is silently wrong; use GroupNorm"
    if reverse and isinstance(layer, nn.GLU):
        return "PyTorch has no gradient of its forward-mode derivative; multiply by a sigmoid instead"
    return None


def _try(
    name: str, module: nn.Module, f: Callable[[Tensor], Tensor], x_shape: tuple[int, ...], reverse: bool
) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    like = next(module.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)

    def noise(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)

    x, v = noise((2, *x_shape)), noise((2, *x_shape))
    with torch.enable_grad():
        with _blaming(name, module):
            value, tangent = push_forward(f, x, v.unsqueeze(0))
            w = noise(value.shape)
            if not (reverse and parameters and tangent.requires_grad):
                return
            ours = torch.autograd.grad((w * tangent[0]).sum(), parameters, allow_unused=True)
        leaf = x.requires_grad_()
        (row,) = torch.autograd.grad((w * f(leaf)).sum(), leaf, create_graph=True)
        wanted = torch.autograd.grad((row * v).sum(), parameters, allow_unused=True)
    pairs = [
        (torch.zeros_like(p) if a is None else a, torch.zeros_like(p) if b is None else b)
        for a, b, p in zip(ours, wanted, parameters, strict=True)
    ]
    size = sum(float(b.double().square().sum()) for _, b in pairs) ** 0.5
    error = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
    if not error <= _TOLERANCE * size:
        raise ValueError(
            f"{name} must have a right gradient of its forward-mode derivative, but reverse over forward and "
            f"reverse over reverse mode differ by {error / max(size, 1e-300):.2g} of its size"
        )


@contextmanager
def _blaming(name: str, module: nn.Module) -> Iterator[None]:
    """Turn an error of autograd into a sentence that names the layer it came from."""
    entered: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        entered.pop()

    for path, layer in module.named_modules():

        def enter(*_: Any, path: str = path) -> None:
            entered.append(path)

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        where = f"layer {entered[-1]!r}" if entered else "one of its layers"
        raise ValueError(
            f"{name} must allow forward-mode derivatives, but {where} fails: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
