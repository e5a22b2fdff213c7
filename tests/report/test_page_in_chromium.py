"""The page in a real browser: it shows, asks for nothing, complains of nothing, and its tables sort."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import pages
import pytest

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on the PATH")

TABLE = (
    "[...document.querySelectorAll('table.sorts')].find(t => t.caption.textContent.startsWith('By layer'))"
)
COLUMN = f"[...({TABLE}).tBodies[0].rows].map(row => row.cells[3].dataset.value)"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[browser.Browser, Path]]:
    folder = tmp_path_factory.mktemp("page")
    file = folder / "report.html"
    file.write_text(pages.whole(pages.HOSTILE), encoding="utf-8")
    with browser.Browser(folder / "profile") as opened:
        yield opened, file


@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("dark", [False, True])
def test_it_shows_at_every_width_in_light_and_dark(
    shown: tuple[browser.Browser, Path], width: int, dark: bool, tmp_path: Path
) -> None:
    page, file = shown
    page.open(file, width=width, dark=dark)
    assert page.asked and {*page.asked} == {file.resolve().as_uri()}  # nothing else was asked for
    assert not page.said
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in ground[4:-1].split(","))
    assert lightness < 150 if dark else lightness > 600
    bars = "getComputedStyle(document.querySelector('#suffering svg g path[fill*=s1]')).fill"
    assert page.value(bars) == ("rgb(127, 176, 255)" if dark else "rgb(31, 95, 191)")
    page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_policy_stops_what_the_page_does_not_name(shown: tuple[browser.Browser, Path]) -> None:
    page, file = shown
    page.open(file)
    add = "(name, what) => document.body.append(Object.assign(document.createElement(name), what))"
    page.value(f"({add})('img', {{src: 'https://x.test/'}})")
    page.value(f"({add})('script', {{text: 'window.bad = 1'}})")
    page.value(f"({add})('p', {{id: 'red'}}); red.setAttribute('style', 'color: rgb(255, 0, 0)')")
    assert page.value("window.bad") is None
    assert page.value("getComputedStyle(red).color") != "rgb(255, 0, 0)"
    assert page.asked.count("https://x.test/") == page.stopped.count("https://x.test/")
    assert any("Content Security Policy" in said for said in page.said)
    page.said.clear()
    page.asked.clear()


def test_tables_sort_by_mouse_and_by_key(shown: tuple[browser.Browser, Path]) -> None:
    page, file = shown
    page.open(file)
    original = page.value(COLUMN)
    rising = sorted(original, key=float)
    assert original != rising
    head = f"({TABLE}).tHead.rows[0].cells[3]"
    assert page.value(f"{head}.getAttribute('aria-sort')") is None
    page.value(f"{head}.querySelector('button').click()")
    assert page.value(f"{head}.getAttribute('aria-sort')") == "ascending" and page.value(COLUMN) == rising
    page.value(f"{head}.querySelector('button').focus()")
    page.press("Enter", 13)
    assert page.value(f"{head}.getAttribute('aria-sort')") == "descending"
    assert page.value(COLUMN) == rising[::-1]
    page.press("Enter", 13)
    assert page.value(f"{head}.getAttribute('aria-sort')") is None and page.value(COLUMN) == original
    assert not page.said


def test_all_is_open_on_paper(shown: tuple[browser.Browser, Path]) -> None:
    page, file = shown
    page.open(file)
    closed = "document.querySelectorAll('details:not([open])').length"
    before = page.value(closed)
    page.value("dispatchEvent(new Event('beforeprint'))")
    assert before > 0 and page.value(closed) == 0
    page.value("dispatchEvent(new Event('afterprint'))")
    assert page.value(closed) == before
