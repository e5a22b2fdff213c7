"""What the pages tell a reader to type works: every command parses, those of the README run as they stand.

Each section of the README runs in a fresh directory, top to bottom, commands and Python alike. Long ones are
made short (one calibration window, little text, built-in models of two layers), and what needs a network is
replaced: hub models by the built-in one, WikiText-2 by a small file. Sizes in bytes are those of the short
models.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path

import pytest
import typer
from pico import TEXT
from typer.testing import CliRunner

import sparsessm
from sparsessm import cli
from sparsessm.cli import demonstration
from sparsessm.evaluation import beside_dense, timing
from sparsessm.pruning import mixes
from sparsessm.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n([\s\S]*?)^```$|((?:^    .*\n)+)", flags=re.MULTILINE)
HUB = re.compile(r"[\w-]+/[\w.-]+")
REPLACED = {"wikitext2": "text.txt", "1.8MB": "0.9MB"}
# Appended to a command that would take long; of an option given twice the last counts. With a limit that all
# keep, `fit` tries one size.
SHORT = {
    "prune": ["--samples", "2", "--length", "64", "--no-eval"],
    "fit": ["--help", "--samples", "2", "--length", "64", "--max-increase", "999999%"],
    "eval": ["--limit", "1", "--length", "64"],
    "demo": ["--samples", "1"],
    "report": ["--no-eval"],
    "serve": ["--help"],
    "watch": ["--help"],
    "analyze": ["--samples", "1", "--windows", "1", "--length", "64"],
}


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block and, with language "", each indented one."""
    for match in BLOCK.finditer(page):
        yield match[1] or "", match[2] or match[3]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `sparsessm ...` line; continued lines are one, comments do not count."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("sparsessm "):
            words = shlex.split(line, comments=True)[1:]
            yield [*takewhile(lambda word: word not in {">", "|", "&&"}, words)]


def mentioned(page: str) -> Iterator[list[str]]:
    """All commands of a page: in its blocks, and between single backticks."""
    for language, text in blocks(page):
        yield from commands("" if language in ("python", "text") else text)  # "text" is what was printed
    for words in re.findall(r"`(sparsessm [^`\n]+)`", BLOCK.sub("", page)):
        yield from commands(words.replace("...", ""))


def test_the_reader_of_pages() -> None:
    page = "a\n\n    sparsessm list  # all\n    ls\n\nb `sparsessm demo` c\n"
    page += "```python\nimport x\n```\n```\nsparsessm eval y > z\n```\n```text\nsparsessm 1.0\n```\n"
    assert list(blocks(page)) == [
        ("", "    sparsessm list  # all\n    ls\n"),
        ("python", "import x\n"),
        ("", "sparsessm eval y > z\n"),
        ("text", "sparsessm 1.0\n"),
    ]
    assert list(mentioned(page)) == [["list"], ["eval", "y"], ["demo"]]


def parse(arguments: list[str]) -> None:
    """Parse with the program's own parser, without running; `prune`'s options must make a recipe."""
    group = typer.main.get_command(cli.app)
    name, *rest = arguments
    if name.startswith("-"):
        group.make_context("sparsessm", arguments, resilient_parsing=True)
        return
    command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    # prose may name a command without its arguments, or `prune` without its output
    bare = not rest or "--help" in rest or (name == "prune" and not {"-o", "--out"} & set(rest))
    context = command.make_context(name, rest, resilient_parsing=bare)
    if name == "prune" and not bare:
        options = context.params.items()
        given = {key: value for key, value in options if value not in (None, [], ())}
        Recipe(**{key: value for key, value in given.items() if key in Recipe.model_fields})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page: Path) -> None:
    for arguments in mentioned(page.read_text(encoding="utf-8")):
        parse(arguments)


@pytest.mark.parametrize(
    "page",
    [
        "```sh\n$ sparsessm prune x -o y \\\n --sparsty 1  # comment\n```\n",
        "text\n\n    sparsessm prunee x\n",
        "say `sparsessm prune x -o y --method wnada` or so",
        "    sparsessm eval --limit 1\n",
    ],
)
def test_the_check_finds_what_is_wrong(page: str) -> None:
    (arguments,) = mentioned(page)
    with pytest.raises(Exception, match="sparsty|prunee|wnada|models"):
        parse(arguments)


def test_make_targets_exist() -> None:
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        for target in re.findall(r"(?:^ *(?:\$ )?|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
            assert target in rules, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_links_to_exist(page: Path) -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / name).exists(), name


def test_the_tree_names_every_room() -> None:
    tree = README.split("## What is where")[1].split("\n\n")[2]
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "src/sparsessm").iterdir()
        if path.name not in {"py.typed", "__main__.py", "__pycache__"}
    }
    assert {line.split()[0] for line in tree.splitlines() if line.startswith("      ")} == rooms
    assert len(tree.splitlines()) <= 18


def test_the_tables_of_what_is_supported_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tools/support_table.py` would change no page."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("support_table")
    pages = dict(tool.pages())
    families = {*(ROOT / "docs/families").glob("*.md")}
    assert pages.keys() == families | {ROOT / "README.md", ROOT / "docs/architectures.md"}
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, page
    assert tool.put("a <!-- x -->old<!-- end of x --> b", "x", "new") == (
        "a <!-- x -->\nnew\n<!-- end of x --> b"
    )
    for wrong in ("no place", "<!-- x --> without an end", "<!-- x --><!-- end of x --><!-- x -->"):
        with pytest.raises(ValueError, match="must stand on the page once each"):
            tool.put(wrong, "x", "new")


def test_the_recipes_of_the_page_fit_the_built_in_model(tmp_path: Path) -> None:
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    recipes = [text for language, text in blocks(page) if language == "yaml"]
    assert len(recipes) == 2
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        line = ["prune", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run"]
        outcome = CliRunner().invoke(cli.app, line)
        assert outcome.exit_code == 0, outcome.stderr
        assert "in_proj" in outcome.stdout


@pytest.mark.parametrize(
    "section",
    [
        text
        for text in re.split(r"^## ", README, flags=re.MULTILINE)
        if any(commands(text)) or "```python" in text
    ],
    ids=lambda section: section.splitlines()[0],
)
@pytest.mark.usefixtures("little_library", "short_builtins")
def test_a_section_of_the_readme_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    monkeypatch.setattr(demonstration, "WINDOWS", 2)
    monkeypatch.setattr(demonstration, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PHASE", 0.2)
    monkeypatch.setattr(timing, "BUFFER", 1 << 20)
    monkeypatch.setattr(mixes, "TRIED", (0.25,))
    monkeypatch.setattr(beside_dense, "SPEED", {"batches": (1,), "rounds": 1, "prompt": 8})
    monkeypatch.setattr(sparsessm, "prune", partial(sparsessm.prune, samples=1, length=64))
    monkeypatch.setattr(sparsessm, "evaluate", partial(sparsessm.evaluate, limit=1, length=64))
    for language, text in blocks(section):
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            continue
        for arguments in commands(text):
            local = [REPLACED.get(word) or HUB.sub(_local, word) for word in arguments]
            outcome = CliRunner().invoke(cli.app, [*local, *SHORT.get(arguments[0], [])])
            assert outcome.exit_code == 0, (arguments, outcome.stderr, outcome.exception)


def _local(match: re.Match[str]) -> str:
    """A path that an earlier command made stays; a hub id becomes the built-in model."""
    return match[0] if Path(match[0]).exists() else "builtin:pycode"
