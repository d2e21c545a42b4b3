"""Are a distribution's derivatives those of its density? Jacobians, gradients, and another precision."""

import math
from typing import Any

import pyro
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform

from .report import ExactnessError
from .subject import Subject, relative_error

__all__ = [
    "check_float32",
    "check_log_determinant",
    "check_parameter_gradients",
    "check_value_gradient",
    "direction_of",
]

_GRADIENT = 1e-5
_FLOAT32 = 1e-4
_JACOBIAN = 1e-8
_INVERSE = 1e-6
_STEP = 1e-6


def check_log_determinant(s: Subject) -> str:
    """Compare each bijective transform's log-determinant with its Jacobian, and invert it."""
    inner: Any = s.d
    while not hasattr(inner, "transforms") and hasattr(inner, "base_dist"):
        inner = inner.base_dist
    transforms = list(getattr(inner, "transforms", []))
    if not any(transform.bijective for transform in transforms):
        return "- no bijective transforms"
    x = inner.base_dist.sample(torch.Size((3,)))
    largest = 0.0
    for index, transform in enumerate(transforms):
        # Copies, so that a transform that caches cannot answer from memory.
        y = transform(x).clone()
        if transform.bijective:
            name = f"transform {index} ({type(transform).__name__})"
            exact = torch.stack([_log_det_by_autograd(transform, point) for point in x])
            ours = transform.log_abs_det_jacobian(x.clone(), y)
            ours = sum_rightmost(ours, ours.ndim - exact.ndim).expand(exact.shape)
            at = (ours - exact).abs().argmax()
            error = relative_error(ours, exact)
            s.require(
                error < _JACOBIAN,
                f"{name} gives log |det J| = {ours.flatten()[at]:.6g}, autograd {exact.flatten()[at]:.6g}",
            )
            back = relative_error(transform.inv(y.clone()), x)
            s.require(back < _INVERSE, f"{name} is not undone by its inverse, which ends {back:.3g} away")
            largest = max(largest, error)
        x = y
    return f"{len(transforms)} transforms, largest error {largest:.1e}"


def _log_det_by_autograd(transform: Transform, x: Tensor) -> Tensor:
    """Log-determinant of each event's Jacobian at one point of shape ``(*batch, *event)``."""
    batch = x.shape[: x.ndim - transform.domain.event_dim]
    size, dim = math.prod(batch), math.prod(x.shape[len(batch) :])
    jacobian = torch.autograd.functional.jacobian(lambda value: transform(value.clone()), x)
    square = jacobian.reshape(size, dim, size, dim)
    return torch.stack([torch.linalg.slogdet(square[i, :, i])[1] for i in range(size)]).reshape(batch)


def check_value_gradient(s: Subject) -> str:
    """Compare the gradient of ``log_prob`` in the (unconstrained) value with central differences."""
    if s.discrete:
        return "- discrete values"
    u = s.u[:32]
    score = s.space.score(u)
    direction = torch.randn_like(u)
    step = _STEP * (1 + u.abs().amax(-1, keepdim=True))
    up, down = (s.space.log_prob(u + sign * step * direction) for sign in (1, -1))
    slope = (up - down) / (2 * step.squeeze(-1))
    ours = (score * direction).sum(-1)
    error = (ours - slope).abs() / (1 + slope.abs() + s.space.log_prob(u).abs())
    error = error.nan_to_num(nan=math.inf)
    at = error.argmax()
    s.require(
        error.max() < _GRADIENT,
        f"a directional derivative of log_prob is {ours.flatten()[at]:.6g}, central differences give "
        f"{slope.flatten()[at]:.6g}",
    )
    return f"largest relative error {error.max():.1e}"


def check_parameter_gradients(s: Subject) -> str:
    """Compare the gradient of ``log_prob`` in every floating tensor with central differences."""
    value = s.samples[:16]
    with torch.enable_grad(), pyro.validation_enabled(False):
        distribution, leaves = s.recipe.on_leaves()
        log_prob = distribution.log_prob(value)
        weight = torch.rand_like(log_prob)
        if not leaves:
            return "- no floating tensors"
        s.require(log_prob.requires_grad, f"log_prob is cut off from its {len(leaves)} tensors")
        gradients = torch.autograd.grad(
            (weight * log_prob).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    size = 1 + float((weight * log_prob).abs().sum())
    largest = 0.0
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = direction_of(leaf.detach())
        ours = float((gradient * direction).sum())
        step = _STEP * (1 + float(leaf.detach().abs().max()))
        with pyro.validation_enabled(False):
            up, down = (s.recipe.shifted(name, sign * step * direction).log_prob(value) for sign in (1, -1))
        slope = float((weight * (up - down)).sum()) / (2 * step)
        error = abs(ours - slope) / (size + abs(slope))
        s.require(
            error < _GRADIENT,
            f"a directional derivative of log_prob in {name} is {ours:.6g}, central differences give "
            f"{slope:.6g}",
        )
        largest = max(largest, error)
    return f"{len(leaves)} tensors, largest relative error {largest:.1e}"


def direction_of(leaf: Tensor) -> Tensor:
    """Draw a direction that keeps a triangular matrix triangular and a symmetric one symmetric."""
    direction = torch.randn_like(leaf)
    if leaf.ndim >= 2 and leaf.shape[-1] == leaf.shape[-2] > 1:
        if torch.equal(leaf, leaf.tril()):
            direction = direction.tril()
        if torch.equal(leaf, leaf.mT):
            direction = direction + direction.mT
    return direction


def check_float32(s: Subject) -> str:
    """Compare ``log_prob`` of a single-precision copy, at the same numbers, with double precision."""
    value = s.samples[:256]
    value = value.float() if value.is_floating_point() else value
    with pyro.validation_enabled(False):
        try:
            single = s.recipe.in_dtype(torch.float32)
            drawn, ours = single.sample(torch.Size((64,))), single.log_prob(value)
            own = single.log_prob(drawn)
        except RuntimeError as raised:
            said = str(raised).splitlines()[0]
            raise ExactnessError(s.name, s.check, f"a single-precision copy raises {said!r}") from raised
        exact = s.d.log_prob(value.double() if value.is_floating_point() else value)
    s.require(
        ours.dtype == torch.float32 and drawn.dtype == value.dtype,
        f"a single-precision copy must draw {value.dtype} and score in float32, got {drawn.dtype} and "
        f"{ours.dtype}",
    )
    s.require(own.isfinite().all(), "log_prob of a single-precision draw is not finite")
    error = relative_error(ours.double(), exact)
    at = (ours.double() - exact).abs().argmax()
    s.require(
        error < _FLOAT32,
        f"log_prob is {ours.flatten()[at]:.7g} in single precision and {exact.flatten()[at]:.7g} in double",
    )
    return f"largest relative difference {error:.1e}"
