"""The documentation: its examples run, its links lead somewhere, its table of parts is the real one."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pvae.experiments.cli import app
from pvae.experiments.components import to_markdown
from pvae.experiments.spec import recipes
from tests.survival.kill_loop import table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORTER = {
    "epochs=50": "epochs=1",
    "beta_warmup=5": "beta_warmup=1",
    "num_particles=1000": "num_particles=2",
    "num_particles=100)": "num_particles=2)",
}


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what a link into a page may end in, as GitHub makes it of a heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, and generators as they were."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cvae-nf", "x-vae", "five", "divae", "dvp-vae"])
def test_the_examples_of_a_paper_run(name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / f"{name}.md"
    # DiVAE is a table that any recipe takes.
    command = {"divae": "vae align=direct", "dvp-vae": "dvp-tiny "}.get(name, f"{name}-digits\n")
    assert f"pvae train {command}" in page.read_text()
    if "open_run" in page.read_text():
        # What the page trains by the command before it opens it, in fewer steps.
        words = ["train", f"{name}-digits", "fit.epochs=1", "fit.beta_warmup=1", "evaluate.num_particles=2"]
        assert CliRunner().invoke(app, words).exit_code == 0
    found = blocks(page)
    assert found
    for block in found:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, str(page), "exec"), {})
    assert "nats" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "index.md")


def test_the_readme_shows_the_table_of_parts_as_it_is() -> None:
    assert to_markdown() in README.read_text()


def test_the_readme_shows_lines_of_the_benchmarks() -> None:
    shown = re.findall(r"^\| (?:small|medium|conv|evaluation|cvae-nf) .*$", README.read_text(), re.MULTILINE)
    kept = (ROOT / "benchmarks" / "results" / "cpu.md").read_text().splitlines()
    assert len(shown) > 10
    assert [line for line in shown if line not in kept] == []


def test_the_counts_of_the_loops_are_those_that_are_kept() -> None:
    results, page = ROOT / "experiments" / "results", (ROOT / "docs" / "survival.md").read_text()
    report = json.loads((results / "survival.json").read_text())
    assert report["kills"] >= 30
    assert report["different"] == 0
    assert table(report) in page
    assert (results / "damage.txt").read_text() in page
    assert (results / "fuzz.txt").read_text() in (ROOT / "SECURITY.md").read_text()


def test_the_documentation_names_only_recipes_that_there_are() -> None:
    named = {name for page in PAGES for name in re.findall(r"pvae train ([a-z][\w-]*)", page.read_text())}
    assert {"vae-mnist", "cvae-nf-digits", "x-vae-digits"} <= named <= set(recipes())


@pytest.mark.parametrize(
    ("name", "page_name"),
    [
        ("cvae-nf", "cvae-nf"),
        ("x-vae", "x-vae"),
        ("five", "five"),
        ("divae", "divae"),
        ("density", "divae"),
        ("dvp", "dvp-vae"),
        ("overstatement", "dvp-vae"),
    ],
)
def test_study_tables_are_those_of_the_results(name: str, page_name: str) -> None:
    """Page, tables and cells agree: what a page prints was made from the records beside it."""
    folder = ROOT / "experiments" / "results" / f"study-{name}"
    page, tables = (ROOT / "docs" / f"{page_name}.md").read_text(), (folder / "tables.md").read_text()
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in page] == []
    pictures = re.findall(r"!\[[^]]*\]\((figures/[^)]+)\)", tables)
    assert pictures
    for picture in pictures:
        assert (folder / picture).is_file()
        assert f"../experiments/results/study-{name}/{picture}" in page
