"""The app with all of its commands. Importing it takes as long as importing torch.

Place in the flow: what `cli.main` runs once it is in control.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

import sparsessm

from .. import kernels
from . import fitting, looking, measuring, pruning, ranks, reporting, running, tables
from .answering import GROUPS, app
from .chaining import run_chain
from .choosing import samples
from .ending import TRACEBACK
from .fitting import fit
from .looking import evaluate, inspect, list_
from .measuring import bench
from .pruning import analyze, demo, prune
from .reporting import report
from .running import export, generate, pack, unpack
from .serving import serve
from .uploading import upload
from .watching import watch

__all__ = [
    "analyze",
    "app",
    "bench",
    "demo",
    "evaluate",
    "export",
    "fit",
    "fitting",
    "generate",
    "inspect",
    "list_",
    "looking",
    "measuring",
    "pack",
    "prune",
    "pruning",
    "report",
    "reporting",
    "run",
    "run_chain",
    "running",
    "samples",
    "serve",
    "unpack",
    "upload",
    "watch",
]

ABORTED = (
    f"error: a library ended the process, as it does where memory is short; {TRACEBACK}=1 in the environment "
    "lets it dump core\n"
)
app.registered_commands.sort(key=lambda command: GROUPS.index(str(command.rich_help_panel)))
_Mistake: type[BaseException] = typer.BadParameter.__mro__[2]  # ClickException, of whichever click typer uses


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        tables.echo(f"sparsessm {sparsessm.__version__} (kernels: {kernels.LEVEL})")
        raise typer.Exit


def run() -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    if kernels.NATIVE and kernels.LEVEL != "reference" and not os.environ.get(TRACEBACK):
        kernels.extension().end_on_abort(ABORTED)
    ranks.refuse_unshared()
    try:
        return app(standalone_mode=False) or 0
    except _Mistake as error:
        text = io.StringIO()
        error.show(file=text)  # pyright: ignore[reportAttributeAccessIssue]
        sys.stderr.write(text.getvalue())
        return error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
