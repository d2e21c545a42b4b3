# ruff: noqa: RUF001  (mathematical symbols)
"""What ``pvae explain`` says of models with several latents: ladders, and two levels."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pvae.data import Data
from pvae.inference.isolation import device_of, evaluating
from pvae.inference.program import SiteRecorder
from pvae.models import HVAE, Ladder
from pvae.priors import DiffusionPrior

from .program import Program
from .spec import Spec

__all__ = ["KINDS", "bound", "cost", "judged", "latents", "placed", "words"]

KINDS = ("ladder", "hvae")
"""Kinds of model with several latents."""

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def placed(spec: Spec) -> dict[str, str]:
    """What the parts' own descriptions leave to the presence of pseudoinputs."""
    if spec.pseudoinput.kind == "none":
        return {"over": "z", "and_u": "", "of_u": "", "r_of_u": ""}
    return {"over": "u", "and_u": ", u", "of_u": "p(u) ", "r_of_u": "r(u | x) "}


def words(spec: Spec, text: str) -> str:
    """Name what a prior is of, in a line that was written for one latent."""
    over = {"ladder": "u", "hvae": "z₂"}.get(spec.model.kind, "z")
    return text.replace("p(z)", f"p({over})").replace("N(z;", f"N({over};")


def latents(spec: Spec, program: Program | None) -> list[tuple[str, str]]:
    """Write the space of every latent, fine planes last."""
    if program is None:
        return [("latent", "z of several layers")]
    if isinstance(program.model, HVAE):
        z_1, z_2 = program.model.decoder.z_dims
        return [("latent", f"z₂ ∈ ℝ^{z_2},  z₁ ∈ ℝ^{z_1}")]
    assert isinstance(program.model, Ladder)
    ladder, rows = program.model.spec, []
    if program.model.pseudoinput is not None:
        rows.append(f"u ∈ ℝ^({_times(program.model.pseudoinput.u_shape)}),")
    planes: dict[tuple[int, ...], list[str]] = {}
    for name, shape in ladder.z_shapes.items():
        planes.setdefault(shape, []).append(name.replace("_", "").translate(_SUBSCRIPTS))
    for plane, names in planes.items():
        said = ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}"
        rows.append(f"{said} ∈ ℝ^({_times(plane)}),")
    return [("latent", f"{' '.join(rows).rstrip(',')}   {ladder.z_dim:,} numbers in z")]


def bound(spec: Spec) -> str:
    """Write what is maximised by a single-particle objective, layer by layer."""
    beta = "β " if spec.fit.arguments()["beta_warmup"] else ""
    if spec.model.kind == "hvae":
        layers = f"{beta}[KL(q(z₂ | x) ‖ p(z₂)) + KL(q(z₁ | x, z₂) ‖ p(z₁ | z₂))]"
        return f"maximise  E_q log p(x | z₁, z₂) − {layers}"
    has_u = spec.pseudoinput.kind != "none"
    given = "z₍>ₗ₎, u" if has_u else "z₍>ₗ₎"
    rate = f" − {beta}[log r(u | x) − log p(u)]" if has_u else ""
    return f"maximise  E_q log p(x | z){rate} − {beta}Σₗ KL(q(zₗ | {given}, x) ‖ p(zₗ | {given}))"


def judged(spec: Spec, program: Program | None) -> list[tuple[str, str]]:
    """Say what stands in for the density of u in training, and what in an importance weight."""
    if program is None or not isinstance(getattr(program.model, "prior", None), DiffusionPrior):
        return []
    prior: Any = program.model.prior
    over = placed(spec)["over"]
    return [
        ("", f"log p({over}) by its evidence bound in continuous time, at one random time for each datum"),
        (
            "",
            f"in weights by a path of T = {prior.num_steps} steps, its variances calibrated on training data",
        ),
    ]


def cost(program: Program, data: Data) -> list[tuple[str, str]]:
    """Count the multiplications of one forward pass of guide and model on one datum, and of one draw of u."""
    device, x = device_of(*program), data.train[:1].x
    x = x.to(device)

    def both() -> None:
        with SiteRecorder() as q:
            program.guide(x)
        with SiteRecorder({name: site.value for name, site in q.sites.items() if not site.is_factor}):
            program.model(x)

    prior = getattr(program.model, "prior", None)
    with evaluating(*program):
        if not isinstance(prior, DiffusionPrior):
            return [("cost", f"{_millions(both)} for one datum, guide and model, forward")]
        u = torch.zeros(1, *prior.u_shape, device=device)
        gamma = torch.zeros((), device=device)
        with prior.using("vlb"):
            step = _millions(both)
        passes = _millions(lambda: prior.denoiser(u, gamma))
    return [
        ("cost", f"{step} for one datum, guide and model, forward;"),
        ("", f"T = {prior.num_steps} passes of the denoiser, {passes} each, for one draw or one weight"),
    ]


def _millions(run: Callable[[], object]) -> str:
    with FlopCounterMode(display=False) as counter:
        run()
    # Two operations each, three digits.
    return f"{float(f'{counter.get_total_flops() / 2e6:.3g}'):,g} million multiplications"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
