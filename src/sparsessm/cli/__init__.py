"""The command line: parses, prints, sets seeds and the environment; everything else is behind `sparsessm.*`.

Place in the flow: the outermost layer.

    answering.py   the app, options in common, what is printed where, exit codes
    pruning.py     prune, demo, analyze
    looking.py     eval, inspect, list
    running.py     generate, pack, unpack
    measuring.py   bench
    __main__.py    `python -m sparsessm.cli`
"""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

import sparsessm

try:
    from .. import kernels
except ValueError as error:  # SPARSESSM_KERNELS names what is not there
    raise SystemExit(f"error: {error}") from None

from .. import tables
from . import looking, measuring, pruning, running
from .answering import app
from .looking import evaluate, inspect, list_
from .measuring import bench
from .pruning import analyze, demo, prune
from .running import generate, pack, unpack

__all__ = [
    "analyze",
    "app",
    "bench",
    "demo",
    "evaluate",
    "generate",
    "inspect",
    "list_",
    "looking",
    "main",
    "measuring",
    "pack",
    "prune",
    "pruning",
    "running",
    "unpack",
]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sparsessm {sparsessm.__version__} (kernels: {kernels.LEVEL})")
        raise typer.Exit


def main() -> None:
    """The `sparsessm` command."""
    # before transformers is imported: its bars and advice are not ours, and stdout is for results
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGINT, lambda *_: tables.Progress.end(KeyboardInterrupt()))
    signal.signal(signal.SIGTERM, lambda *_: tables.Progress.end(SystemExit(143)))  # cleans up like Ctrl-C
    app()
