"""The spec: TOML whose tables are the parts and whose keys are their constructors' arguments."""

import functools
import operator
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

import pvae.data
from pvae.data import Data
from pvae.files import unsealed_text
from pvae.inference import fit

from . import parts as _parts  # noqa: F401  (enters the parts)
from . import parts_ladder as _parts_ladder  # noqa: F401
from . import toml
from .allocation import Allowance, most_numbers
from .program import Program, SpecError, build
from .registry import PARTS, TABLES, Keys, Part, PartKeys, keys_of, nearest, none_word
from .sentences import sentence

__all__ = ["AlignKeys", "AutoencoderKeys", "Evaluate", "Spec", "load_spec", "parse", "recipes"]

_FIT_OMIT = ("model", "guide", "data", "device", "out", "resume", "callbacks", "progress")
_DATA_OMIT = ("root", "download")

Positive = Annotated[int, Field(gt=0, strict=True)]


class DataKeys(Keys):
    """The data set and its protocol: the arguments of :func:`pvae.data.load`.

    Keys beyond those are options of the one data set, which ``load`` checks.
    """

    model_config = ConfigDict(extra="allow")

    name: str

    def arguments(self) -> dict[str, Any]:
        """The keys as arguments of :func:`pvae.data.load`."""
        return super().arguments() | (self.model_extra or {})


class Evaluate(Keys):
    """How the trained program is judged.

    Attributes:
        split: Which part of the data.
        limit: At most so many data, ``"none"`` for all.
        num_particles: Importance samples for each datum.
        seed: Seed of the importance samples.
        proposal: What z is drawn from: ``"own"``: the guide. ``"laplace"``: Laplace's normal around the
            location of the guide's encoder (:func:`pvae.guides.laplace_proposal`). ``"both"``: one estimate
            for each. ``"auto"``: both for a guide whose covariance an encoder's Jacobian implies, which can
            be too narrow a proposal, else the guide.
        after_training: Whether ``pvae train`` ends with it.
    """

    split: Literal["train", "valid", "test"] = "test"
    limit: Annotated[Positive | None, BeforeValidator(none_word)] = None
    num_particles: Positive = 1000
    seed: Annotated[int, Field(strict=True)] = 0
    proposal: Literal["auto", "own", "laplace", "both"] = "auto"
    after_training: Annotated[bool, Field(strict=True)] = True


class AutoencoderKeys(Keys):
    """The first stage of an X-VAE: an autoencoder of the spec's encoder, decoder and likelihood.

    Attributes:
        epochs: Length of its training.
        batch_size: Data per step.
        lr: Learning rate.
        schedule: Schedule of the learning rate, ``"none"`` for a constant one.
        patience: Epochs without a better validation loss after which it stops, ``"none"`` for the full
            length.
        code_l2: Weight of the squared code in the loss, nats.
        noise: Standard deviation of noise on the code in training, in its own units.
    """

    epochs: Positive = 20
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0, strict=True)] = 1e-3
    schedule: Annotated[Literal["constant", "cosine", "linear"] | None, BeforeValidator(none_word)] = "cosine"
    patience: Annotated[Positive | None, BeforeValidator(none_word)] = None
    code_l2: Annotated[float, Field(ge=0, strict=True)] = 0.0
    noise: Annotated[float, Field(ge=0, strict=True)] = 0.0


class AlignKeys(Keys):
    """Alignment of log p(z) with a log-density of the training data (arXiv:2512.03928v1).

    Attributes:
        kind: ``"direct"`` or ``"flow"``, see :func:`pvae.alignment.align`.
        preset: ``"paper"`` or ``"released"`` for the paper's settings or those of its code where none are
            given, ``"none"`` for ours.
        estimator: Of the log-density: ``"pak"``, ``"kstar"``, ``"kde"`` (:mod:`pvae.density`), or ``"exact"``
            for synthetic data, whose density is known.
        projection: Of the data, before that: ``"pca"``, ``"random"`` or ``"identity"``.
        dim: Width of the projection.
        max_neighbors: Largest neighbourhood of ``"pak"`` and ``"kstar"``, ``"none"`` for theirs, 199.
        unit: Whether their densities are per volume of the intrinsic dimension, ``"twonn"``, or of ``dim``,
            ``"embedding"``.
        offset, weight, normalize, num_samples, delta, reduction, floor, clip, detach: Arguments of
            :func:`pvae.alignment.align`; ``"preset"`` (``"none"`` of ``normalize``) leaves one to the preset.
        average: Its argument ``estimator``: ``"sample"``, ``"mean"``, ``"multi"`` or ``"preset"``.
        gamma: Weight of the alignment.
        warmup: Share of the training over which the weight rises to it, 0 for none.
        flow_layers, flow_hidden: Couplings of the flow, and the width of their networks.
        flow_lr, pretrain_steps: How it is trained.
    """

    kind: Literal["direct", "flow"] = "direct"
    preset: Annotated[Literal["paper", "released"] | None, BeforeValidator(none_word)] = None
    estimator: Literal["pak", "kstar", "kde", "exact"] = "pak"
    projection: Literal["pca", "random", "identity"] = "pca"
    dim: Positive = 10
    max_neighbors: Annotated[Positive | None, BeforeValidator(none_word)] = None
    unit: Literal["twonn", "embedding"] = "twonn"
    offset: Literal["preset", "auto", "none", "entropy", "learn"] | Annotated[float, Field(strict=True)] = (
        "preset"
    )
    weight: Literal["preset", "precision", "inverse", "none"] = "preset"
    normalize: Annotated[bool | None, BeforeValidator(none_word)] = None
    average: Literal["preset", "sample", "mean", "multi"] = "preset"
    num_samples: Positive = 16
    delta: Annotated[float, Field(gt=0, strict=True)] = 1.0
    reduction: Literal["preset", "mean", "rms"] = "preset"
    gamma: Annotated[float, Field(ge=0, strict=True)] = 1.0
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5
    floor: Annotated[float, Field(ge=0, strict=True)] = 0.0
    clip: Annotated[float | None, BeforeValidator(none_word)] = None
    detach: Annotated[Literal["guide", "prior"] | None, BeforeValidator(none_word)] = None
    flow_layers: Positive = 8
    flow_hidden: Positive = 128
    flow_lr: Annotated[float, Field(gt=0, strict=True)] = 1e-3
    pretrain_steps: Annotated[int, Field(ge=0, strict=True)] = 0

    def of_align(self) -> dict[str, Any]:
        """The keys that are arguments of :func:`pvae.alignment.align` as they are."""
        chosen: dict[str, Any] = {"estimator": self.average}
        chosen |= {name: getattr(self, name) for name in ("offset", "weight", "reduction")}
        rest = ("preset", "normalize", "num_samples", "delta", "floor", "clip", "detach")
        arguments = {name: None if value == "preset" else value for name, value in chosen.items()}
        arguments |= {name: getattr(self, name) for name in rest}
        if self.kind == "flow":
            arguments |= {"flow_lr": self.flow_lr, "pretrain_steps": self.pretrain_steps}
        return arguments


class Spec(BaseModel):
    """A checked spec; :func:`load_spec` makes one.

    Attributes:
        description: What it is, in one line.
        z_dim: Number of latent dimensions, shared by prior, encoder and decoder.
        data: Table of the data set.
        model, prior, posterior, encoder, decoder, likelihood: Tables of the parts, with their ``kind``.
        pseudoinput: What stands above a ladder of latents; kind ``"none"`` of any other model.
        autoencoder: The first stage of a model that has one, ``None`` for any other.
        align: The alignment of log p(z) with a density of the data, ``None`` for none.
        fit: Arguments of :func:`pvae.fit`.
        evaluate: How the trained program is judged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    description: str = ""
    z_dim: Positive = 16
    data: DataKeys
    model: PartKeys
    prior: PartKeys
    posterior: PartKeys
    encoder: PartKeys
    decoder: PartKeys
    likelihood: PartKeys
    pseudoinput: PartKeys
    autoencoder: AutoencoderKeys | None = None
    align: Annotated[AlignKeys | None, BeforeValidator(none_word)] = None
    fit: Keys
    evaluate: Evaluate = Evaluate()

    @property
    def seed(self) -> int:
        """The one seed of a run: initialisation, order of the data, and noise."""
        return int(self.fit.arguments()["seed"])

    def parts(self) -> dict[str, tuple[Part, PartKeys]]:
        """Return every part's entry and keys, by table."""
        found: dict[str, PartKeys] = {table: getattr(self, table) for table in TABLES}
        return {table: (PARTS[table][keys.kind], keys) for table, keys in found.items()}

    def load_data(self, root: str | Path | None = None, download: bool = False) -> Data:
        """Load the data of the spec.

        Args:
            root: Folder of the files, the environment's ``PVAE_DATA`` if absent.
            download: Whether missing files may be fetched.

        Raises:
            pvae.data.DataError: If they are missing or damaged, or have no such protocol.
        """
        return pvae.data.load(**self.data.arguments(), root=root, download=download)

    def build(self, data: Data) -> Program:
        """Build the model and its guide for some data; global random state is left as it was.

        Raises:
            SpecError: If a part refuses its arguments, the likelihood the values of the data, or the networks
                hold more numbers than :func:`~pvae.experiments.allocation.most_numbers` allows.
        """
        parts = {table: keys for table, (_, keys) in self.parts().items()}
        try:
            with Allowance(most_numbers()):
                return build(parts, data, self.z_dim, self.seed)
        # What torch and NumPy raise for sizes that no memory has.
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise SpecError(f"the parts cannot be built: {toml.one_line(error)[:200]}") from error

    def to_toml(self) -> str:
        """Write the spec with every default filled in; :func:`parse` reads it back as it was."""
        top, tables = [], []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, PartKeys) and value.kind == "none" == TABLES[name]:
                continue  # as if it were not there
            if isinstance(value, Keys):
                keys = {key: getattr(value, key) for key in type(value).model_fields}
                keys |= value.model_extra or {}
                lines = (f"{key} = {toml.dumps(v)}" for key, v in keys.items())
                tables.append("\n".join([f"[{name}]", *lines]))
            elif value is not None:
                top.append(f"{name} = {toml.dumps(value)}")
        return "\n\n".join(["\n".join(top), *tables]) + "\n"

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON Schema of a spec file, with every part that is registered."""
        schema = _spec_type().model_json_schema()
        # "data" and "fit" may be left to overrides; a part's table and its kind have defaults.
        schema.pop("required")
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_null(schema)}


def recipes() -> dict[str, Path]:
    """Return the recipes that ship with the library, by name."""
    folder = Path(str(resources.files(__package__) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def load_spec(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec.

    Args:
        path_or_name: A recipe's name, a TOML file, or a run folder.
        overrides: ``key=value`` strings with TOML values, such as ``fit.epochs=5``; ``prior=vamp`` is short
            for ``prior.kind=vamp``. A new ``kind`` starts its table afresh.

    Raises:
        SpecError: If there is no such spec, or it cannot be read or checked.
    """
    path = _find(path_or_name)
    text = toml.read_text(path)
    try:
        text = unsealed_text(text)
    except ValueError as error:
        raise SpecError(
            f"{path} was changed or damaged after it was written, as {error}: put it back, or delete that "
            "line to keep the change"
        ) from None
    if Path(path_or_name).is_dir() and not toml.loads(text):
        raise SpecError(f"{path} is damaged: it is empty")
    return parse(text, overrides)


def parse(text: str, overrides: Iterable[str] = ()) -> Spec:
    """Check a spec given as TOML text; overrides and errors as in :func:`load_spec`."""
    raw = toml.loads(text)
    for override in overrides:
        _override(raw, override)
    toml.check(raw)
    for table in ("data", *TABLES, "fit"):
        raw.setdefault(table, {})
    for table, kind in TABLES.items():
        if isinstance(raw[table], dict):
            raw[table].setdefault("kind", kind)
    _set_first_stage(raw)
    spec_type = _spec_type()
    try:
        spec = spec_type.model_validate(raw)
    except ValidationError as error:
        raise SpecError(sentence(error, spec_type, raw)) from None
    if spec.data.name not in pvae.data.names():
        name = toml.shown(spec.data.name)
        raise SpecError(f"unknown data.name {name}{nearest(spec.data.name, pvae.data.names())}")
    for key in _DATA_OMIT:
        if key in (spec.data.model_extra or {}):
            option = key if key == "download" else "data-root"
            raise SpecError(f"data.{key} is no key: it is given beside the spec, as --{option}")
    settings = spec.fit.arguments()
    if (settings["epochs"] is None) == (settings["steps"] is None):
        raise SpecError("[fit] needs epochs or steps, one of the two")
    return spec


def _set_first_stage(raw: dict[str, Any]) -> None:
    """Give an X-VAE its first stage, with defaults, and refuse one for any other model."""
    kind = raw["model"].get("kind") if isinstance(raw["model"], dict) else None
    if kind == "x_vae":
        raw.setdefault("autoencoder", {})
    elif "autoencoder" in raw:
        raise SpecError(
            f"[autoencoder] is the first stage of model.kind = 'x_vae', but this model is '{kind}'"
        )


def _find(path_or_name: str | Path) -> Path:
    name, path, known = str(path_or_name), Path(path_or_name), recipes()
    if name in known:
        return known[name]
    try:
        if path.is_dir():
            return path / "spec.toml"
        there = path.suffix == ".toml" or path.exists()
    except OSError:  # a name that is too long, or a folder that may not be entered
        there = False
    if not there:
        raise SpecError(f"there is no recipe {toml.shown(name)}{nearest(name[:80], known)}")
    return path


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply one ``key=value`` to the tables as read."""
    left, equals, right = override.partition("=")
    names = left.strip().split(".")
    if not equals or not all(names) or len(names) > 2:
        raise SpecError(f"an override must read key=value, such as fit.epochs=5, got {toml.shown(override)}")
    value = _value(override, right.strip())
    if len(names) == 1 and (names[0] in TABLES or (names == ["align"] and value != "none")):
        names.append("kind")
    elif names == ["data"]:
        names.append("name")
    if len(names) == 1:
        tables[names[0]] = value
        return
    name, key = names
    table = tables.setdefault(name, {})
    if not isinstance(table, dict):
        raise SpecError(f"cannot set {toml.shown(f'{name}.{key}')}: {toml.shown(name)} is not a table")
    if key == "kind" and value != table.get("kind", TABLES.get(name)):
        table.clear()  # the other keys are arguments of the part that goes
        if name == "model":
            tables.pop("autoencoder", None)  # and so does its first stage
    if name == "fit" and key in ("epochs", "steps"):
        table.pop("steps" if key == "epochs" else "epochs", None)  # one of the two
    table[key] = value


def _value(override: str, text: str) -> Any:
    try:
        read = toml.loads(f"value = {text}")
    except SpecError:
        if re.fullmatch(r"[\w./+-]+", text):
            return text  # a bare word: shells take the quotes away
        raise SpecError(f"the value of an override must be TOML, got {toml.shown(override)}") from None
    if len(read) > 1:
        raise SpecError(f"an override sets one key, got {toml.shown(override)}")
    return read["value"]


def _spec_type() -> type[Spec]:
    return _narrowed(tuple((table, tuple(PARTS[table].values())) for table in TABLES))


@functools.lru_cache
def _narrowed(registered: tuple[tuple[str, tuple[Part, ...]], ...]) -> type[Spec]:
    """Narrow :class:`Spec` to the parts that are registered, and read other keys off the signatures."""
    data = create_model("Data", __base__=DataKeys, **keys_of(pvae.data.load, omit=_DATA_OMIT))
    # Parts of ours can be traced, to the values of the eager engine; any programs may be given to `fit`.
    training = create_model("Fit", __base__=Keys, **keys_of(fit, omit=_FIT_OMIT) | {"engine": (str, "auto")})
    fields: dict[str, Any] = {"data": (data, ...), "fit": (training, ...)}
    for table, entries in registered:
        union: Any = functools.reduce(operator.or_, (entry.keys for entry in entries))
        tagged = len(entries) > 1
        # A table that a spec need not have is left out of the keys of kept results, as any default is.
        default = PARTS[table]["none"].keys(kind="none") if TABLES[table] == "none" else ...
        fields[table] = (Annotated[union, Field(discriminator="kind")] if tagged else union, default)
    return create_model("Spec", __base__=Spec, **fields)


def _without_null(schema: Any) -> Any:
    """Exchange JSON's null, as a type and as a default, for the ``"none"`` that stands for it in TOML."""
    if schema is None:
        return "none"
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema == {"type": "null"}:
        return {"const": "none"}
    return {key: _without_null(value) for key, value in schema.items()}
