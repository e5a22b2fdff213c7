"""The pages of docs/: each is in the navigation, and each relative link and anchor leads somewhere.

`make docs` builds them with warnings as errors; this needs no mkdocs.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from sources import ROOT

import outside_links  # isort: skip  (of tools/, which `sources` puts on the path)

DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/peers.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def listed(nav: Any) -> list[str]:
    """The files of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [file for part in parts for file in listed(part)]


def anchor(heading: str) -> str:
    """What a heading is called in a link: as Python-Markdown's `toc` writes it."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(line) for line in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def dead(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere; what has a scheme is not followed."""
    found = []
    for link in LINK.findall(FENCE.sub("", text)):
        to, _, part = link.partition("#")
        target = (page.parent / to) if to else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (part and part not in anchors(target)):
            found.append(link)
    return found


def test_each_page_is_in_the_navigation_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = sorted(file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md"))
    assert sorted(listed(site["nav"])) == pages
    assert site["theme"]["font"] is False  # else a page asks another host for them
    assert listed(["a.md", {"More": [{"B": "b.md"}]}]) == ["a.md", "b.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead(page, page.read_text(encoding="utf-8"))


def test_a_dead_link_is_found() -> None:
    text = (
        "[a](no.md) [b](index.md#no-such) [c](index.md#install) [d](https://x.y) [e](../README.md) [f](#no)"
    )
    assert dead(DOCS / "index.md", text) == ["no.md", "index.md#no-such", "#no"]
    assert anchor("Run it in llama.cpp, Ollama, LM Studio") == "run-it-in-llamacpp-ollama-lm-studio"
    assert anchor("`grid` and `bits`: fewer bits") == "grid-and-bits-fewer-bits"


def test_links_out_of_the_docs_become_names_on_the_site() -> None:
    page = DOCS / "results.md"
    assert outside_links.inside("[tables](../bench/peers.md#x) [m](methods.md)", page) == (
        "`bench/peers.md` [m](methods.md)"
    )
    inner = DOCS / "ja/README.md"
    assert outside_links.inside("[g](../guidance.md#x)", inner) == "[g](../guidance.md#x)"
    assert outside_links.inside("![p](../frontier-bytes.png)", inner) == "![p](../frontier-bytes.png)"
    with pytest.raises(ValueError, match=r"docs/results.md: there is no \.\./bench/no.md"):
        outside_links.inside("[x](../bench/no.md)", page)


def test_translations_name_what_they_follow_and_have_its_commands() -> None:
    guidance = (DOCS / "guidance.md").read_text(encoding="utf-8")
    for file in (DOCS / "ja").glob("*.md"):
        text = file.read_text(encoding="utf-8")
        english = ROOT / "README.md" if file.name == "README.md" else DOCS / file.name
        assert f"]({'../../README.md' if file.name == 'README.md' else '../' + file.name})" in text
        ours = set(re.findall(r"^ {4}(sparsessm .*?)(?: +#.*)?$", text, flags=re.MULTILINE))
        ours |= set(re.findall(r"`(sparsessm [^`]+)`", text))
        theirs = " ".join((english.read_text(encoding="utf-8") + guidance).split())
        assert ours and not [line for line in ours if line not in theirs]
