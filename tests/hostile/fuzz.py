"""Fuzzers: each target takes a mutated input to a reader and checks that it is read or refused in one line.

The tests run a few hundred examples of each, always the same ones. Longer, with examples of the day::

    pytest tests/hostile -m fuzz --hypothesis-profile=long
    python -m tests.hostile.fuzz --minutes 10
"""

import argparse
import atexit
import io
import json
import math
import shutil
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pvae.data import CorruptData
from pvae.data._files import read_idx
from pvae.data._npz import Expected, read_npz
from pvae.density import DensityTarget
from pvae.density.target import _digest_of_content
from pvae.evaluation import LabelClassifier
from pvae.experiments import RunError, Spec, SpecError
from pvae.experiments.figures import read_metrics
from pvae.experiments.registry import PARTS
from pvae.experiments.runs import RunFolder
from pvae.experiments.spec import parse, recipes
from pvae.files import sealed
from pvae.inference import CheckpointError, load_parameters
from pvae.inference.checkpoint import load
from pvae.inference.program import program_state
from tests.inference.programs import LinearGuide, LinearModel

from .bombs import array_bytes, npy_of, safetensors_of, write_archive, write_checkpoint

__all__ = ["TARGETS", "Target", "prepare"]

_LONGEST = 1000  # characters of a message


class Target(NamedTuple):
    """What is fuzzed.

    Attributes:
        examples: Makes inputs.
        check: Takes one to its reader; raises where a promise is broken. Returns what came of it.
        examples_in_ci: How many the tests take.
    """

    examples: st.SearchStrategy[Any]
    check: Callable[[Any], str]
    examples_in_ci: int


def _one_line(error: Exception) -> str:
    text = str(error)
    assert text
    assert len(text.splitlines()) == 1, text
    assert len(text) <= _LONGEST, len(text)
    return type(error).__name__


@cache
def _place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


# What every format is mutated by.


@st.composite
def _bytes(draw: st.DrawFn, start: bytes) -> bytes:
    """A few changes of some bytes: other values, cuts, repeats, insertions."""
    content = bytearray(start)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["set", "set", "flip", "cut", "insert", "repeat", "large"])):
            case "set" if at < len(content):
                content[at] = draw(st.integers(0, 255))
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "large":
                size = draw(st.sampled_from([2, 4, 8]))
                value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
                content[at : at + size] = (value % 256**size).to_bytes(
                    size, draw(st.sampled_from(["big", "little"]))
                )
    return bytes(content)


_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "none", "__class__", "../x", "/etc/passwd", "os.system", "inf", "a\nb", "\x1b[2J", "x" * 2000]
    ),
)
_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**12, 10**400, 1e308, 1e-308, -0.0]),
    st.sampled_from([math.inf, -math.inf, math.nan]),
    st.integers(),
    st.floats(),
)
_SCALARS = st.one_of(st.booleans(), _NUMBERS, _TEXTS)
_VALUES = st.recursive(
    _SCALARS,
    lambda of: st.one_of(st.lists(of, max_size=4), st.dictionaries(_TEXTS, of, max_size=3)),
    max_leaves=8,
)
_JSON = st.one_of(st.none(), _VALUES)


def _mutated(draw: st.DrawFn, record: dict[str, Any], values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Change, drop and add some entries of a record."""
    changed = dict(record)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from(sorted(record) or ["a"]), _TEXTS))
        match draw(st.sampled_from(["set", "set", "drop"])):
            case "set":
                changed[key] = draw(values)
            case "drop":
                changed.pop(key, None)
    return changed


# Specs.


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return {name: tomllib.loads(path.read_text()) for name, path in recipes().items()}


@cache
def _keys() -> list[str]:
    found = {key for kinds in PARTS.values() for part in kinds.values() for key in part.keys.model_fields}
    found |= {
        key
        for tables in _tables().values()
        for table in tables.values()
        if isinstance(table, dict)
        for key in table
    }
    return sorted(found)


def _kinds() -> list[str]:
    return sorted({kind for kinds in PARTS.values() for kind in kinds})


def _toml(value: object) -> str:
    """Any value as TOML, also what specs never hold."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return (
            json.dumps(value).replace("\x7f", "\\u007f")
            if value.isascii()
            else json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, float):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan" if math.isnan(value) else repr(value))
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_toml(of)}' for key, of in value.items())}}}"
    return repr(value)


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "a").replace("-", "a").isalnum() else json.dumps(key)


def _document(tables: Mapping[str, Any]) -> str:
    top = [f"{_key(name)} = {_toml(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    rest = [
        "\n".join([f"[{_key(name)}]", *(f"{_key(key)} = {_toml(of)}" for key, of in table.items())])
        for name, table in tables.items()
        if isinstance(table, dict)
    ]
    return "\n".join([*top, *rest]) + "\n"


@st.composite
def _specs(draw: st.DrawFn) -> str:
    """A recipe with some of its tables, keys and values changed, or some of its characters."""
    tables = draw(st.sampled_from(sorted(_tables())).map(_tables().__getitem__))
    values = st.one_of(_VALUES, st.sampled_from(_kinds()))
    changed: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in tables.items()}
    for _ in range(draw(st.integers(0, 3))):
        table = draw(
            st.one_of(
                st.sampled_from(sorted(changed)), st.sampled_from([*PARTS, "evaluate", "align"]), _TEXTS
            )
        )
        key = draw(st.one_of(st.sampled_from(_keys()), _TEXTS))
        match draw(st.sampled_from(["key", "key", "key", "drop key", "table", "drop table"])):
            case "key":
                inside = changed.setdefault(table, {})
                if isinstance(inside, dict):
                    inside[key] = draw(values)
            case "drop key" if isinstance(changed.get(table), dict):
                changed[table].pop(key, None)
            case "table":
                changed[table] = draw(values)
            case "drop table":
                changed.pop(table, None)
    text = _document(changed)
    if draw(st.integers(0, 3)) == 0:
        return draw(_bytes(text.encode("utf-8", "surrogatepass"))).decode("utf-8", "replace")
    return text


def _check_spec(text: str) -> str:
    try:
        spec = parse(text)
    except SpecError as error:
        return _one_line(error)
    assert isinstance(spec, Spec)
    written = spec.to_toml()
    again = parse(written)
    assert again == spec
    assert again.to_toml() == written
    return "read"


@st.composite
def _overrides(draw: st.DrawFn) -> tuple[str, list[str]]:
    words = st.one_of(st.sampled_from([*PARTS, "fit", "data", "evaluate", "align", "z_dim"]), _TEXTS)
    found = []
    sound = [
        f"{name}.{key}={_toml(value)}"
        for tables in _tables().values()
        for name, table in tables.items()
        if isinstance(table, dict) and name in ("fit", "evaluate", "encoder")
        for key, value in table.items()
    ]
    found += draw(st.lists(st.sampled_from(sound), max_size=3))
    for _ in range(draw(st.integers(0, 2))):
        left = ".".join(draw(st.lists(st.one_of(words, st.sampled_from(_keys())), min_size=1, max_size=3)))
        value = draw(st.one_of(_VALUES.map(_toml), _TEXTS, st.sampled_from(_kinds())))
        found.append(f"{left}{draw(st.sampled_from(['=', '=', '=', ' = ', '', '==', chr(10)]))}{value}")
    return draw(st.sampled_from(sorted(_tables()))), found


def _check_overrides(example: tuple[str, list[str]]) -> str:
    name, overrides = example
    text = recipes()[name].read_text()
    try:
        spec = parse(text, overrides)
    except SpecError as error:
        return _one_line(error)
    assert parse(spec.to_toml()) == spec
    return "read"


# Checkpoints.


@cache
def _state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in program_state(LinearModel(), LinearGuide()).items()}


@st.composite
def _safetensors(draw: st.DrawFn) -> bytes:
    """A checkpoint's tensors: bytes of the file changed, or entries of its header."""
    content = save_tensors(_state())
    if draw(st.booleans()):
        return draw(_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw(st.sampled_from(sorted(header)))
    if isinstance(header[name], dict):
        header[name] = _mutated(draw, header[name], _JSON)
    return safetensors_of(_mutated(draw, header, _JSON) if draw(st.booleans()) else header, data)


def _check_tensors(content: bytes) -> str:
    out = _place() / "tensors"
    for path in (out / "checkpoints").glob("*"):
        path.unlink()
    write_checkpoint(out, content)
    return _check_loaded(out)


def _check_loaded(out: Path) -> str:
    torch.manual_seed(0)
    model, guide = LinearModel(), LinearGuide()
    try:
        load_parameters(out, model, guide, "last")
    except CheckpointError as error:
        assert all(torch.equal(t, _state()[name]) for name, t in program_state(model, guide).items())
        return _one_line(error)
    tensors, meta = load(out)
    assert isinstance(meta["step"], int)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    return "read"


@st.composite
def _pointers(draw: st.DrawFn) -> bytes:
    """A pointer: bytes changed, or entries, with a sum of its own that is right or not."""
    out = _place() / "pointers"
    write_checkpoint(out, save_tensors(_state()), rows=0, best=1.0, best_state=None, seed=0, names=["loss"])
    content = (out / "checkpoints" / "last.json").read_bytes()
    if draw(st.booleans()):
        return draw(_bytes(content))
    record = _mutated(draw, json.loads(content), _JSON)
    if draw(st.booleans()):
        record.pop("check", None)
        record = sealed(record)
    return json.dumps(record).encode()


def _check_pointer(content: bytes) -> str:
    (_place() / "pointers" / "checkpoints" / "last.json").write_bytes(content)
    return _check_loaded(_place() / "pointers")


# Records and rows.


@st.composite
def _records(draw: st.DrawFn) -> bytes:
    record = {"settings": {"split": "test", "limit": None, "seed": 0}, "text": "log p(x)", "mean": -1.0}
    manifest = {
        "status": "finished",
        "seconds": 1.0,
        "steps": 3,
        "data": {"hash": "ab", "sizes": {"train": 3}},
    }
    start: Any = draw(st.sampled_from([record, manifest]))
    changed = _mutated(draw, start, _JSON)
    changed = sealed(changed) if draw(st.booleans()) else changed
    content = json.dumps([changed] if start is record or draw(st.booleans()) else changed).encode()
    return draw(_bytes(content)) if draw(st.booleans()) else content


def _check_records(content: bytes) -> str:
    folder = RunFolder(_place())
    came = set()
    for path, read in (
        (folder.manifest, folder.read_manifest),
        (folder.evaluation, folder.read_evaluations),
        (folder.diagnosis, folder.read_diagnoses),
    ):
        path.write_bytes(content)
        try:
            found = read()
            assert isinstance(found, dict if path == folder.manifest else list)
            came.add("read")
        except RunError as error:
            came.add(_one_line(error))
    return "read" if "read" in came else "RunError"


@st.composite
def _rows(draw: st.DrawFn) -> bytes:
    lines = []
    for step in range(draw(st.integers(1, 5))):
        row = {"step": step, "epoch": step / 7, "loss": 2.5, "kl/z": 1.0, "lr": 1e-3}
        lines.append(json.dumps(_mutated(draw, row, _JSON) if draw(st.booleans()) else row))
    content = "\n".join(lines).encode()
    return draw(_bytes(content)) if draw(st.booleans()) else content


def _check_rows(content: bytes) -> str:
    path = _place() / "metrics.jsonl"
    path.write_bytes(content)
    rows = read_metrics(path)
    for row in rows:
        assert all(value is None or type(value) in (int, float) for value in row.values())
        assert all(
            math.isfinite(float(value)) or not math.isfinite(value)
            for value in row.values()
            if value is not None
        )
    return "read" if len(rows) >= len([line for line in content.split(b"\n") if line]) else "cut off"


# Files of data.

_IDX_SHAPE = (5, 4, 3)


def _idx() -> bytes:
    header = b"".join(number.to_bytes(4, "big") for number in (0x0800 + len(_IDX_SHAPE), *_IDX_SHAPE))
    return header + bytes(range(math.prod(_IDX_SHAPE)))


def _check_idx(content: bytes) -> str:
    path = _place() / "idx"
    path.write_bytes(content)
    try:
        read = read_idx("set", path, _IDX_SHAPE)
    except CorruptData as error:
        return _one_line(error)
    assert read.shape == _IDX_SHAPE
    assert read.dtype == torch.uint8
    return "read"


_EXPECTED = {
    "a": Expected("u", (5, 4), 0, 19),
    "b": Expected("i", (5,), 0, 9),
    "c": Expected("U", (3,)),
}


@cache
def _npz(packed: bool) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if packed else np.savez
    save(
        buffer,
        a=np.arange(20, dtype=np.uint8).reshape(5, 4),
        b=np.arange(5),
        c=np.array(["one", "two", "three"]),
    )
    return buffer.getvalue()


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    """The header of an array: its entries changed, or its characters."""
    entries: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (5, 4)}
    values = st.one_of(_JSON, st.sampled_from(["|O", "<f8", "<U3", "|V9", ">i8", "|S0", "<M8", "i4,O"]))
    values |= st.tuples(_NUMBERS, _NUMBERS)
    text = repr(_mutated(draw, entries, values))
    if draw(st.booleans()):
        text = draw(_bytes(text.encode())).decode("latin1")
    text = text.encode("latin1", "replace").decode("latin1")[:60_000]
    content = npy_of(text, draw(st.sampled_from([1, 1, 1, 2, 3, 9])))
    return content + bytes(20)


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    """An archive: bytes changed, or an array in it whose sum is right."""
    if draw(st.booleans()):
        return draw(_bytes(_npz(draw(st.booleans()))))
    path = _place() / "made.npz"
    sound = {"b": array_bytes(np.arange(5)), "c": array_bytes(np.array(["one", "two", "three"]))}
    write_archive(path, a=draw(_headers()), **sound)
    return path.read_bytes()


def _check_npz(content: bytes) -> str:
    (_place() / "a.npz").write_bytes(content)
    try:
        arrays = read_npz("set", _place(), "a.npz", _EXPECTED)
    except CorruptData as error:
        return _one_line(error)
    assert {name: array.shape for name, array in arrays.items()} == {n: e.shape for n, e in _EXPECTED.items()}
    assert int(arrays["a"].max()) < 20
    return "read"


# Saved parts.


@cache
def _parts() -> dict[str, bytes]:
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few data
        target = DensityTarget.fit(x, dim=2, max_neighbors=10)
    classifier = LabelClassifier((3,), "class", 2, 4, 1)
    return {
        "DensityTarget": target.save(_place() / "target.safetensors").read_bytes(),
        "LabelClassifier": classifier.save(_place() / "classifier.safetensors").read_bytes(),
    }


@st.composite
def _saved(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(_parts())))
    content = _parts()[name]
    if draw(st.booleans()):
        return name, draw(_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    notes = header["__metadata__"]
    key = next(key for key in notes if key != "sha256")
    record = json.loads(notes[key])
    inner = draw(st.sampled_from([None, *sorted(k for k, of in record.items() if isinstance(of, dict))]))
    if inner is None:
        record = _mutated(draw, record, _JSON)
    else:
        record[inner] = _mutated(draw, record[inner], _JSON)
    notes[key] = json.dumps(record)
    if "sha256" in notes:
        notes["sha256"] = _digest_of_content(notes[key], load_tensors(content))
    return name, safetensors_of(header, data)


def _check_saved(example: tuple[str, bytes]) -> str:
    name, content = example
    path = _place() / "part.safetensors"
    path.write_bytes(content)
    reader: Any = {"DensityTarget": DensityTarget, "LabelClassifier": LabelClassifier}[name]
    try:
        reader.load(path)
    except ValueError as error:
        return _one_line(error)
    return "read"


TARGETS = {
    "specs": Target(_specs(), _check_spec, 150),
    "overrides": Target(_overrides(), _check_overrides, 150),
    "tensors of checkpoints": Target(_safetensors(), _check_tensors, 300),
    "pointers of checkpoints": Target(_pointers(), _check_pointer, 300),
    "records of runs": Target(_records(), _check_records, 300),
    "rows of metrics": Target(_rows(), _check_rows, 300),
    "idx files": Target(_bytes(_idx()), _check_idx, 300),
    "NumPy archives": Target(_archives(), _check_npz, 300),
    "saved parts": Target(_saved(), _check_saved, 150),
}
"""Every reader of what somebody else may have written."""


def prepare() -> None:
    """Make what examples start from, which takes random numbers, before any example is drawn."""
    for made in (_tables, _keys, _state, _parts):
        made()


def _round(target: Target, number: int, until: float, counts: Counter[str]) -> None:
    """Run some hundred examples, or as many as there is time for."""

    @seed(number)
    @settings(
        max_examples=300,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.examples)
    def run(example: Any) -> None:
        if time.monotonic() < until:
            counts[target.check(example)] += 1

    run()


def main() -> None:
    """Fuzz every target for its share of the time, and print what came of it."""
    parser = argparse.ArgumentParser(description="Fuzz the readers.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the examples (default: the time)")
    parser.add_argument("--only", choices=sorted(TARGETS), action="append")
    arguments = parser.parse_args()
    set_hypothesis_home_dir(_place() / "hypothesis")
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    prepare()
    names = arguments.only or list(TARGETS)
    first = int(time.time()) if arguments.seed is None else arguments.seed
    findings = 0
    for name in names:
        counts: Counter[str] = Counter()
        until, number, found = time.monotonic() + 60 * arguments.minutes / len(names), first, 0
        while time.monotonic() < until:
            try:
                _round(TARGETS[name], number, until, counts)
            except Exception:
                found += 1
                traceback.print_exc()
            number += 1
        findings += found
        came = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        print(f"{name:25s} {counts.total():7d} examples, {found} findings ({came})", flush=True)
    raise SystemExit(1 if findings else 0)


if __name__ == "__main__":
    main()
