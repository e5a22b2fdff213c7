"""Links of the docs to files beside `docs/`: on the site they are names, for there is nothing to link to.

Place in the flow: a hook of mkdocs (mkdocs.yml), for each page before it is rendered. In the repository such
a link works as it stands; here the file must exist, and the link becomes its path in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<to>\.\.?/[^)#\s]*)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with links out of `docs/` as code.

    Raises:
        ValueError: a link to a file that does not exist.
    """
    return inside(markdown, ROOT / "docs" / page.file.src_uri)


def inside(markdown: str, page: Path) -> str:
    """The same, of a text and the place of its page."""

    def named(link: re.Match[str]) -> str:
        target = (page.parent / link["to"]).resolve()
        if not target.exists():
            raise ValueError(f"{page.relative_to(ROOT)}: there is no {link['to']}")
        if (ROOT / "docs").resolve() in target.parents:
            return link[0]
        return f"`{target.relative_to(ROOT).as_posix()}`"

    return LINK.sub(named, markdown)
