# ruff: noqa: RUF001  (mathematical symbols)
"""The table ``[align]`` in symbols: what it adds to the objective, and towards what (DiVAE)."""

import math
from typing import Any

from pvae.alignment.align import PRESETS
from pvae.data import Data

from .program import Program
from .spec import AlignKeys

__all__ = ["explain_alignment"]

_PROJECTIONS = {"pca": "leading principal components", "random": "random directions"}


def explain_alignment(
    keys: AlignKeys, z_dim: int, data: Data | None, program: Program | None = None
) -> list[str]:
    """Write the training-only factor, then its symbols, a line each.

    Args:
        keys: The table.
        z_dim: Number of latents.
        data: The data, for sizes; ``None`` if they cannot be had.
        program: The program, for the prior; ``None`` if there is none.
    """
    if not keys.gamma and not keys.warmup:
        return ["none, as γ = 0"]
    chosen = PRESETS[keys.preset] | {key: v for key, v in keys.of_align().items() if v is not None}
    offset = _offset(chosen["offset"], keys.kind, program)
    loss = f"w h(s − {'(t − c)' if offset else 't'})"
    if chosen["reduction"] == "rms":
        loss = f"√(batch mean of {loss})"
    return [
        f"− γ {loss}  at the factor z_align, added in training alone: no score has it",
        f"h(r) = ½ r², linear beyond |r| = {keys.delta:g}",
        _compared(keys, chosen["estimator"]),
        *_target(keys, z_dim, data),
        *([offset] if offset else []),
        _weight(keys, chosen),
        _warmup(keys),
        *([f"no gradient of it reaches the {keys.detach}"] if keys.detach else []),
    ]


def _compared(keys: AlignKeys, estimator: str) -> str:
    draws = f"{keys.num_samples} fresh draw{'s' if keys.num_samples > 1 else ''}"
    return {
        "sample": "s = log p(z) at the draw of z that is decoded",
        "mean": f"s = E_q log p(z), in closed form for two normals, else by {draws}",
        "multi": f"s = E_q log p(z), by {draws}",
    }[estimator]


def _target(keys: AlignKeys, z_dim: int, data: Data | None) -> list[str]:
    """Say what the target is, by which density, of which embedding."""
    space, dim = _embedding(keys, data)
    if keys.estimator == "exact":
        density = f"ρ ± σ: the known log-density of u, {space}"
    else:
        density = f"ρ ± σ: the log-density of u by {keys.estimator}, u {space}"
    if keys.estimator in ("pak", "kstar"):
        power = "its intrinsic dimension by TWO-NN" if keys.unit == "twonn" else "its width"
        density += f", per length to the power of {power}"
    if keys.kind == "direct":
        return ["t = ρ", density]
    units = ", the units of u left out" if keys.preset == "released" else ""
    first = f", {keys.pretrain_steps} before the first" if keys.pretrain_steps else ""
    return [
        f"t = ρ − log |det ∂g/∂u|{units}",
        density,
        f"g: ℝ{_power(dim)} → ℝ{_power(z_dim)}, {keys.flow_layers} affine couplings of width "
        f"{keys.flow_hidden}, maximises log p(z = g(u)) + log |det ∂g/∂u| by itself: "
        f"adam at {keys.flow_lr:g}, a step before each of the model{first}",
    ]


def _embedding(keys: AlignKeys, data: Data | None) -> tuple[str, int | None]:
    """Name what the density is that of, and its width if that is known."""
    width = None if data is None else math.prod(data.x_shape)
    if keys.estimator == "exact":
        if data is not None and data.log_density_intrinsic is not None:
            return "the coordinates of x in its plane", data.truth.project(data.train.x[:1].double()).numel()
        return "x itself", width
    if keys.projection == "identity" or (width is not None and keys.dim >= width):
        return "x itself", width
    return f"the {keys.dim} {_PROJECTIONS[keys.projection]} of x", keys.dim


def _offset(offset: Any, kind: str, program: Program | None) -> str:
    """Say what c is, as :func:`pvae.alignment.align` finds it; nothing where it is 0."""
    entropy = "mean ρ − E log p(z) under p(z), so that entropies match"
    if offset == "auto":
        if kind == "direct" and program is None:
            return f"c = {entropy}; 0 under a prior with parameters"
        offset = "none" if kind == "flow" or _is_learned(program) else "entropy"
    if offset == "none":
        return ""
    if offset == "learn":
        return f"c is learned, from {'0' if kind == 'flow' else entropy}"
    return f"c = {entropy}" if offset == "entropy" else f"c = {offset:g}"


def _is_learned(program: Program | None) -> bool:
    prior: Any = getattr(getattr(program, "model", None), "prior", None)
    return prior is not None and any(parameter.requires_grad for parameter in prior.parameters())


def _weight(keys: AlignKeys, chosen: dict[str, Any]) -> str:
    if chosen["weight"] == "none":
        return "w = 1"
    variance = f"σ² + {keys.floor:g}²" if keys.floor else "σ²"
    if chosen["weight"] == "precision":
        said = f"w = 1 / ({variance})" if keys.floor else f"w = 1 / {variance}"
    else:
        said = f"w = 1 / max({f'√({variance})' if keys.floor else 'σ'}, 0.001)"
    said += f", at most its {keys.clip:g} quantile" if keys.clip is not None else ""
    return said + (", divided by its mean" if chosen["normalize"] else "")


def _warmup(keys: AlignKeys) -> str:
    if not keys.warmup:
        return f"γ = {keys.gamma:g}"
    return f"γ from 0 to {keys.gamma:g} over the first {100 * keys.warmup:g} % of training"


def _power(number: int | None) -> str:
    return "ᵈ" if number is None else str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
