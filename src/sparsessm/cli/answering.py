"""What every command shares: the app it registers with, common options, how answers and mistakes are printed.

Place in the flow: below the commands of this folder, above everything else. Results go to stdout, progress
and errors to stderr.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from rich.markup import escape

from .. import kernels
from ..recipe.recipe import Recipe
from ..report.record import finite
from . import ending, ranks, tables
from .progress import Progress, to_stderr

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

app = typer.Typer(
    name="sparsessm",
    help="Make a Mamba-family language model smaller and faster, without training, and measure the cost.",
    epilog="Try it offline: sparsessm demo\n\n"
    "Prune half of a model: sparsessm prune MODEL -o OUT\n\n"
    "Help for one command: sparsessm prune --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Groups of `sparsessm --help`, by what one wants to do, in the order in which they are shown.
GROUPS = START, SMALLER, LOOK, RUN = "Start here", "Make a model smaller", "See what it costs", "Run a model"
# Groups of `prune --help`: the fields of a recipe by what they say. What matters first is in no group.
PANELS = {
    "What is pruned": ("target", "ignore"),
    "How much": ("bits", "size", "grid", "pattern", "allocation"),
    "How": ("method", "repair", "price", "removed", "diagonal", "time_weights", "compute"),
    "Calibration data": ("data", "column", "samples", "length", "seed", "tokenizer"),
    "Output": ("memory", "device", "resume", "force", "no_eval", "as_json", "quiet"),
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


def option(*flags: str, help: str, **more: Any) -> Any:
    """An option whose help is text and no markup."""
    return typer.Option(*flags, help=escape(help), **more)


def argument(*, help: str, **more: Any) -> Any:
    """An argument whose help is text and no markup."""
    return typer.Argument(help=escape(help), **more)


def field(name: str, *, panel: str | None = None) -> Any:
    """The option of a recipe field. Its default is None (not given): it must not override a recipe file."""
    known = Recipe.model_fields[name]
    default = f" [default: {str(known.default).lower()}]" if known.default not in (None, ()) else ""
    flag = f"--{name.replace('_', '-')}"
    flags = (f"{flag}/--no-{flag[2:]}",) if _kind(known.annotation) is bool else (flag,)
    return option(*flags, help=f"{known.description}{default}", show_default=False, rich_help_panel=panel)


def takes_recipe(but: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for every field of a recipe, beside its own parameters.

    What was given arrives as keyword arguments; what was not does not.

    Args:
        but: fields that are no options.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            absent = {name for name in names if given[name] in (None, [], ())}
            command(**{name: value for name, value in given.items() if name not in absent})

        own = inspect.signature(command, eval_str=True).parameters.values()
        names = [name for name in Recipe.model_fields if name not in but]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    _kind(Recipe.model_fields[name].annotation) | None, field(name, panel=PANEL_OF.get(name))
                ],
            )
            for name in names
        ]
        kept = [part.replace(kind=part.KEYWORD_ONLY) for part in own if part.kind is not part.VAR_KEYWORD]
        order = ["", *PANELS]  # panels are shown in the order of their first options
        parts = sorted([*kept, *added], key=lambda part: order.index(PANEL_OF.get(part.name, "")))
        run.__signature__ = inspect.Signature(parts)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorated


def _kind(annotation: Any) -> Any:
    """What the command line takes for a field; of several types or words the recipe checks which it is."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = {_kind(part) for part in get_args(annotation) if part is not type(None)}
        return kinds.pop() if len(kinds) == 1 else str
    if get_origin(annotation) is tuple:
        return list[str]
    return str if get_origin(annotation) is Literal else annotation


Json = Annotated[
    bool,
    option(
        "--json",
        help="Print one JSON document instead of tables, and on stderr a JSON object a line.",
        rich_help_panel="Output",
    ),
]
Quiet = Annotated[
    bool,
    option(
        "--quiet",
        "-q",
        help="Print nothing but errors (and the JSON, if asked for).",
        rich_help_panel="Output",
    ),
]
Force = Annotated[bool, option("--force", help="Replace an existing directory.", rich_help_panel="Output")]
Length = Annotated[
    int | None,
    option("--length", min=2, help="Tokens in a window [default: 2048, or the model's length if shorter]."),
]
Compute = Annotated[str | None, field("compute")]
Tokenizer = Annotated[str | None, field("tokenizer")]
Kept = Annotated[
    str,
    option(
        "--keys",
        metavar="FORM",
        help="How attention's keys and values are held: float32, or int8, which takes about a quarter of the "
        "memory and is not exact.",
    ),
]
Memory = Annotated[
    str | None,
    option(
        "--memory",
        metavar="SIZE",
        help="How much memory to use, such as 6GB; a larger model is read block by block, each time it is "
        "needed [default: half of what is free].",
        rich_help_panel="Output",
    ),
]

Device = Annotated[
    str,
    option(
        "--device",
        metavar="DEVICE",
        help="What computes: cpu, cuda, cuda:1, or auto, a GPU where there is one.",
        rich_help_panel="Output",
    ),
]


@contextmanager
def answering(
    quiet: bool,
    *writes: Path | None,
    grown: bool = False,
    streaming: bool = False,
    nothing: str = "",
    kept: Path | None = None,
    events: bool = False,
) -> Iterator[Progress]:
    """Run a command's work; whatever goes wrong ends in one line and an exit code (ending.py).

    Args:
        quiet: no progress and no notes.
        writes: what the command writes, None: nothing after all.
        grown: a file that grows while the command works.
        streaming: no progress, because the command prints its result as it comes.
        nothing: what a signal ends, where nothing is written.
        kept: the directory that keeps what is done, for `--resume`.
        events: what is told on stderr is for a program (`progress.Events`).
    """
    notes = to_stderr(quiet=quiet or ranks.number() > 0, events=events)
    progress = to_stderr(quiet=True) if streaming else notes
    try:
        if not kernels.NATIVE:
            notes.note("note: the native kernels are not installed; the slow reference is used")
        with ending.writing(*writes, grown=grown, nothing=nothing, kept=kept, events=events):
            with ranks.together(ending.at_once), ending.restoring(progress.restored), progress:
                yield progress
    except (BrokenPipeError, SystemExit):
        raise  # whoever read stdout has gone (rich exits then): the program ends without a word
    except BaseException as error:
        raise typer.Exit(ending.said(error, progress.doing)) from None


def tell(notes: Iterable[str], progress: Progress) -> None:
    """Say on stderr what of a source is not followed or not written back (`Checkpoint.notes`)."""
    for note in notes:
        progress.note(f"note: {note}")


def loaded(
    model: str,
    tokenizer: str | None,
    memory: str | None,
    progress: Progress,
    folder: Path | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """A model, read block by block if it is larger than the memory; what of it is not followed is said.

    Args:
        memory: as `Memory`. folder: where what is changed is written. device: as `Device`.
    """
    from ..checkpoint import Streaming, load
    from ..checkpoint.given import checked_path, undisturbed
    from ..checkpoint.memory import allowed

    checked_path("source", model)
    with undisturbed():
        room = allowed(None) // ranks.here() if memory is None else memory
        found = load(model, tokenizer=tokenizer, streaming=Streaming.within(room, folder), device=device)
    if found.residence.device.type != "cpu":
        progress.note(f"computing on {found.residence.device}")
    tell(found.notes, progress)
    return found


def print_json(document: dict[str, Any]) -> None:
    """Print a document on stdout, as `as_text`."""
    tables.echo(as_text(document))


def as_text(document: dict[str, Any]) -> str:
    """A document as JSON; numbers that JSON does not have become null."""
    return json.dumps(finite(document), indent=2, allow_nan=False)
