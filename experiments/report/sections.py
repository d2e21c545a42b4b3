# ruff: noqa: RUF001  (mathematical symbols)
"""The sections of a page: what each shows of a run, and the command that fills what is missing."""

import base64
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..evidence import BUDGETS
from ..evidence_figures import Drawing, curves
from ..evidence_parts import PARTS
from ..runs import RunError
from . import blocks
from .blocks import Block, from_markdown, note, paragraph, table
from .view import RunView

__all__ = ["SECTIONS", "Section"]


class Section(NamedTuple):
    """One section of the page.

    Attributes:
        name: Its anchor.
        title: Its heading.
        lead: What it is about and how to read it.
        show: What it shows of a run; nothing where the run has nothing of the kind.
    """

    name: str
    title: str
    lead: str
    show: Callable[[RunView], list[Block]]


def _trained(run: RunView) -> list[Block]:
    """The spec in symbols, and as it is in the file."""
    rows: list[list[str]] = []
    for line in run.symbols.splitlines():
        heading, text = line[:11].strip(), line[12:].strip()
        if line == run.title or not line.strip():
            continue
        if heading or not rows:
            rows.append([heading, text])
        else:
            rows[-1][1] += f"\n{text}"
    found = [Block("terms", rows=rows)]
    if run.unsized:
        found.append(note(f"Without sizes, as the data could not be had: {run.unsized}."))
    toml = run.folder.spec.read_text(encoding="utf-8")
    return [*found, Block("code", "The resolved spec, spec.toml", [[toml]])]


def _protocol(run: RunView) -> list[Block]:
    """What the data were, and the hashes that say so."""
    data = run.manifest.get("data")
    if data is None:
        return [note("The run has not begun: its manifest is missing.")]
    sizes = ", ".join(f"{part} {size:,}" for part, size in data["sizes"].items())
    rows = [
        ("data set", data["name"]),
        ("shape of a datum", " × ".join(map(str, data["x_shape"]))),
        ("parts", sizes),
        ("split", data["split"]),
        (
            "values",
            data["values"] if data["levels"] is None else f"{data['values']}, {data['levels']} levels",
        ),
        ("binarisation", data["binarize"] or "none"),
        ("scale", data["scale"]),
        ("dequantised", "yes" if data["dequantize"] else "no"),
        ("seed of the data", str(data["seed"])),
        ("protocol", data["hash"]),
        ("SHA-256 of the data", data["sha256"]),
    ]
    if data.get("note"):
        rows.append(("note", data["note"]))
    state = next((record["parameters"] for record in run.records.values()), None)
    if state is not None:
        rows.append(("SHA-256 of the parameters", state))
    return [Block("terms", rows=rows)]


def _training(run: RunView) -> list[Block]:
    """How training went."""
    manifest = run.manifest
    if "steps" not in manifest:
        return [
            note(f"Training is {manifest.get('status', 'yet to begin')}."),
            *_command(run, "Go on with it:", f"pvae train {_path(run)} --resume"),
            *_curves(run),
        ]
    said = f"{manifest['steps']:,} steps in {_time(manifest['seconds'])}, {manifest['status']}."
    return [paragraph(said), *_curves(run)]


def _curves(run: RunView) -> list[Block]:
    rows = [row for row in run.metrics if row.get("loss") is not None]
    if not rows:
        return []
    last = rows[-1]
    drawings = []
    panels: tuple[tuple[str, dict[str, str], str], ...] = (
        ("loss", {"loss": "training", "valid_loss": "validation"}, "loss (minus the objective)"),
        ("reconstruction", {"reconstruction": "reconstruction"}, "reconstruction, −E log p(x | z)"),
        ("rate", {"kl": "rate"}, "rate, KL(q(z | x) ‖ p(z))"),
    )
    for name, keys, title in panels:
        there = {key: label for key, label in keys.items() if any(row.get(key) is not None for row in rows)}
        if not there:
            continue
        ends = ", ".join(
            f"{label} {last[key]:.2f}" for key, label in there.items() if last.get(key) is not None
        )
        drawings.append(
            Drawing(
                name,
                f"Curve of the {name} over {last['step']:,} steps, in nats per datum; at the end {ends}.",
                f"{title[0].upper()}{title[1:]}; at the end {ends} nats per datum.",
                partial(curves, rows, there, title, "nats per datum"),
            )
        )
    return blocks.figures(drawings, f"{run.prefix}-curves")


def _pictures(run: RunView) -> list[Block]:
    """Reconstructions and samples: as a diagnosis kept them, else as training drew them."""
    record = run.found("pictures")
    if record is not None:
        found = _drawn(run, "pictures", record)
        others = [name for name in _PICTURES if name not in ("reconstructions", "samples")]
        return [*found, *_files(run, [f"figures/{name}.png" for name in others])]
    files = _files(run, [f"figures/{name}.png" for name in _PICTURES])
    return files or _missing(run, "pictures")


def _codes(run: RunView) -> list[Block]:
    return _of_part(run, "codes", text=False)


def _likelihood(run: RunView) -> list[Block]:
    """The bounds, protocol by protocol, and what speaks for them."""
    found: list[Block] = []
    rows: dict[str, list[list[str]]] = {}
    for estimate in _estimates(run):
        rows.setdefault(_protocol_of(estimate), []).append(_bound(estimate))
    head = ("lower bound on log p(x)", "nats", "±\u00a0over data", "±\u00a0of draws", "k-hat high")
    for protocol, lines in rows.items():
        unique = list(dict.fromkeys(map(tuple, lines)))
        found.append(table(head, unique, protocol))
    if len(rows) > 1:
        found.append(
            note("Other data, or another part of them, have a table of their own: do not compare across.")
        )
    for name in ("likelihood", "annealing", "bidirectional"):
        record = run.found(name)
        if record is not None:
            found += [paragraph(text) for text in record["result"]["said"]]
    drawings = [
        drawing
        for name in ("likelihood", "annealing")
        if (record := run.found(name)) is not None
        for drawing in PARTS[name].drawings(record)
    ]
    found += blocks.figures(drawings, f"{run.prefix}-likelihood")
    absent = [name for name in ("likelihood", "annealing", "bidirectional") if name not in run.records]
    return [*found, *(_missing(run, *absent) if absent else [])]


def _estimates(run: RunView) -> list[Mapping[str, Any]]:
    """All estimates of log p(x) that the folder has."""
    found = list(run.evaluations)
    if (record := run.found("likelihood")) is not None:
        found += record["result"]["estimates"].values()
        found += [] if record["result"]["nested"] is None else [record["result"]["nested"]]
    if (record := run.found("annealing")) is not None:
        found += [record["result"]["direct"], record["result"]["annealed"]]
    return found


def _protocol_of(estimate: Mapping[str, Any]) -> str:
    protocol = estimate["protocol"] or {}
    given = ", given y" if estimate.get("conditional") else ""
    return (
        f"{protocol.get('name', 'data')} {protocol.get('part') or ''}, {protocol.get('subset') or 'all'}, "
        f"{estimate['num_data']} data{given}, protocol {protocol.get('hash', 'unknown')}"
    )


def _bound(estimate: Mapping[str, Any]) -> list[str]:
    """One bound as a row."""
    if "num_chains" in estimate:
        chains, steps = estimate["num_chains"], estimate["num_steps"]
        name = f"AIS, {chains} chains of {steps} steps from the {estimate['start']}"
    elif estimate.get("bound") == "nested":
        name = f"nested, IWAE-{estimate['num_particles']} given u, {estimate['num_draws']} draws of u"
    else:
        name = f"IWAE-{estimate['num_particles']}"
        if estimate.get("num_steps") is not None:
            name += f", T = {estimate['num_steps']} {'' if estimate['calibrated'] else 'un'}calibrated"
    if estimate.get("proposal"):
        name += f", proposal {estimate['proposal']}"
    share = estimate.get("khat_share")
    return [
        f"{name} (ELBO {estimate['elbo']:.2f})",
        f"{estimate['log_likelihood']:.2f}",
        _number(estimate.get("standard_error"), "{:.2f}"),
        _number(estimate.get("monte_carlo_error"), "{:.3f}"),
        "–" if share is None else f"{100 * share:.1f} %",
    ]


def _gaps(run: RunView) -> list[Block]:
    record = run.found("gaps")
    if record is None:
        return _missing(run, "gaps")
    found = record["result"]
    rows = [
        (words, *_interval(found["intervals"][name]))
        for name, words in _LOSSES.items()
        if name in found["intervals"]
    ]
    return [
        Block("strong", found["sentence"]),
        table(("nats per datum", "mean", "95 % interval"), rows, f"{found['num_data']} data"),
        *_drawn(run, "gaps", record),
        paragraph(
            f"ELBO {found['elbo']:.2f}, best in the family ({found['family_in_words']}) "
            f"{found['best_in_family']:.2f}, reference {found['reference']:.2f} ({found['reference_name']}). "
            "The amortisation gap is too small by what the optimisation leaves, the family gap by what the "
            "reference lacks."
        ),
    ]


_LOSSES = {
    "total": "ELBO to the reference",
    "amortisation": "amortisation gap",
    "family": "family gap",
    "full": "of the family gap a full covariance removes",
}


def _match(run: RunView) -> list[Block]:
    """Tests from draws, then what needs the prior's density."""
    found = _of_part(run, "match")
    for heading, text in _latent_sections(run):
        if heading in _WITH_DENSITY:
            found += [Block("heading", _WITH_DENSITY[heading]), *from_markdown(text)]
    return found


_WITH_DENSITY = {
    "prior against aggregate posterior": "moments, tests and the split of the rate",
    "coverage": "divergences, both ways",
}


def _calibration(run: RunView) -> list[Block]:
    heading = Block("heading", PARTS["aggregate"].heading)
    return [*_of_part(run, "calibration"), heading, *_of_part(run, "aggregate")]


def _predictive(run: RunView) -> list[Block]:
    return _of_part(run, "predictive")


def _layers(run: RunView) -> list[Block]:
    """Layer by layer, and the pseudoinput."""
    record = run.found("latents")
    tables = [
        (heading, text) for heading, text in _latent_sections(run) if heading in ("layers", "pseudoinput")
    ]
    if record is None or not tables:
        return []
    found = _drawn(run, "latents", record)
    for heading, text in tables:
        found += [Block("heading", heading), *from_markdown(text)]
    return found


def _density(run: RunView) -> list[Block]:
    record = run.found("latents")
    tables = [(heading, text) for heading, text in _latent_sections(run) if "against the density" in heading]
    if record is None or not tables:
        return []
    found: list[Block] = []
    for heading, text in tables:
        found += [Block("heading", heading), *from_markdown(text)]
    return [*found, *_files(run, [path for path in record["result"]["pictures"] if "density" in path])]


def _outside(run: RunView) -> list[Block]:
    """Every score of every set, then the scores of the latents with their differences of means."""
    found: list[Block] = []
    record = run.found("ood")
    if record is not None:
        for name, text in record["result"]["sections"]:
            found += [Block("heading", f"inside against {name}"), *from_markdown(text)]
        found += [note(text) for text in record["result"]["notes"]]
        found += _drawn(run, "ood", record)
    for heading, text in _latent_sections(run):
        if heading.startswith("inside against"):
            found += [Block("heading", f"scores of the latents, {heading}"), *from_markdown(text)]
    return found


def _quality(run: RunView) -> list[Block]:
    return _of_part(run, "quality")


def _left(run: RunView) -> list[Block]:
    """What does not apply, how parts are to be read, and what was not computed."""
    rows = [
        (part.heading, run.records[name]["left_out"])
        for name, part in PARTS.items()
        if "left_out" in run.records.get(name, {})
    ]
    if (latents := run.found("latents")) is not None:
        rows += latents["result"]["diagnosis"]["notes"].items()
    found = [Block("terms", rows=rows)] if rows else []
    absent = [name for name in PARTS if name not in run.records]
    if "ood" in absent:
        absent.remove("ood")
        found += _command(
            run, "Data from elsewhere were not named:", f"pvae diagnose {_path(run)} --ood NAME"
        )
    if absent:
        found += _missing(run, *absent)
    return found or [paragraph("Nothing.")]


def _versions(run: RunView) -> list[Block]:
    """What the numbers hang on beside the spec."""
    manifest = run.manifest
    if "versions" not in manifest:
        return [note("The run has not begun: its manifest is missing.")]
    git, device = manifest.get("git"), manifest["device"]
    commit = "unknown" if git is None else git["commit"] + (", with changes" if git["changed"] else "")
    rows = [
        ("begun", manifest["started"]),
        ("device", f"{device['type']}, {device['name']}, {manifest['threads']} thread(s)"),
        ("platform", manifest["platform"]),
        ("commit", commit),
        ("seed", str(manifest["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]
    for budget in BUDGETS.values():
        times = [
            f"{part.heading} {record['seconds']:.0f} s"
            for name, part in PARTS.items()
            if (record := run.found(name)) is not None and record["budget"] == budget.name
        ]
        if times:
            rows.append((f"diagnosis, {budget.name}", "; ".join(times)))
    return [Block("terms", rows=rows)]


SECTIONS: tuple[Section, ...] = (
    Section("trained", "What was trained", "The joint density, the guide and the objective.", _trained),
    Section(
        "data", "Data and protocol", "Numbers of different protocols are different quantities.", _protocol
    ),
    Section("training", "Training", "", _training),
    Section("pictures", "Reconstructions and samples", "", _pictures),
    Section("codes", "Codes", "Where the guide puts held-out data, and where the prior draws.", _codes),
    Section(
        "likelihood",
        "Likelihood and its evidence",
        "Every bound here is a lower bound on log p(x) in expectation: the largest mean counts. k-hat says "
        "where the importance weights have too heavy a tail, annealing (AIS) what a better posterior adds, "
        "bidirectional Monte Carlo (BDMC) what is missed at most on data that the model itself makes.",
        _likelihood,
    ),
    Section(
        "gaps", "Where the nats go", "What the encoder loses, and what the shape of its posteriors.", _gaps
    ),
    Section(
        "calibration",
        "Is the posterior calibrated?",
        "Ranks are uniform, and intervals hold as often as they say, where the guide is the model's "
        "posterior.",
        _calibration,
    ),
    Section(
        "match",
        "Prior against aggregate posterior",
        "Samples are good where the prior draws what the guide encodes; a guide that ignores the data "
        "matches too.",
        _match,
    ),
    Section(
        "predictive",
        "Predictive checks",
        "Statistics of held-out data among those of data that the model replicates.",
        _predictive,
    ),
    Section("layers", "Layers", "What each latent costs, and whether it is used.", _layers),
    Section("density", "log p(z) against a density of the data", "", _density),
    Section(
        "ood",
        "Data from elsewhere",
        "How well scores tell strange data; (!) marks more false alarms than chance explains.",
        _outside,
    ),
    Section(
        "quality",
        "Sample quality",
        "Distances mean nothing by themselves: read them beside those of training data, the floor.",
        _quality,
    ),
    Section("left", "What was left out, and why", "", _left),
    Section("versions", "Versions and device", "", _versions),
)
"""The sections in their order."""

# Pictures that training or `pvae sample` leaves behind, by file.
_PICTURES = {
    "reconstructions": "Data above their reconstructions, or points joined to theirs.",
    "samples": "Means of p(x | z) beside draws of x, z from the prior.",
    "labels": "A row of samples for each label.",
    "attributes": "A row of samples for each combination of attributes.",
    "given": "Rows of samples that share a pseudoinput.",
    "jacobian": "The encoder's Jacobian over training.",
    "alignment-density": "Targets and log p(z) before and after training.",
}
_CAPTIONS = _PICTURES | {
    "density": "log p(z) against the density, laws and datum by datum.",
}


def _of_part(run: RunView, name: str, text: bool = True) -> list[Block]:
    """What a part says and draws, or the command that computes it."""
    record = run.found(name)
    if record is None:
        return _missing(run, name)
    return [*(from_markdown(record["text"]) if text else []), *_drawn(run, name, record)]


def _drawn(run: RunView, name: str, record: Mapping[str, Any]) -> list[Block]:
    return blocks.figures(PARTS[name].drawings(record), f"{run.prefix}-{name}")


def _latent_sections(run: RunView) -> Sequence[Sequence[str]]:
    record = run.found("latents")
    return [] if record is None else record["result"]["sections"]


def _files(run: RunView, paths: Sequence[str]) -> list[Block]:
    """Pictures of the folder that are there.

    Raises:
        RunError: If one is damaged, or something else is in its place.
    """
    found = []
    for path in paths:
        file = run.folder.path / path
        if file.is_dir():
            raise RunError(f"{file} is a folder, where a picture must be: move it away")
        if file.is_file() and run.folder.path.resolve() in file.resolve().parents:
            caption = _CAPTIONS.get(file.stem, file.stem)
            content = file.read_bytes()
            if not _is_whole(content):
                raise RunError(
                    f"{file} is damaged: move it away, and pvae train {_path(run)} --resume, pvae sample or "
                    "pvae diagnose --fresh draws it again"
                )
            png = base64.b64encode(content).decode()
            found.append(blocks.image(f"{run.name}: {caption}", caption, png))
    return found


def _is_whole(png: bytes) -> bool:
    """Whether a picture has the chunks of a PNG, each with its checksum, up to the last one."""
    at = 8
    while png.startswith(b"\x89PNG\r\n\x1a\n") and at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4])
        if zlib.crc32(png[at + 4 : end]) != int.from_bytes(png[end : end + 4]):
            return False
        if png[at + 4 : at + 8] == b"IEND":
            return end + 4 == len(png)
        at = end + 4
    return False


def _missing(run: RunView, *names: str) -> list[Block]:
    """Say why parts are not there: left out with its reason, or yet to be computed by a command."""
    found = [
        note(f"Left out: {run.records[name]['left_out']}.")
        for name in names
        if "left_out" in run.records.get(name, {})
    ]
    absent = [name for name in names if name not in run.records]
    if absent:
        everything = len(absent) >= len(PARTS) - 1
        options = "" if everything else "".join(f" --only {name}" for name in absent)
        headings = "This run was not diagnosed:" if everything else "Not computed yet:"
        found += _command(run, headings, f"pvae diagnose {_path(run)}{options}")
    return found


def _command(run: RunView, why: str, command: str) -> list[Block]:
    return [note(why), Block("command", command)]


def _path(run: RunView) -> str:
    return shlex.quote(str(_relative(run.folder.path)))


def _relative(path: Path) -> Path:
    """A path as it is typed from here, where it lies below."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _interval(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["low"] is None:
        return f"{found['value']:.2f}", "–"
    return f"{found['value']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else how.format(value)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
