"""The command line run in this process, and code run in another."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import programs
from typer.testing import CliRunner

from sparsessm import cli

COMMAND = [sys.executable, "-m", "sparsessm.cli"]
FAST = ["--data", "text.txt", "--samples", "3", "--length", "16"]


def run(*arguments: str, code: int = 0, stdin: str | None = None) -> Any:
    """The outcome of a command, which ends with exit code `code`; it has .stdout and .stderr."""
    outcome = CliRunner().invoke(cli.app, list(arguments), input=stdin)
    assert outcome.exit_code == code, (outcome.stdout, outcome.stderr, outcome.exception)
    return outcome


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that must fail."""
    outcome = run(*arguments, "--quiet", code=1)
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same command as a program of its own."""
    return programs.run([*COMMAND, *arguments], **options)


def row_of(text: str, start: str) -> list[str]:
    """The cells of the only table line that begins with a word."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = [line for line in lines if line[0] == start]
    return found


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Code run by another process."""
    return programs.run([sys.executable, "-c", code, *map(str, arguments)])


def new_python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another Python from its start, where libraries read the environment."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
