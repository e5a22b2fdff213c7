"""What a person reads and types: help in whole sentences and groups, completion, the nearest option."""

from __future__ import annotations

import os
import re
import shlex
import sys

import programs
import pytest
import typer
from typer.testing import CliRunner

from sparsessm import cli
from sparsessm.cli.answering import GROUPS, PANELS
from sparsessm.recipe.recipe import Recipe

COMMANDS = set(
    "fit run samples prune pack unpack eval bench inspect report watch analyze generate serve export upload "
    "demo list".split()
)


def shown(*arguments: str, width: int = 80) -> str:
    outcome = CliRunner().invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": str(width)})
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def panels(text: str) -> dict[str, list[str]]:
    """Title of a panel -> the first words of its entries: commands or options."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            here = found.setdefault(title[1], [])
        elif entry := re.match(r"│ (-?-?[a-z][\w-]*)  ", line):
            here.append(entry[1])
    return found


def words(text: str) -> str:
    """Without boxes and line breaks, which differ with the width."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)


def test_commands_are_grouped_and_their_sentences_are_whole() -> None:
    text = shown()
    assert "..." not in text.replace("[ARGS]...", "") and "…" not in text
    found = panels(text)
    assert [title for title in found if title != "Options"] == list(GROUPS)
    assert {name for title in GROUPS for name in found[title]} == COMMANDS
    for command in cli.app.registered_commands:
        assert command.callback is not None
        sentence = str(command.callback.__doc__).splitlines()[0]
        assert sentence.endswith(".") and words(sentence) in words(text)


def test_prune_shows_five_options_first_and_the_others_in_panels() -> None:
    found = panels(shown("prune", width=110))
    assert list(found) == ["Arguments", "Options", *PANELS]
    assert found["Options"] == ["--out", "--sparsity", "--structured", "--recipe", "--dry-run", "--help"]
    given = {name for options in found.values() for name in options}
    assert {f"--{name.replace('_', '-')}" for name in Recipe.model_fields} - given == {"--model", "--rules"}


@pytest.mark.parametrize("width", [80, 140])
def test_help_of_a_field_is_its_description_letter_by_letter(width: int) -> None:
    """Nothing is taken for markup or for an emoji (N:M: has one)."""
    text = words(shown("prune", width=width))
    for name, field in Recipe.model_fields.items():
        if name != "rules":
            assert words(str(field.description)) in text, name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    text = shown(command)
    assert "Usage:" in text and "…" not in text


def test_the_examples_parse() -> None:
    lines = [line.strip() for line in shown("prune", width=140).splitlines()]
    examples = [shlex.split(line)[2:] for line in lines if line.startswith("sparsessm prune")]
    assert len(examples) == 5
    command = typer.main.get_command(cli.app).commands["prune"]  # pyright: ignore[reportAttributeAccessIssue]
    for example in examples:
        given = {
            name: value for name, value in command.make_context("prune", example).params.items() if value
        }
        Recipe(**{name: value for name, value in given.items() if name in Recipe.model_fields})


@pytest.mark.parametrize(
    ("typed", "offered"), [("pru", "prune"), ("prune --all", "--allocation"), ("prune --spars", "--sparsity")]
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    line = f"sparsessm {typed}"
    environment = {"_SPARSESSM_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment |= {"COMP_CWORD": str(len(line.split()) - 1)}
    code = "from sparsessm.cli import main; import sys; sys.argv = ['sparsessm']; main()"
    done = programs.run([sys.executable, "-c", code], env={**os.environ, **environment})
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("prune x --sparsty 0.5", "--sparsity"), ("prun x", "prune"), ("eval x --lenght 3", "--length")],
)
def test_a_slip_is_told_the_nearest(typed: str, nearest: str) -> None:
    outcome = CliRunner().invoke(cli.app, typed.split())
    assert outcome.exit_code == 2 and nearest in outcome.output
