"""Checkpoints that somebody else wrote: pointers, headers, states and links, in one sentence each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pvae.data import Data, from_tensors
from pvae.density import DensityTarget
from pvae.evaluation import LabelClassifier
from pvae.files import sealed, unsealed
from pvae.inference import CheckpointError, fit, load_parameters
from pvae.inference.checkpoint import load, pointer
from pvae.inference.program import program_state
from tests.inference.programs import LinearGuide, LinearModel

from .bombs import MARK, pickle_bomb, safetensors_of, write_checkpoint
from .confined import MEBIBYTES, confined


def programs() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return LinearModel(), LinearGuide()


def refusal(out: Path, which: str = "last") -> str:
    """The one line that a checkpoint is refused with, before any parameter changes."""
    model, guide = programs()
    before = {name: tensor.clone() for name, tensor in program_state(model, guide).items()}
    with pytest.raises(CheckpointError) as caught:
        load_parameters(out, model, guide, which)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program_state(model, guide).items())
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 200 + 3 * len(str(out))
    assert not (out / MARK).exists()
    return text


def _one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        safetensors_of({}, length=2**64 - 1),
        safetensors_of({}, length=2**40),
        safetensors_of({}, length=99_000_000),
        safetensors_of(_one(shape=[10**15], offsets=[0, 4 * 10**15]), b"\0" * 4),
        safetensors_of(_one(shape=[2**62, 2**62]), b"\0" * 4),
        safetensors_of(_one(shape=[-1]), b"\0" * 4),
        safetensors_of(_one(offsets=[-4, 0]), b"\0" * 4),
        safetensors_of(_one(offsets=[4, 0]), b"\0" * 4),
        safetensors_of(_one(dtype="NaN"), b"\0" * 4),
        safetensors_of(_one(dtype="object"), b"\0" * 4),
        safetensors_of(_one(dtype=["F32"]), b"\0" * 4),
        safetensors_of({**_one(), "b": _one()["a"]}, b"\0" * 4),
        safetensors_of({**_one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}, b"\0" * 8),
        safetensors_of({**_one(), "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, b"\0" * 12),
        safetensors_of(_one(), b"\0" * 400),
        safetensors_of({"a": 3}),
        safetensors_of([]),
        safetensors_of(b"{" * 10_000),
        safetensors_of(b"[" * 100_000),
        safetensors_of(b'{"__metadata__":{"a":3}}'),
        safetensors_of(b"\xff\xfe{}"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, content)
    assert "must be a safetensors file, but is not" in refusal(tmp_path)


def test_names_that_stand_twice(tmp_path: Path) -> None:
    one = json.dumps(_one())[1:-1]
    write_checkpoint(tmp_path, safetensors_of(f"{{{one},{one}}}".encode(), b"\0" * 4))
    assert "must be" in refusal(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_by_the_name_of_a_checkpoint(tmp_path: Path, protocol: int) -> None:
    write_checkpoint(tmp_path, pickle_bomb(tmp_path, protocol))
    assert "must be a safetensors file, but is not" in refusal(tmp_path)


def _changed(**changes: Tensor | None) -> bytes:
    state: dict[str, Tensor | None] = {n: t.detach().clone() for n, t in program_state(*programs()).items()}
    state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return save_tensors({name: tensor for name, tensor in state.items() if tensor is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_changed(model__decoder__weight=torch.zeros(5, 4)), "model has another decoder.weight: (5, 3) here"),
        (_changed(model__decoder__weight=torch.zeros(15)), "model has another decoder.weight"),
        (_changed(model__decoder__weight=torch.zeros(())), "model has another decoder.weight"),
        (_changed(model__decoder__weight=None), "(5, 3) here, absent saved"),
        (_changed(guide__more=torch.zeros(1)), "guide has another more: absent here"),
        (safetensors_of({}), "model has another decoder.bias"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, content: bytes, message: str) -> None:
    write_checkpoint(tmp_path, content)
    assert message in refusal(tmp_path)


GOOD = _changed()

POINTERS: dict[str, tuple[Any, str]] = {
    "traversal": ({"file": "../../../etc/passwd"}, "it names '../../../etc/passwd'"),
    "absolute": ({"file": "/etc/passwd"}, "it names '/etc/passwd'"),
    "through a folder": ({"file": "a/step-00000001-00000000.safetensors"}, "it names"),
    "with a null": ({"file": "step-00000001-00000000.safetensors\0"}, "it names"),
    "with a line break": ({"file": "step-00000001-00000000.safetensors\n"}, "it names"),
    "no name": ({"file": 3}, "its file is 3"),
    "a list": ({"file": ["a"]}, "its file is ['a']"),
    "a long name": ({"file": "x" * 10**6}, "it names"),
    "the best elsewhere": ({"best_state": {"file": "../x", "sha256": "", "step": 0}}, "it names '../x'"),
    "the best a list": ({"best_state": []}, "it is not a record"),
    "no step": ({"step": None}, "its step is None"),
    "NaN": ({"step": float("nan")}, "its step is nan"),
    "infinite": ({"step": float("inf")}, "its step is inf"),
    "huge": ({"step": 10**300}, "its step is 1000"),
    "negative": ({"step": -1}, "it names"),
    "rows": ({"rows": "all"}, "its rows is 'all'"),
    "a truth value": ({"seed": True}, "its seed is True"),
    "a sum that is none": ({"sha256": None}, "its sha256 is None"),
    "best": ({"best": "0"}, "its best is '0'"),
}


@pytest.mark.parametrize("name", POINTERS)
def test_pointers_that_lie(tmp_path: Path, name: str) -> None:
    changes, message = POINTERS[name]
    write_checkpoint(tmp_path, GOOD)
    path = tmp_path / "checkpoints" / "last.json"
    path.write_text(json.dumps(sealed(unsealed(json.loads(path.read_text())) | changes)))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'"file"',
        b"{}",
        b"[" * 100_000,
        b'{"file":' * 100_000,
        b"\xff\xfe\x00",
        b"\xed\xa0\x80",
        b'{"step":1' + b"0" * 5000 + b"}",
        b'{"file": "a", "file": "b"}',
        b"{" + b" " * 2**16,
    ],
)
def test_pointers_that_are_none(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, GOOD)
    (tmp_path / "checkpoints" / "last.json").write_bytes(content)
    assert "pointer" in refusal(tmp_path)


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = write_checkpoint(out, GOOD)
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert "must lie in its folder, but is a link to elsewhere" in refusal(out)
    # The whole folder may be one, as on a disk of its own.
    (tmp_path / "linked").symlink_to(out)
    path.unlink()
    (tmp_path / path.name).rename(path)
    assert load_parameters(tmp_path / "linked", *programs(), "last")["step"] == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    huge = write_checkpoint(tmp_path / "huge", GOOD)
    with huge.open("r+b") as file:
        file.truncate(2**40)
    claims = safetensors_of(_one(shape=[2**38], offsets=[0, 2**40]))
    write_checkpoint(tmp_path / "claims", claims)
    write_checkpoint(tmp_path / "pointer", GOOD)
    with (tmp_path / "pointer" / "checkpoints" / "last.json").open("r+b") as file:
        file.truncate(2**40)
    endless = write_checkpoint(tmp_path / "endless", GOOD)
    endless.unlink()
    endless.symlink_to("/dev/zero")
    statements = {
        name: f"load_parameters({str(tmp_path / name)!r}, LinearModel(), LinearGuide(), 'last')"
        for name in ("huge", "claims", "pointer", "endless")
    }
    target = tmp_path / "target.safetensors"
    target.write_bytes(claims)
    statements["target"] = f"DensityTarget.load({str(target)!r})"
    config = json.dumps({"x_shape": [1, 2**20, 2**20], "kind": "class", "size": 2**40, "width": 2**20})
    classifier = tmp_path / "classifier.safetensors"
    classifier.write_bytes(safetensors_of({"__metadata__": {"pvae.LabelClassifier": config}}))
    statements["classifier"] = f"LabelClassifier.load({str(classifier)!r})"
    imports = (
        "from pvae.inference import load_parameters\nfrom pvae.density import DensityTarget\n"
        "from pvae.evaluation import LabelClassifier\n"
        "from tests.inference.programs import LinearGuide, LinearModel"
    )
    for name, outcome in confined(imports, statements).items():
        wanted = "ValueError" if name in ("target", "classifier") else "CheckpointError"
        assert outcome.kind == wanted, (name, outcome)
        assert len(outcome.text.splitlines()) == 1
        assert outcome.grown < MEBIBYTES / 4, (name, outcome)


@pytest.fixture(scope="module")
def data() -> Data:
    return from_tensors(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), name="points")


@pytest.fixture
def run(data: Data, tmp_path: Path) -> Path:
    """A run that may be gone on with."""
    fit(*programs(), data, steps=4, batch_size=10, out=tmp_path / "run", progress=False, ema=0.9)
    return tmp_path / "run"


def _rewrite(run: Path, tensors: dict[str, Tensor | None], **meta: Any) -> None:
    """Change what a checkpoint holds, with sums that are right."""
    which = run / "checkpoints" / "last.json"
    before = unsealed(json.loads(which.read_text()))
    state: dict[str, Tensor | None] = dict(load_tensors((run / "checkpoints" / before["file"]).read_bytes()))
    content = save_tensors({n: t for n, t in (state | tensors).items() if t is not None})
    for name in ("file", "sha256"):
        before.pop(name)
    for other in ("previous", "final", "best"):
        (run / "checkpoints" / f"{other}.json").unlink(missing_ok=True)
    write_checkpoint(run, content, **before | meta)


RNG = {"numpy": ["MT19937", 624, 0, 0.0], "python": [3, [0] * 624 + [624], None]}

STATES: dict[str, tuple[dict[str, Tensor | None], dict[str, Any]]] = {
    "a moment of another shape": ({"optimizer.0.exp_avg": torch.zeros(1)}, {}),
    "a moment of no parameter": ({"optimizer.99.exp_avg": torch.zeros(1)}, {}),
    "a moment without a number": ({"optimizer.x.exp_avg": torch.zeros(1)}, {}),
    "a moment without a name": ({"optimizer.0": torch.zeros(1)}, {}),
    "a step of many": ({"optimizer.0.step": torch.zeros(9)}, {}),
    "an average of another shape": ({"ema.0": torch.zeros(1)}, {}),
    "no average": ({"ema.0": None}, {}),
    "losses without columns": ({"losses": torch.zeros(2)}, {}),
    "losses without end": ({"losses": torch.zeros(500, 3)}, {}),
    "a generator of another size": ({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}, {}),
    "a generator of zeros": ({"rng.cpu": torch.zeros(5056, dtype=torch.uint8)}, {}),
    "a generator of numbers": ({"rng.cpu": torch.zeros(5056)}, {}),
    "no generator": ({"rng.cpu": None}, {}),
    "words that are too few": ({"rng.numpy": torch.zeros(3, dtype=torch.int64)}, {}),
    "no state": ({}, {"rng": {}}),
    "another generator": ({}, {"rng": RNG | {"numpy": ["PCG64", 0, 0, 0.0]}}),
    "a position outside": ({}, {"rng": RNG | {"numpy": ["MT19937", 10**6, 0, 0.0]}}),
    "a position before": ({}, {"rng": RNG | {"numpy": ["MT19937", -5, 0, 0.0]}}),
    "Python's position outside": ({}, {"rng": RNG | {"python": [3, [0] * 624 + [10**6], None]}}),
    "Python's words too large": ({}, {"rng": RNG | {"python": [3, [10**30] * 625, None]}}),
    "lists for numbers": ({}, {"rng": {"numpy": [[], [], [], []], "python": [[], [], []]}}),
    "names that are none": ({}, {"names": []}),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_none(run: Path, data: Data, name: str) -> None:
    tensors, meta = STATES[name]
    _rewrite(run, tensors, **meta)
    with pytest.raises(CheckpointError) as caught:
        fit(*programs(), data, steps=6, batch_size=10, out=run, resume=True, progress=False, ema=0.9)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "rows", [b"[]\n", b'{"a": "b"}\n', b"[" * 10_000 + b"\n", b"\xff\n", b'{"a": 1' + b"0" * 400 + b"}\n"]
)
def test_rows_that_are_none(run: Path, data: Data, rows: bytes) -> None:
    (run / "metrics.jsonl").write_bytes(rows)
    which = run / "checkpoints" / "last.json"
    meta = unsealed(json.loads(which.read_text())) | {"rows": 1}
    meta.pop("rows_sha256", None)
    which.write_text(json.dumps(sealed(meta)))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged: ") as caught:
        fit(*programs(), data, steps=6, batch_size=10, out=run, resume=True, progress=False, ema=0.9)
    assert len(str(caught.value).splitlines()) == 1


def _without(run: Path, key: str) -> None:
    which = run / "checkpoints" / "last.json"
    meta = unsealed(json.loads(which.read_text()))
    (run / "checkpoints" / "previous.json").unlink(missing_ok=True)
    meta.pop(key)
    which.write_text(json.dumps(sealed(meta)))
    assert pointer(run)["step"] == 4


@pytest.mark.parametrize("key", ["seed", "batch_size", "num_data", "rows", "names", "rng"])
def test_a_pointer_that_lacks_what_is_needed(run: Path, data: Data, key: str) -> None:
    _without(run, key)
    with pytest.raises((CheckpointError, ValueError), match=key) as caught:
        fit(*programs(), data, steps=6, batch_size=10, out=run, resume=True, progress=False, ema=0.9)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["best", "waited", "rows_sha256", "best_state"])
def test_a_pointer_that_lacks_what_means_nothing(run: Path, data: Data, key: str) -> None:
    _without(run, key)
    again = fit(*programs(), data, steps=6, batch_size=10, out=run, resume=True, progress=False, ema=0.9)
    assert again.steps == 6


def test_a_sound_one_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, GOOD)
    tensors, meta = load(tmp_path)
    assert tensors.keys() == program_state(*programs()).keys()
    assert meta["step"] == 1
    assert load_parameters(tmp_path, *programs(), "last")["step"] == 1


@pytest.mark.parametrize(
    ("reader", "key"), [(DensityTarget, "pvae.DensityTarget"), (LabelClassifier, "pvae.LabelClassifier")]
)
@pytest.mark.parametrize(
    "notes", ["[]", "3", "{}", "[" * 10_000, "not JSON", '{"x_shape": 3}', '{"x_shape": ["a"]}']
)
def test_parts_with_notes_that_are_none(tmp_path: Path, reader: Any, key: str, notes: str) -> None:
    path = tmp_path / "part.safetensors"
    path.write_bytes(safetensors_of({"__metadata__": {key: notes}}))
    with pytest.raises(ValueError, match=r"\S") as caught:
        reader.load(path)
    assert len(str(caught.value).splitlines()) == 1
