r"""Alignment of log p(z) with a log-density of the data (DiVAE 2025, arXiv:2512.03928v1)."""

import inspect
import math
import warnings
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pvae.distributions import declared

from .aligner import Aligner, Estimator, Reduction, Warmup
from .expectation import Detach
from .feasibility import Feasibility, PriorFigures, feasibility, measure_prior, warn
from .flow_target import FlowTarget
from .programs import AlignedGuide, AlignedModel, prior_at
from .targets import DensityLike, Target, Weighting
from .warmup import LinearWarmup

__all__ = ["PRESETS", "Aligned", "align"]

Kind = Literal["direct", "flow"]
Preset = Literal["paper", "released"]
Offset = Literal["auto", "none", "entropy", "learn"] | float

#: What arguments of :func:`align` are that are not given, by ``preset``: of the paper's text and of the code
#: released with it, which differ.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "offset": "auto",
        "weight": "precision",
        "normalize": True,
        "estimator": "sample",
        "reduction": "mean",
    },
    "paper": {
        "offset": "none",
        "weight": "precision",
        "normalize": False,
        "estimator": "mean",
        "reduction": "mean",
    },
    "released": {
        "offset": "none",
        "weight": "inverse",
        "normalize": False,
        "estimator": "sample",
        "reduction": "rms",
    },
}


_FIRST_HALF = LinearWarmup(0.5)


class Aligned(NamedTuple):
    """A model and a guide that are aligned in training, to be used as a pair: ``pvae.fit(*aligned, data)``.

    Attributes:
        model: The model with the factor.
        guide: The guide that goes with it.
    """

    model: AlignedModel
    guide: AlignedGuide

    @property
    def bare(self) -> tuple[nn.Module, nn.Module]:
        """Model and guide as they came, which share their parameters with the aligned ones."""
        return self.model.bare, self.guide.bare

    @property
    def aligner(self) -> Aligner:
        """The alignment: its weight ``gamma``, its ``offset``, its ``target``."""
        return self.model.aligner

    @torch.no_grad()
    def targets(self) -> Tensor:
        """What log p(z) is aligned with at this moment, in nats, shape ``(N,)``."""
        return self.aligner.target(None)[0] - self.aligner.offset

    @torch.no_grad()
    def log_det(self) -> Tensor:
        """What the targets are below the log-density by, offset aside: a flow's log-determinant, or zeros.

        ``log p(z) + log_det`` is what estimates the log-density, in nats, shape ``(N,)``.
        """
        return self.aligner.target.log_density - self.aligner.target(None)[0]

    def log_det_at(self, u: Tensor) -> Tensor:
        """As :meth:`log_det`, at the embeddings ``u`` of any data, shape ``(M, d)``: nats, shape ``(M,)``."""
        return self.aligner.target.log_det_at(u)

    def report(self) -> Feasibility:
        """Compare the targets with the prior as both are now."""
        model, aligner = self.model.bare, self.aligner
        known = _known_prior(model, aligner.site, self.model.example)
        figures = None if known is None else measure_prior(known, _like(model).device)
        with torch.no_grad():
            targets, offset = aligner.target(None)[0], float(aligner.offset)
        settled = not aligner.target.own_training
        return feasibility(targets, offset, figures, aligner.target.heavy_share, settled)


def align(
    model: nn.Module,
    guide: nn.Module,
    target: DensityLike,
    *,
    site: str = "z",
    kind: Kind = "direct",
    preset: Preset | None = None,
    offset: Offset | None = None,
    weight: Weighting | None = None,
    normalize: bool | None = None,
    estimator: Estimator | None = None,
    num_samples: int = 16,
    delta: float = 1.0,
    reduction: Reduction | None = None,
    gamma: Warmup | float = _FIRST_HALF,
    floor: float = 0.0,
    clip: float | None = None,
    detach: Detach = None,
    flow: nn.Module | None = None,
    flow_lr: float = 1e-3,
    pretrain_steps: int = 0,
    example: tuple[Any, ...] | None = None,
) -> Aligned:
    r"""Add a training-only factor that ties the prior's log-density of a datum's code to the datum's own.

    .. math:: \text{loss}_i = -\mathrm{ELBO}_i + \gamma_t \, w_i \, h_\delta\!\left( s_i - (t_i - c) \right)

    with :math:`s_i` the prior's log-density of the latent, :math:`t_i` the target, :math:`c` a constant and
    :math:`h_\delta` Huber's loss (:class:`Aligner` says more). It is a ``pyro.factor`` in the plate over the
    data, beside the latent; in evaluation mode the programs are the bare ones.

    The two log-densities have different units (nats per volume of codes, of embedded data), dimensions and
    entropies. A prior with parameters can take up a constant between them, and then should. A fixed one has a
    ceiling, above which targets only crush the codes: :math:`c` then matches the entropies,

    .. math:: c = \tfrac1N \sum_i \rho_i - E_{p_Z} \log p_Z

    Under an importance-weighted objective of :mod:`pvae.inference` the term stands outside the logarithm, as
    it is no part of p(x, z). "dreg" takes ``estimator`` "mean" or "multi" alone. Pyro's ``RenyiELBO`` has it
    in its weights, where the same holds: "sample" would tilt them.

    ``pvae.fit`` tells the model of each batch. Elsewhere call :meth:`AlignedModel.on_step` before each step.

    Args:
        model: The model program, with a prior that has a density.
        guide: Its guide.
        target: Log-density of the training data with its standard error; row i is training datum i.
        site: The latent site, the first one of the model.
        kind: ``"direct"``: :math:`t = \rho`. ``"flow"``: less the log-determinant of a flow from the
            embedding to the latent space, trained on its own (:class:`FlowTarget`); it takes up units and
            entropy of any fixed prior, but also the scale of a prior with parameters.
        preset: What ``offset``, ``weight``, ``normalize``, ``estimator`` and ``reduction`` are where they are
            not given. ``None``: "auto", "precision", ``True``, "sample", "mean". ``"paper"``: "none",
            "precision", ``False``, "mean", "mean". ``"released"``: "none", "inverse", ``False``, "sample",
            "rms", and a flow that leaves the units of the embedding out; that code also warms up the KL.
        offset: The constant c: a number; ``"none"``, 0; ``"entropy"``, as above; ``"learn"``, trained from
            there; ``"auto"``, "entropy" for a fixed prior, else "none", as for a flow.
        weight: ``"precision"``, ``"inverse"`` or ``"none"``, see :class:`Target`.
        normalize: Whether weights are divided by their mean, so that gamma means the same for all targets.
        estimator: ``"sample"``, ``"mean"`` or ``"multi"``, see :class:`Aligner`.
        num_samples: Fresh draws for each datum, where there are any.
        delta: Where the loss becomes linear, in nats.
        reduction: ``"mean"`` or ``"rms"``, see :class:`Aligner`.
        gamma: The weight, a number, or a function of step and number of steps, such as
            :class:`LinearWarmup`. By default it rises from 0 to 1 over the first half of training.
        floor: Standard error added to all, in nats.
        clip: Quantile above which weights are cut off.
        detach: What gets no gradient, ``"guide"`` or ``"prior"``, for ablations.
        flow: The flow, with ``condition(None)``, such as a :class:`pvae.priors.CouplingFlow`.
        flow_lr: Its learning rate.
        pretrain_steps: Its steps before the first of the model's.
        example: What ``model`` can be called with, to find its prior where ``model.prior()`` does not give
            it: labels for a conditional one.

    Returns:
        The pair.

    Raises:
        TypeError: If a program is no ``nn.Module``, or ``target`` no log-density with an error.
        ValueError: For an unknown word, a setting out of range, or settings that do not go together; a prior
            that is flat, only bounded, or another one for each datum; an offset that needs a prior that is
            not known.

    Example:
        >>> aligned = align(model, guide, target)  # doctest: +SKIP
        >>> print(aligned.report())  # doctest: +SKIP
        >>> run = pvae.fit(*aligned, data, epochs=50)  # doctest: +SKIP
        >>> pvae.log_likelihood(*aligned.bare, data.test)  # doctest: +SKIP
    """
    for name, program in (("model", model), ("guide", guide)):
        if not isinstance(program, nn.Module):
            raise TypeError(f"{name} must be an nn.Module, got {type(program).__name__}")
        if isinstance(program, AlignedModel | AlignedGuide):
            raise ValueError(f"{name} must be a bare program, got one that is aligned already")
    if preset not in PRESETS:
        raise ValueError(f"preset must be 'paper', 'released' or None, got {preset!r}")
    given = {
        "offset": offset,
        "weight": weight,
        "normalize": normalize,
        "estimator": estimator,
        "reduction": reduction,
    }
    chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    settings = {"weight": chosen["weight"], "normalize": chosen["normalize"], "floor": floor, "clip": clip}
    if kind not in ("direct", "flow"):
        raise ValueError(f"kind must be 'direct' or 'flow', got {kind!r}")
    if kind == "direct" and (flow is not None or pretrain_steps):
        raise ValueError("flow and pretrain_steps belong to kind='flow', got kind='direct'")
    if getattr(getattr(model, "prior", None), "needs_code", False):
        raise ValueError("the prior must be one density for all data, got one around the code of each datum")
    provider = (
        Target(target, **settings)
        if kind == "direct"
        else FlowTarget(target, flow, flow_lr, pretrain_steps, preset != "released", **settings)
    )
    known = _known_prior(model, site, example)
    _check_prior(known, model, provider, pretrain_steps)
    like = _like(model)
    figures = None if known is None else measure_prior(known, like.device)
    way = _offset_way(chosen["offset"], kind, model, figures)
    rho = float(provider.log_density.double().mean())
    constant = 0.0 if way == "none" else way
    if way in ("entropy", "learn"):
        # Where the prior is not known, or the targets still move, learning starts from nothing.
        constant = rho - figures.mean if figures is not None and kind == "direct" else 0.0
    aligner = Aligner(
        provider,
        site=site,
        estimator=chosen["estimator"],
        num_samples=num_samples,
        delta=delta,
        reduction=chosen["reduction"],
        gamma=gamma,
        offset=float(constant),
        learn_offset=way == "learn",
        detach=detach,
    )
    settled = kind == "direct"
    found = feasibility(provider.log_density, float(constant), figures, provider.heavy_share, settled)
    warn(found, provider.is_heavy, matched=way in ("entropy", "learn"))
    if kind == "flow" and figures is not None and figures.learnable:
        warnings.warn(
            "a flow takes up the scale of a prior that has parameters, so that its log-density is free to "
            "drift: use kind='direct'",
            stacklevel=2,
        )
    aligner.to(device=like.device, dtype=like.dtype)
    return Aligned(AlignedModel(model, aligner, example), AlignedGuide(guide, aligner))


def _known_prior(model: nn.Module, site: str, example: tuple[Any, ...] | None) -> Any:
    """Return the prior if it can be called with what is there, else ``None``."""
    if example is not None:
        return prior_at(model, site, example)
    prior = getattr(model, "prior", None)
    if not callable(prior) or getattr(prior, "conditional", False):
        return None
    try:
        inspect.signature(getattr(prior, "forward", prior)).bind()
    except TypeError:
        return None
    return prior()


def _check_prior(p: Any, model: nn.Module, provider: Target, pretrain_steps: int) -> None:
    densities = ("training_density", "density")
    if p is not None and any(declared(p, name, "exact") != "exact" for name in densities):
        raise ValueError("the prior must have a density to be aligned, got one that is only bounded")
    if pretrain_steps and getattr(getattr(model, "prior", None), "conditional", False):
        raise ValueError("pretrain_steps must be 0 for a conditional prior, which needs a batch's labels")
    if p is not None and provider.own_training and isinstance(provider, FlowTarget):
        provider.check_size(p)


def _offset_way(offset: Any, kind: str, model: nn.Module, prior: PriorFigures | None) -> Any:
    """Return ``"none"``, ``"entropy"``, ``"learn"`` or a number."""
    if isinstance(offset, int | float) and not isinstance(offset, bool):
        if not math.isfinite(offset):
            raise ValueError(f"offset must be finite, got {offset}")
        return float(offset)
    if offset not in ("auto", "none", "entropy", "learn"):
        raise ValueError(f"offset must be 'auto', 'none', 'entropy', 'learn' or a number, got {offset!r}")
    if kind == "flow":
        if offset == "entropy":
            raise ValueError("offset='entropy' is for kind='direct': a flow matches the entropies by itself")
        return "none" if offset == "auto" else offset
    if offset in ("none", "learn"):
        return offset
    if prior is not None:
        return "none" if offset == "auto" and prior.learnable else "entropy"
    module = getattr(model, "prior", None)
    if (
        offset == "auto"
        and isinstance(module, nn.Module)
        and any(p.requires_grad for p in module.parameters())
    ):
        return "none"
    raise ValueError(
        f"offset={offset!r} needs the prior, which model.prior() does not give: give example, what the model "
        "can be called with, or another offset"
    )


def _like(model: nn.Module) -> Tensor:
    """A tensor with the device and the precision of a model."""
    tensors = chain(model.parameters(), model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
