# ruff: noqa: RUF001  (mathematical symbols)
"""A spec in symbols: the joint density, the guide and the objective, with the size of every part."""

from typing import Any

from pvae.data import Data
from pvae.guides import TiedGuide
from pvae.nn import Encoder
from pvae.priors import VampPrior

from . import explain_ladder
from .explain_alignment import explain_alignment
from .notes import notes
from .program import Program
from .registry import TABLES
from .spec import Spec

__all__ = ["explain", "num_parameters", "objective"]

# Tables in the order in which a paper introduces them, each with the heading it stands under.
_ORDER = (
    ("model", "joint"),
    ("prior", "prior"),
    ("likelihood", "likelihood"),
    ("decoder", "decoder"),
    ("posterior", "guide"),
    ("pseudoinput", "u"),
    ("encoder", "encoder"),
)

# Posteriors whose covariance is implied by a Jacobian: the encoder gives their location alone.
_TIED = ("five", "laplace")

# What stands in place of the log-determinant's gradient, by logdet and probe.
_SURROGATES = {
    ("surrogate", "latent"): "uᵀ f′(x) SG[g′(f(x)) u]",
    ("surrogate", "data"): "SG[g′(f(x))ᵀ v]ᵀ f′(x) v",
    ("pinv", "latent"): "uᵀ f′(x) SG[f′(x)⁺ u]",
}
_PROBES = {
    "sphere": "u uniform on the sphere of radius √{z_dim}",
    "rademacher": "u of entries ±1",
    "gaussian": "u ~ N(0, I)",
}


def explain(spec: Spec, data: Data | None, program: Program | None = None) -> str:
    """Write a spec in symbols, one line for each part, from the parts' own descriptions.

    Args:
        spec: The spec.
        data: Its data, for shapes and range; ``None`` if they cannot be had.
        program: Its program, built here if absent.

    Raises:
        SpecError: If the program cannot be built.
    """
    symbols = _symbols(spec, data)
    source = spec.data.name if data is None else str(data.protocol)
    if data is not None:
        program = program or spec.build(data)
    rows = [("data", f"x ∈ {symbols['x']}   {source}"), *_latent(spec, symbols, program), ("", "")]
    given = _Labels(spec)
    for table, heading in _ORDER:
        if TABLES[table] == "none" == spec.parts()[table][1].kind:
            continue
        part, keys = spec.parts()[table]
        arguments = _words(keys.arguments())
        said, *where = given.written(part.symbols.format(**symbols, **arguments)).split("\n")
        if table == "encoder" and spec.posterior.kind in _TIED:
            said = said.replace("μ, σ:", "f:")
        if table == "prior":
            said = explain_ladder.words(spec, said)
        rest = {name: value for name, value in arguments.items() if f"{{{name}" not in part.symbols}
        if not arguments.get("label_dim"):
            rest.pop("label_embedding", None)
        rows += [(heading, said + _detail(rest)), *(("", line) for line in where)]
    rows += [
        ("", ""),
        *([("first stage", _first_stage(spec))] if spec.autoencoder else []),
        ("objective", given.written(objective(spec))),
        ("", _training(spec)),
        *((heading, given.written(line)) for heading, line in _loss(spec)),
        *([("cost", _cost(spec))] if spec.posterior.kind in _TIED else []),
        *((heading, given.written(line)) for heading, line in _alignment(spec, data, program)),
        *((heading, given.written(line)) for heading, line in _evaluation(spec)),
        *explain_ladder.judged(spec, program),
    ]
    if data is not None and program is not None:
        counts = ", ".join(f"{name} {count:,}" for name, count in num_parameters(program).items())
        rows += [("", ""), ("parameters", counts)]
        if spec.model.kind in explain_ladder.KINDS:
            rows += explain_ladder.cost(program, data)
        rows += [("note", note) for note in notes(spec, program, data)]
    title = [spec.description, ""] if spec.description else []
    return "\n".join([*title, *(f"{heading:<11} {line}".rstrip() for heading, line in rows)])


def objective(spec: Spec) -> str:
    """Write what is maximised."""
    settings = spec.fit.arguments()
    kind, k = settings["objective"], settings["num_particles"]
    beta = bool(settings["beta_warmup"])
    if kind in ("elbo", "mean_field") and spec.model.kind in explain_ladder.KINDS:
        return f"{explain_ladder.bound(spec)},  {_counted(k, 'draw')}"
    if kind in ("elbo", "mean_field") and spec.posterior.arguments().get("objective") == "fif":
        volume = "½ log det(2π σ² f′(x) f′(x)ᵀ)"
        latent = f"β (log p(z) + {volume})" if beta else f"log p(z) + {volume}"
        return f"maximise  log p(x | z) + {latent}  at z = f(x)"
    if kind in ("iwae", "dreg"):
        weight = "p(x | zₖ) (p(zₖ) / q(zₖ | x))^β" if beta else "p(x, zₖ) / q(zₖ | x)"
        bound = f"E log 1/{k} Σₖ {weight},  zₖ ~ q(z | x), k = 1 … {k}"
    elif kind == "mean_field":
        bound = f"E_q log p(x | z) − {'β ' if beta else ''}KL(q(z | x) ‖ p(z))"
    elif beta:
        bound = "E_q [log p(x | z) + β (log p(z) − log q(z | x))]"
    else:
        bound = "E_q [log p(x | z) + log p(z) − log q(z | x)]"
    if kind in ("elbo", "mean_field"):
        bound += f",  {k} draw{'s' if k > 1 else ''} of z"
    return f"maximise  {bound}"


def num_parameters(program: Program) -> dict[str, int]:
    """Count the trained numbers of each part, and of all."""
    counts: dict[str, int] = {}
    for module in program:
        for name, child in module.named_children():
            count = sum(p.numel() for p in child.parameters())
            counts[name] = counts.get(name, 0) + count
    total = {id(p): p.numel() for module in program for p in module.parameters()}
    idle = _untrained(program)
    if idle:
        counts["encoder"] -= idle
    return {**{name: count for name, count in counts.items() if count}, "in all": sum(total.values()) - idle}


def _untrained(program: Program) -> int:
    """Count the numbers of an encoder's head that give scales, where its location alone is used."""
    if not (isinstance(program.guide, TiedGuide) and isinstance(program.guide.encoder, Encoder)):
        return 0
    if isinstance(getattr(program.model, "prior", None), VampPrior):
        return 0  # it mixes encodings, scales included
    return sum(p[program.guide.z_dim :].numel() for p in program.guide.encoder.head.parameters())


class _Labels:
    """Writes a label beside what sees it."""

    def __init__(self, spec: Spec) -> None:
        conditional = spec.model.kind == "conditional"
        sees = {table: bool(keys.arguments().get("label_dim")) for table, (_, keys) in spec.parts().items()}
        pairs = []
        if conditional:
            pairs += [("log p(x)", "log p(x | y)"), ("p(x, zₖ)", "p(x, zₖ | y)")]
        if sees["decoder"]:
            pairs += [("p(x | z)", "p(x | z, y)"), ("p(x | zₖ)", "p(x | zₖ, y)")]
        if sees["prior"]:
            pairs += [("p(z)", "p(z | y)"), ("p(zₖ)", "p(zₖ | y)")]
        if sees["encoder"]:
            pairs += [("q(z | x)", "q(z | x, y)"), ("q(zₖ | x)", "q(zₖ | x, y)"), ("μ(x)", "μ(x, y)")]
            pairs += [("f(x)", "f(x, y)"), ("f′(x)", "f′(x, y)")]
            pairs += [("σ²(x)", "σ²(x, y)"), ("L(x)", "L(x, y)"), ("given x", "given x and y")]
        self._pairs = pairs

    def written(self, text: str) -> str:
        """Return ``text`` with the labels in it."""
        for plain, conditioned in self._pairs:
            text = text.replace(plain, conditioned)
        return text


def _latent(spec: Spec, symbols: dict[str, Any], program: Program | None) -> list[tuple[str, str]]:
    if spec.model.kind in explain_ladder.KINDS:
        return explain_ladder.latents(spec, program)
    return [("latent", f"z ∈ {symbols['z']}")]


def _first_stage(spec: Spec) -> str:
    """Write how the autoencoder is trained."""
    s = spec.autoencoder
    assert s is not None
    penalty = f" + {s.code_l2:g} ‖a(x)‖²" if s.code_l2 else ""
    lines = [f"minimise  −log p(x | z = a(x)){penalty},  {s.epochs} epochs at {s.lr:g}"]
    lines.append(f"batches of {s.batch_size}")
    if s.noise:
        lines.append(f"noise {s.noise:g} on a(x)")
    if s.patience:
        lines.append(f"stops {s.patience} epochs after the best on validation")
    return ", ".join(lines)


def _training(spec: Spec) -> str:
    s = spec.fit.arguments()
    length = f"{s['epochs']} epochs" if s["epochs"] is not None else f"{s['steps']:,} steps"
    lines = [f"{s['optimizer']} at {s['lr']:g}", f"batches of {s['batch_size']}", length]
    if s["schedule"]:
        lines.append(f"{s['schedule']} schedule")
    if s["objective"] == "dreg":
        lines.append("doubly reparameterised gradient")
    if s["beta_warmup"]:
        lines.append(f"β from 0 to 1 over {s['beta_warmup']:g} epochs")
    if s["free_bits"]:
        lines.append(f"KL below {s['free_bits']:g} nats free")
    if s["ema"]:
        lines.append(f"averaged weights ({s['ema']:g})")
    if s["patience"]:
        lines.append(f"stops {s['patience']} epochs after the best on validation")
    return ", ".join(lines)


def _loss(spec: Spec) -> list[tuple[str, str]]:
    """Say what FIVE's training loss is, in value and in gradient; nothing of other posteriors."""
    if spec.posterior.kind != "five":
        return []
    keys = spec.posterior.arguments()
    logdet, probe, fif = keys["logdet"], keys["probe"], keys["objective"] == "fif"
    if spec.fit.arguments()["objective"] in ("iwae", "dreg"):
        return [("loss", "minus this bound, with the exact log q by the full Jacobian in every step")]
    aim = "minus this, no bound on log p(x)" if fif else "minus this bound"
    if logdet == "exact":
        return [("loss", f"{aim}, log det by the full Jacobian in every step")]
    if logdet == "pinv":
        value = "with another value" if fif else "in value"
        said = f"{aim}, {value} and, without bias, in gradient"
    elif fif:
        said = f"a surrogate of {aim}: another value, a gradient off by about the posterior variance"
    else:
        said = f"a surrogate of {aim}: below it on average, its gradient off by about the posterior variance"
    drawn = "v ~ N(0, I), that of the draw"
    if probe == "latent":
        drawn = _PROBES[keys["directions"]].format(z_dim=spec.z_dim)
        drawn += f", {_counted(keys['num_probes'], 'probe')}"
    sign = "=" if logdet == "pinv" else "≈"
    stands = f"∂ ½ log det(f′ f′ᵀ) {sign} E ∂ {_SURROGATES[logdet, probe]},  {drawn},  SG held constant"
    return [("loss", f"{said}; validation is exact"), ("", stands)]


def _alignment(spec: Spec, data: Data | None, program: Program | None) -> list[tuple[str, str]]:
    """Say what the table ``[align]`` adds to the objective, if there is one."""
    if spec.align is None:
        return []
    lines = explain_alignment(spec.align, spec.z_dim, data, program)
    return [("" if i else "alignment", line) for i, line in enumerate(lines)]


def _cost(spec: Spec) -> str:
    """Say what a posterior implied by a Jacobian costs a training step, next to a diagonal one."""
    keys, draws = spec.posterior.arguments(), spec.fit.arguments()["num_particles"]
    beside = "more in each step than with posterior = 'normal'"
    if spec.posterior.kind == "laplace":
        return f"{spec.z_dim} tangents of the decoder {beside}"
    if keys["logdet"] != "surrogate":
        return f"{spec.z_dim} passes of the encoder {beside}"
    fif, on_data = keys["objective"] == "fif", keys["probe"] == "data"
    if on_data:
        tangents, decoder = 1 if fif else draws, _counted(1 if fif else draws, "cotangent")
    else:
        tangents = keys["num_probes"] + (0 if fif else draws)
        decoder = _counted(keys["num_probes"], "tangent")
    said = f"{_counted(tangents, 'tangent')} of the encoder and {decoder} of the decoder {beside}"
    if fif or tangents + on_data != 2:
        return said
    # Medians of interleaved steps on one CPU thread: 2.4 to 2.7 and 1.9 to 2.0 with fully connected networks,
    # 3.6 and 2.2 with convolutions.
    times = "2" if on_data else "3.5" if spec.encoder.kind == "conv" else "2.5"
    return f"{said}: about {times} × the time on a CPU"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _evaluation(spec: Spec) -> list[tuple[str, str]]:
    """Say what the likelihood is, and what z is drawn from where that is not the guide alone."""
    e = spec.evaluate
    which = f"{e.limit:,} of the {e.split} data" if e.limit else f"the {e.split} data"
    of = f"K = {e.num_particles:,} on {which}"
    proposal = e.proposal
    if proposal == "auto":
        proposal = "both" if spec.posterior.kind == "five" else "own"
    if proposal == "own":
        return [("judged by", f"log p(x) ≥ E log 1/K Σₖ p(x, zₖ) / q(zₖ | x),  {of}")]
    loc = "f(x)" if spec.posterior.kind in _TIED else "μ(x)"
    laplace = f"r = N({loc}, Σ),  Σ⁻¹ = diag τ⁻² + g′({loc})ᵀ g′({loc}) / σ²,  τ the prior's scale"
    said = f"r = q, and {laplace}: two bounds, the larger one counts" if proposal == "both" else laplace
    return [("judged by", f"log p(x) ≥ E log 1/K Σₖ p(x, zₖ) / r(zₖ | x),  {of}"), ("", said)]


def _symbols(spec: Spec, data: Data | None) -> dict[str, Any]:
    """The spaces of x and z, and the numbers that parts may name beside their keys."""
    z = f"ℝ{_superscript(spec.z_dim)}"
    shared = {"z": z, "z_dim": spec.z_dim, **explain_ladder.placed(spec)}
    if data is None:
        return {"x": "X", "levels": "L", **shared}
    space = {"binary": "{0, 1}", "unit": "[0, 1]", "count": "ℕ", "real": "ℝ"}[data.protocol.values]
    first, *more = data.x_shape
    power = f"^({'×'.join(map(str, data.x_shape))})" if more else _superscript(first)
    return {"x": space + power, "levels": data.protocol.levels, **shared}


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _words(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _joined(value) for name, value in arguments.items()}


def _joined(value: Any) -> Any:
    """Widths as 300-300, and planes with the number of their latents as 14:2-7:2."""
    if not isinstance(value, tuple):
        return value
    if any(isinstance(v, float) for v in value):
        return " to ".join(f"{v:g}" for v in value)
    return "-".join(":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)


def _detail(rest: dict[str, Any]) -> str:
    """The keys that the symbols leave out, but for switches that are off."""
    keys = ", ".join(f"{name} {value}" for name, value in rest.items() if value not in (None, False))
    return f"  ({keys})" if keys else ""
