"""The page and the pictures of a run that somebody else made: text is text, or the run is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from pvae import canvas
from pvae.data import load
from pvae.experiments import RunError, SpecError
from pvae.experiments.figures import loss_curves, read_metrics
from pvae.experiments.report import render
from pvae.experiments.runs import RunFolder, open_run
from pvae.experiments.spec import parse
from tests.experiments.pages import Page

EVIL = (
    "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&lt;$\\frac{$ {{ 7*7 }} {% raw %} javascript:x"
)
TOML = f"description = {json.dumps(EVIL)}\nz_dim = 2\n[fit]\nsteps = 2\n"
TOML += "[data]\nname = 'two_moons'\nnum_train = 50\n"
PLAIN = "[likelihood]\nkind = 'normal'\n"
ROWS = [
    {"step": i, "epoch": i / 9, "loss": 3.0 - i, "kl": 1.0, "reconstruction": 2.0, EVIL: 1.0} for i in (1, 2)
]


def _made(folder: Path, **content: Any) -> Path:
    """A run folder of some files, whose texts are evil wherever a text may stand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.toml").write_text(TOML + PLAIN)
    data = load("two_moons", num_train=50).protocol.to_dict()
    manifest = {
        "status": EVIL,
        "started": EVIL,
        "seconds": 1.0,
        "steps": 2,
        "threads": 1,
        "seed": 0,
        "device": {"type": EVIL, "name": EVIL},
        "versions": {EVIL: EVIL},
        "platform": EVIL,
        "git": {"commit": EVIL, "changed": False},
        "data": data | {"name": EVIL, "split": EVIL, "note": EVIL, "scale": EVIL, "sha256": EVIL},
    }
    files = {"manifest.json": manifest, "evaluation.json": [], "diagnosis.json": []} | content
    for name, record in files.items():
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / name).write_text(text)
    if "metrics.jsonl" not in content:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_evil_texts_are_shown_as_texts(tmp_path: Path) -> None:
    text = render([_made(tmp_path / "<script>run<")])
    page = Page(text)
    assert page.problems == []
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {
        e.tag for e in page.elements
    }
    assert "49" not in page.all("h1")[0].text
    assert page.all("h1")[0].text == EVIL
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (element.attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert text.count("&lt;script&gt;") > 10
    assert "<script" not in text
    assert "onerror=alert(2)>" not in text


@pytest.mark.parametrize(
    "content",
    [
        {"manifest.json": []},
        {"manifest.json": "[" * 10_000},
        {"manifest.json": '"text"'},
        {"manifest.json": {"data": EVIL}},
        {"manifest.json": {"data": {"sizes": 3}}},
        {"manifest.json": {"steps": EVIL, "seconds": 1.0, "status": "x"}},
        {"manifest.json": {"steps": 1, "seconds": [], "status": "x"}},
        {"manifest.json": {"steps": 1, "seconds": 1e999, "status": "x"}},
        {"evaluation.json": {}},
        {"evaluation.json": [3]},
        {"evaluation.json": [{}]},
        {"evaluation.json": [{"settings": EVIL}]},
        {"evaluation.json": [{"settings": {}, "text": 3, "mean": EVIL}]},
        {"diagnosis.json": [[]]},
    ],
    ids=lambda content: ascii(json.dumps(content))[:60],
)
def test_records_that_are_none(tmp_path: Path, content: dict[str, Any]) -> None:
    """The page shows what it can show of them, or says in one line what is wrong."""
    folder = _made(tmp_path / "run", **content)
    try:
        text = render([folder])
    except RunError as error:
        text = str(error)
        assert len(text.splitlines()) == 1
    assert "<script" not in text or text.count("<script") == str(folder).count("<script")


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b"", 0),
        (b"[]\n", 0),
        (b"3\n", 0),
        (b'{"loss": "<script>"}\n', 0),
        (b'{"loss": {"a": 1}}\n', 0),
        (b'{"loss": true}\n', 0),
        (b'{"loss": 1' + b"0" * 400 + b"}\n", 0),
        (b'{"loss": 1' + b"0" * 5000 + b"}\n", 0),
        (b'{"a":' * 20_000 + b"\n", 0),
        (b'{"' + b"a" * 70_000 + b'": 1}\n', 0),
        (b'\xff{"loss": 1}\n', 0),
        (b'{"loss": 1}\n{"loss": NaN}\n{"loss": null}\n[]\n{"loss": 1}\n', 3),
        (b'{"loss": 1}\n{"lo', 1),
    ],
)
def test_rows_that_are_none(tmp_path: Path, lines: bytes, kept: int) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == kept


@pytest.mark.parametrize("title", [EVIL, "$", "$$", "$x", "$\\frac{1}$", "\\$", "x" * 1000, "%s {0}"])
def test_a_title_is_no_formula(tmp_path: Path, title: str) -> None:
    drawn = loss_curves(ROWS, tmp_path / "a.png", title)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    with canvas.look():
        canvas.save(canvas.figure(2, 1), tmp_path / "b.png", title)


def test_a_run_of_somebody_else_asks_for_no_files(tmp_path: Path) -> None:
    """A spec names a data set and not where it lies; a manifest names nothing that is opened."""
    folder = _made(tmp_path / "run")
    (folder / "spec.toml").write_text(TOML.replace("num_train", "root = '/etc'\nnum_train") + PLAIN)
    with pytest.raises(SpecError, match="it is given beside the spec, as --data-root"):
        open_run(folder)
    (folder / "spec.toml").write_text(TOML + PLAIN)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        open_run(folder)
    paths = [name for name, of in vars(RunFolder).items() if isinstance(of, property)]
    inside = [getattr(RunFolder(folder), name) for name in paths]
    assert all(path.parent == folder for path in inside if isinstance(path, Path))
    assert parse(TOML + PLAIN).description == EVIL
