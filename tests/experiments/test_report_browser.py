"""The page in a real browser, wide and narrow, light and dark and printed; skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pvae.experiments.report import write_report
from pvae.experiments.report.sections import SECTIONS

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no browser: playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with api.sync_playwright() as playwright:
        # As root, in a container, Chromium has no sandbox.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([judged, judged], tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_shows_everything_and_asks_for_nothing(
    browser: Any, page: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 812}, color_scheme=scheme)
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
    for section in SECTIONS:
        if section.name not in ("layers", "density", "ood"):
            assert tab.locator(f"#{section.name}").is_visible(), section.name
    # No part is wider than the window, and two runs stand beside one another only where there is room.
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    left, right = (tab.locator("#codes .run").nth(i).bounding_box() for i in (0, 1))
    assert (left["y"] == right["y"]) == (width == 1280)
    # Text of drawings can be read.
    size = tab.evaluate(
        "() => Math.min(...[...document.querySelectorAll('figure svg')].map(svg =>"
        " 7 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"
    )
    assert size > 6.5
    # Pictures were decoded, and drawings are drawn in colours of their own.
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_light(ink), _light(paper)) == ((False, True) if scheme == "light" else (True, False))
    shot = tmp_path / f"{width}-{scheme}.png"
    tab.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 100_000
    context.close()


def test_print(browser: Any, page: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.emulate_media(media="print")
    assert _light(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert not tab.locator("nav").is_visible()
    assert tab.pdf().startswith(b"%PDF")
    context.close()


def _light(colour: str) -> bool:
    """Whether a colour such as ``rgb(20, 24, 29)`` is a light one."""
    red, green, blue = (float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])
    return red + green + blue > 384
