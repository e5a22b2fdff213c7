"""The command line: parses, prints, sets seeds and the environment; everything else is behind `sparsessm.*`.

Place in the flow: the outermost layer. Importing it is light: `main` must be in control before torch and
transformers are imported, which takes seconds in which people press Ctrl-C.

    ending.py      signals, exit codes, what is said of failures
    streams.py     stdout and stderr that cannot end the work
    ranks.py       several processes that share the work
    ring.py        which of them has gone, and why
    commands.py    the app with all of its commands
    answering.py   the app, options in common, what is printed where
    pruning.py     prune, demo, analyze
    fitting.py     fit
    choosing.py    samples
    looking.py     eval, inspect, list
    running.py     generate, export, pack, unpack
    measuring.py   bench
    serving.py     serve
    watching.py    watch
    reporting.py   report
    chaining.py    run: the steps of a chain, each a program of its own
    chain.py       what a chain's file says
    uploading.py   upload
    demonstration.py   what demo compares
    tables.py      draws tables and progress
    __main__.py    `python -m sparsessm.cli`
"""

from __future__ import annotations

from typing import Any

from . import ending

__all__ = ["main"]


def main() -> None:
    """The `sparsessm` program: runs the command of `sys.argv` and ends the process."""
    ending.begin()
    ending.finish(ending.run(_command))


def _command() -> int:
    from . import commands

    return commands.run()


def __getattr__(name: str) -> Any:
    """The app, its commands and the files of this folder, imported when somebody asks for one."""
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.commands"), name)
