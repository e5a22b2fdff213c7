"""What every command shares: the app it registers with, common options, how answers and mistakes are printed.

Place in the flow: below the commands of this folder, above everything else. Results go to stdout, progress
and errors to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import kernels
from ..recipe.recipe import Recipe
from ..report.record import finite
from . import ending, tables

app = typer.Typer(
    name="sparsessm",
    help="One-shot pruning of state space language models: a dense Mamba goes in, a pruned one comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def field(name: str, *flags: str) -> Any:
    """The option of a recipe field. Its default is None (not given): it must not override a recipe file."""
    known = Recipe.model_fields[name]
    default = f" [default: {str(known.default).lower()}]" if known.default not in (None, ()) else ""
    return typer.Option(*flags, help=f"{known.description}{default}", show_default=False)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and the JSON, if asked for).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing directory.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window [default: 2048, or the model's own].")
]
Tokenizer = Annotated[str | None, field("tokenizer")]


@contextmanager
def answering(
    quiet: bool, *writes: Path | None, grown: bool = False, streaming: bool = False
) -> Iterator[tables.Progress]:
    """Run a command's work; whatever goes wrong ends in one line and an exit code (ending.py).

    Args:
        quiet: no progress and no notes.
        writes: what the command writes, None: nothing after all.
        grown: a file that grows while the command works.
        streaming: no progress, because the command prints its result as it comes.
    """
    progress = tables.Progress(quiet or streaming)
    try:
        if not kernels.NATIVE and not quiet:
            tables.echo("note: the native kernels are not installed; the slow reference is used", err=True)
        with ending.writing(*writes, grown=grown, nothing="the text ends here" if streaming else ""):
            with ending.restoring(progress.restored), progress:
                yield progress
    except (BrokenPipeError, SystemExit):
        raise  # whoever read stdout has gone (rich exits then): the program ends without a word
    except BaseException as error:
        raise typer.Exit(ending.said(error, progress.doing)) from None


def tell(notes: Iterable[str], progress: tables.Progress) -> None:
    """Say on stderr what of a source is not followed or not written back (`Checkpoint.notes`)."""
    for note in notes:
        progress.note(f"note: {note}")


def print_json(document: dict[str, Any]) -> None:
    """Print a document on stdout; numbers that JSON does not have become null."""
    tables.echo(json.dumps(finite(document), indent=2, allow_nan=False))
