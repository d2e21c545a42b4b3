"""The page of runs: its sections, that it is complete in itself, well-formed, legible, and says what is."""

import json
import re
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pvae.experiments import RunError, evidence_figures, load_spec
from pvae.experiments.cli import app
from pvae.experiments.evidence import certificate, kept
from pvae.experiments.evidence_parts import PARTS
from pvae.experiments.jobs import train
from pvae.experiments.report import page as report_page
from pvae.experiments.report import render, write_report
from pvae.experiments.report.blocks import Block, from_markdown
from pvae.experiments.report.sections import SECTIONS
from pvae.experiments.report.svg import to_svg
from pvae.experiments.runs import RunFolder
from pvae.files import sealed, unsealed, unsealed_text

from .pages import Page

STYLE = Path(__file__).parents[2] / "experiments" / "report" / "style.css"
EVIL = "<script>alert('&\"')</script>"


@pytest.fixture(scope="module")
def page(judged: Path) -> Page:
    return Page(render([judged]))


@pytest.fixture
def copy(judged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged, tmp_path / "run"))


@pytest.fixture(scope="module")
def others(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The judged run, another seed of it that was not judged, and one of points, of another protocol."""
    folder = tmp_path_factory.mktemp("others")
    changes = ["z_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]", "fit.steps=3"]
    settings = ["evaluate.num_particles=30", "evaluate.limit=40"]
    train(load_spec("vae", [*changes, *settings, "fit.seed=1"]), folder / "tiny-1", progress=False)
    plane = ["data=gaussian_mixture", "data.binarize=none", "data.num_train=200", "likelihood=normal"]
    train(load_spec("vae", [*changes, *settings, *plane]), folder / "plane", progress=False)
    return [judged, folder / "tiny-1", folder / "plane"]


def check(page: Page) -> None:
    """What every page has to keep."""
    assert page.problems == []
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), value
            if name == "href" and value is not None and value.startswith("#"):
                assert value[1:] in ids
    assert not {"script", "link", "iframe", "object", "base"} & {e.tag for e in page.elements}
    for style in page.all("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text
    for image in page.all("img"):
        assert len(image.attributes["alt"] or "") > 10
    for drawing in page.all("svg"):
        assert drawing.attributes["role"] == "img"
        assert len(drawing.attributes["aria-label"] or "") > 20
    for cell in page.all("th"):
        assert cell.attributes["scope"] == ("col" if "thead" in cell.parents else "row")
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    (root,) = page.all("html")
    assert root.attributes["lang"] == "en"
    assert page.all("title")[0].text


def test_the_page_of_a_judged_run(page: Page, judged: Path) -> None:
    check(page)
    assert [e.attributes["id"] for e in page.all("section")] == [
        section.name for section in SECTIONS if section.name not in ("layers", "density", "ood")
    ]
    (line,) = [e.text for e in page.all("p") if e.attributes.get("class") == "certificate"]
    assert line == certificate(kept(RunFolder(judged)))
    assert page.all("h1")[0].text == "Gaussian VAE on 8x8 digits"
    drawings = {e.attributes["id"]: len([x for x in e.inside if x.tag == "svg"]) for e in page.all("section")}
    assert drawings == {
        "trained": 0,
        "data": 0,
        "training": 3,
        "pictures": 0,
        "codes": 1,
        "likelihood": 2,
        "gaps": 1,
        "calibration": 3,
        "match": 3,
        "predictive": 2,
        "quality": 1,
        "left": 0,
        "versions": 0,
    }
    assert len([x for x in page.section("pictures").inside if x.tag == "img"]) == 3


def test_what_the_sections_say(page: Page, judged: Path) -> None:
    manifest = json.loads((judged / "manifest.json").read_text())
    records = kept(RunFolder(judged))
    assert "p(x, z) = p(z) p(x | z)" in page.section("trained").text
    assert (judged / "spec.toml").read_text() in page.section("trained").text
    for hash_ in (manifest["data"]["sha256"], manifest["data"]["hash"], records["codes"]["parameters"]):
        assert hash_ in page.section("data").text
    assert records["gaps"]["result"]["sentence"] in page.section("gaps").text
    for said in records["bidirectional"]["result"]["said"]:
        assert said in page.section("likelihood").text
    assert manifest["versions"]["torch"] in page.section("versions").text
    assert "pvae diagnose" in page.section("left").text
    assert "--ood NAME" in page.section("left").text
    assert "median distance to the training data" in page.section("quality").text


def test_bounds_of_different_protocols_are_in_tables_of_their_own(page: Page, judged: Path) -> None:
    records = kept(RunFolder(judged))
    likelihood = records["likelihood"]["result"]["estimates"]["own"]
    estimates = [
        json.loads((judged / "evaluation.json").read_text())[0],
        likelihood,
        records["annealing"]["result"]["direct"],
        records["annealing"]["result"]["annealed"],
    ]
    tables = [e for e in page.section("likelihood").inside if e.tag == "table"]
    protocols = [estimate["protocol"]["hash"] for estimate in estimates]
    assert len(tables) == len(set(protocols)) == 3
    for table, protocol in zip(tables, dict.fromkeys(protocols), strict=True):
        assert protocol in table.text
        rows = [e for e in table.inside if e.tag == "tr"][1:]
        own = [estimate for estimate in estimates if estimate["protocol"]["hash"] == protocol]
        assert len(rows) == len(own)
        for row, estimate in zip(rows, own, strict=True):
            assert f"{estimate['log_likelihood']:.2f}" in row.text


def test_runs_side_by_side(others: list[Path]) -> None:
    text = render(others)
    page = Page(text)
    check(page)
    assert page.all("h1")[0].text == "3 runs side by side"
    compared = page.section("compared")
    captions = [e.text for e in compared.inside if e.tag == "caption"]
    assert len(captions) == 2  # digits and points
    names = [e.text for e in compared.inside if e.tag == "th" and "tbody" in e.parents]
    assert sorted(names) == ["plane", "tiny", "tiny"]  # seeds are a column
    for section in page.all("section")[1:]:
        names = [e.text for e in section.inside if e.tag == "h3"]
        assert names
        assert set(names) <= {"tiny", "tiny-1", "plane"}
        if section.attributes["id"] in ("trained", "likelihood", "versions"):
            assert names == ["tiny", "tiny-1", "plane"]
    assert render(others) == text  # nothing of the clock or of chance is in it


def test_a_run_that_was_not_diagnosed_says_how_it_can_be(others: list[Path]) -> None:
    page = Page(render([others[1]]))
    check(page)
    commands = [e.text for e in page.all("pre") if e.attributes.get("class") == "command"]
    assert f"pvae diagnose {others[1]} --only gaps" in commands
    assert f"pvae diagnose {others[1]} --only likelihood --only annealing --only bidirectional" in commands
    assert f"pvae diagnose {others[1]}" in commands
    assert len([x for x in page.section("pictures").inside if x.tag == "img"]) == 2  # those of training
    assert "was not diagnosed" in page.all("header")[0].text


def test_a_spec_alone_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_DATA", str(tmp_path / "nowhere"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.toml").write_text(load_spec("vae-mnist").to_toml())
    page = Page(render([folder]))
    check(page)
    assert "Without sizes, as the data could not be had" in page.section("trained").text
    assert "Training is yet to begin." in page.section("training").text
    assert "The run has not begun" in page.section("versions").text


def test_what_comes_from_files_is_text(copy: Path) -> None:
    spec = unsealed_text((copy / "spec.toml").read_text())
    name = json.dumps(EVIL)
    (copy / "spec.toml").write_text(spec.replace('"Gaussian VAE on 8x8 digits"', name))
    for path in (copy / "evidence").glob("*.json"):
        record = unsealed(json.loads(path.read_text()))
        record["text"] = EVIL + record["text"]
        if path.stem == "codes":
            record["result"]["labels"] = [EVIL] * len(record["result"]["labels"])
            record["result"]["axes"] = [EVIL, EVIL]
        if path.stem == "calibration":
            for quantity in record["result"]["quantities"]:
                quantity["name"] = EVIL
        if path.stem == "gaps":
            record["result"] |= {"sentence": EVIL, "reference_name": EVIL}
        if path.stem == "predictive":
            record["result"]["misfits"]["prior"] = [EVIL]
        if path.stem == "quality":
            record = {**record, "left_out": EVIL}
        path.write_text(json.dumps(record))
    evil = copy.with_name("<b>run")
    copy.rename(evil)
    text = render([evil, evil])
    assert "<script" not in text
    assert "<b>run" not in text
    page = Page(text)
    check(page)
    assert "&lt;script&gt;" in text
    assert page.section("left").text.count(EVIL) == 2


def test_parts_of_other_parameters_are_not_shown(copy: Path) -> None:
    pointer = copy / "checkpoints" / "final.json"
    pointer.write_text(json.dumps(sealed(unsealed(json.loads(pointer.read_text())) | {"sha256": "0" * 64})))
    page = Page(render([copy]))
    assert "was not diagnosed" in page.all("header")[0].text


def test_left_out_parts_say_why_in_their_section(copy: Path) -> None:
    path = copy / "evidence" / "gaps.json"
    record = unsealed(json.loads(path.read_text()))
    del record["result"], record["text"]
    path.write_text(json.dumps(record | {"left_out": "a latent is no real number"}))
    page = Page(render([copy]))
    assert "Left out: a latent is no real number." in page.section("gaps").text
    assert "a latent is no real number" in page.section("left").text


def test_pictures_from_outside_of_the_folder_stay_there(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    (copy / "figures" / "jacobian.png").symlink_to(tmp_path / "secret.png")
    assert "jacobian" not in render([copy])
    (copy / "figures" / "jacobian.png").unlink()
    shutil.copy(copy / "figures" / "samples.png", copy / "figures" / "jacobian.png")
    assert "Jacobian over training" in render([copy])


def test_where_the_page_goes(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_page, "render", lambda runs, root: f"page of {len(runs)}")
    assert write_report([copy]) == copy / "report.html"
    assert write_report([copy, copy]) == Path("report.html")
    result = CliRunner().invoke(app, ["report", str(copy), "--out", "pages/one.html", "--json"])
    assert json.loads(result.stdout) == {
        "page": "pages/one.html",
        "bytes": (tmp_path / "pages" / "one.html").stat().st_size,
    }
    assert CliRunner().invoke(app, ["report", str(copy)]).stdout == f"{copy / 'report.html'}\n"
    with pytest.raises(RunError, match="cannot write the page"):
        write_report([copy], copy / "spec.toml" / "page.html")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one run"):
        render([])
    refused = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert refused.exit_code == 2
    assert refused.stderr == f"pvae: {tmp_path} is not a run folder: it has no spec.toml\n"
    assert not list(tmp_path.iterdir())


def test_drawings_take_the_colours_of_the_page_and_keep_nothing_from_elsewhere() -> None:
    drawn = evidence_figures.khat_histogram([0.1, 0.2, 0.9], 0.7)
    svg = to_svg(drawn, "a-1", 'x < "y" & z')
    page = Page(svg)
    assert page.problems == []
    (element,) = page.all("svg")
    assert element.attributes["aria-label"] == 'x < "y" & z'
    assert element.attributes["viewbox"] == "0 0 316.8 194.4"
    assert "http" not in svg
    assert "<style" not in svg
    assert "font-family" not in svg
    assert re.findall("#[0-9a-f]{6}", svg) == []
    assert {"var(--series-1)", "var(--series-4)", "var(--ink)"} <= set(re.findall(r"var\([^)]*\)", svg))
    ids = re.findall(r'id="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("a-1-") for name in ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', svg)
    assert set(used) == set(ids)


def test_every_drawing_has_words_for_those_who_cannot_see_it(judged: Path) -> None:
    records = kept(RunFolder(judged))
    drawings = [one for name in records for one in PARTS[name].drawings(records[name])]
    assert len(drawings) > 12
    for drawing in drawings:
        assert len(drawing.alt) > 30, drawing.name
        assert drawing.caption.endswith("."), drawing.name
        assert "nan" not in drawing.alt


def test_layers_are_drawn() -> None:
    def layer(kl: float, plane: list[list[float]] | None) -> dict[str, object]:
        return {"kl": kl, "standard_error": None, "kl_plane": plane}

    layers = {"u": layer(3.0, None), "z_1": layer(0.5, [[0.1, 0.2], [0.0, 0.2]])}
    record = {"result": {"diagnosis": {"layers": {"test": {"layers": layers}, "train": {"layers": layers}}}}}
    rates, maps = PARTS["latents"].drawings(record)
    assert "u 3.00, z_1 0.50" in rates.alt
    assert maps.alt == "Maps of the mean KL by place of the layers z_1."
    for i, drawing in enumerate((rates, maps)):
        assert isinstance(drawing, evidence_figures.Drawing)
        svg = to_svg(drawing.draw(), f"l{i}", drawing.alt)
        assert Page(svg).problems == []
        assert ("data:image/png" in svg) == bool(i)


def test_markdown_of_reports() -> None:
    table = "| a | log p(x | z) |\n| --- | ---: |\n| b, p(z | y) | 1 |\n| c |  |"
    text = f"Before.\n\n{table}\n\n- one\n- two\nafter"
    assert from_markdown(text) == [
        Block("paragraph", "Before."),
        Block("table", "", (("b, p(z | y)", "1"), ("c", "")), ("a", "log p(x | z)")),
        Block("list", rows=[["one"], ["two"]]),
        Block("paragraph", "after"),
    ]
    assert from_markdown("|a|b|\n|---|---|\n|1|2|")[0].rows == (("1", "2"),)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def palettes() -> Iterable[dict[str, str]]:
    for block in re.findall(r":root \{([^}]*)\}", STYLE.read_text()):
        yield dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def test_text_stands_out_in_light_dark_and_print() -> None:
    found = list(palettes())
    assert len(found) == 3
    for palette in found:
        assert set(palette) == set(found[0])
        for paper in ("paper", "raised"):
            for text in ("ink", "soft", "accent"):
                assert contrast(palette[text], palette[paper]) >= 4.5, (text, paper, palette)
        for i in range(1, 10):
            assert contrast(palette[f"series-{i}"], palette["paper"]) >= 3, (i, palette)


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)
