"""The command that writes the page about a result: report.

Place in the flow: parses and prints. `evaluation/beside_dense.py` measures, `report/page` makes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from ..data.texts import FILES
from ..report.record import checked
from . import tables
from .answering import LOOK, Json, Quiet, answering, app, argument, option, print_json, tell


@app.command(rich_help_panel=LOOK)
def report(
    directory: Annotated[str, argument(metavar="OUT", help="A result of `prune`, `pack` or `fit`.")],
    out: Annotated[
        Path | None, option("--out", "-o", help="The file to write [default: report.html in OUT].")
    ] = None,
    against: Annotated[
        str | None, option(metavar="MODEL", help="The dense model [default: the one that the record names].")
    ] = None,
    data: Annotated[
        str | None,
        option(
            help=f"The text to measure on: a name (see `sparsessm list`), or {FILES} [default: the recipe's]."
        ),
    ] = None,
    tasks: Annotated[
        str | None, option(help="Also run zero-shot tasks of lm-evaluation-harness: piqa,arc_easy,...")
    ] = None,
    no_eval: Annotated[
        bool, option("--no-eval", help="Measure nothing: show what is known.", rich_help_panel="Output")
    ] = False,
    force: Annotated[
        bool,
        option(
            "--force",
            help="Measure again, and replace a file that is no report.",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a result: what was done, what it costs, and how to repeat it."""
    target = out or Path(directory) / "report.html"
    with answering(quiet, target, events=as_json) as progress:
        from ..checkpoint import open_checkpoint
        from ..checkpoint.atomic import write_text
        from ..checkpoint.given import checked_path
        from ..evaluation import beside_dense
        from ..report.page.document import page
        from ..report.page.pictures import refuse_without_matplotlib

        refuse_without_matplotlib()
        options = {"against": against, "data": data, "tasks": tasks}
        given = [name for name, value in options.items() if value is not None]
        if no_eval and (idle := [name for name in given if name != "against"]):
            raise ValueError(f"--{idle[0]} has no effect with --no-eval")
        if not Path(checked_path("source", directory)).is_dir():
            raise ValueError(f"no such directory: {directory!r}")
        refuse_place(target, force)
        opened = open_checkpoint(directory)
        record = checked(opened.record, f"{directory}/pruning.json")
        if record is None:
            raise ValueError(
                f"{directory!r} has no pruning.json, so it is no result of `sparsessm prune`; name one"
            )
        tell(opened.notes, progress)
        names = [name for part in (tasks or "").split(",") if (name := part.strip())]
        before = None if force else beside_dense.kept(opened)
        question = beside_dense.asked(record, before, against=against, data=data, tasks=names)
        complete = before is not None and (bool(before.perplexity) or no_eval)
        found = before if before and before.asked == question and complete else None
        again = found is not None
        if found is None:
            found = beside_dense.measure(
                opened, record, question, given=given, run=not no_eval, progress=progress, say=progress.say
            )
        if not again and not no_eval:
            try:
                beside_dense.keep(opened.folder.path, found)
            except OSError as error:  # a result that may only be read
                progress.note(f"note: what was measured was not kept in {directory} ({error})")
        text = page(record, found, directory=directory, fit=search_of(opened.folder.path, progress.note))
        write_text(target, text)
    summary: dict[str, Any] = {"result": directory, "out": str(target), "bytes": len(text.encode())}
    if as_json:
        print_json({**summary, "measured": found.record()})
    elif not quiet:
        note = " What was measured before is shown; --force measures again." if again else ""
        tables.show(*found.missing, f"Saved to {target}.{note}")


def search_of(folder: Path, note: Callable[[str], None]) -> dict[str, Any] | None:
    """What a search found, as the page shows it; None of a result of `prune` or `pack`.

    Args:
        note: told of a fit.json that cannot be read.
    """
    from ..checkpoint.companions import FINDING
    from ..data.foreign import from_json, read_bytes
    from ..report.page.searched import searched
    from ..studies.fit import FORMAT

    file = folder / FINDING
    if not file.exists():
        return None
    try:
        content = from_json(read_bytes(file), strict=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{file}: it is no finding of `sparsessm fit`")
    except (ValueError, OSError) as error:
        note(f"note: the page does not show the search ({error})")
        return None
    return searched(content)


def refuse_place(target: Path, force: bool) -> None:
    """Refuse to write the page where something else is, or where no file can be made.

    Raises:
        ValueError: says what is there.
    """
    from ..checkpoint import refuse_target
    from ..report.page.document import is_page

    refuse_target(target)
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a directory; name a file for the page")
    if target.exists() and not force:
        with open(target, "rb") as file:
            if not is_page(file.read(1024)):
                raise ValueError(
                    f"{str(target)!r} is no report; choose another name with -o, or replace it with --force"
                )
