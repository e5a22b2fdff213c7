"""The command that finds out how small a model may be: fit.

Place in the flow: parses, seeds and prints; the search is in `studies/fit.py`, what it tries in
`studies/trials.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..recipe.recipe import Recipe
from . import tables
from .answering import (
    START,
    Force,
    Json,
    Length,
    Memory,
    Quiet,
    Tokenizer,
    answering,
    app,
    argument,
    field,
    loaded,
    option,
    print_json,
    tell,
)
from .progress import Progress, to_stderr

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

NOTHING = 3  # exit code: no size keeps to the limits
EXAMPLES = f"""Examples:

  sparsessm fit builtin:pycode -o out --max-increase 2%

  sparsessm fit state-spaces/mamba-1.4b-hf -o out --max-increase 1% --min-speed 20 --data text.txt

  sparsessm fit builtin:pycode -o out --max-size 1.8MB

Exit code {NOTHING}: no size keeps to the limits; nothing is written."""
LIMITS = "Limits (at least one)"


def limit(flag: str, metavar: str, help: str) -> Any:
    """The option of a limit."""
    return option(flag, metavar=metavar, help=help, rich_help_panel=LIMITS, show_default=False)


@app.command(rich_help_panel=START, epilog=EXAMPLES)
def fit(
    model: Annotated[str, argument(metavar="MODEL", help=str(Recipe.model_fields["model"].description))],
    out: Annotated[Path, option("--out", "-o", help="The directory to write.")],
    max_increase: Annotated[
        str | None,
        limit(
            "--max-increase",
            "SHARE",
            "By how much perplexity may rise, such as 2%: the upper end of its 95 % interval.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        limit("--tasks", "NAMES", "Tasks of lm-evaluation-harness, with commas between, for --max-drop."),
    ] = None,
    max_drop: Annotated[
        str | None,
        limit(
            "--max-drop",
            "SHARE",
            "By how much the mean accuracy of the tasks may fall, such as 1% (one percentage point): the "
            "upper end of its 95 % interval.",
        ),
    ] = None,
    max_size: Annotated[
        str | None, limit("--max-size", "SIZE", "Bytes of the weights' file at most, such as 500MiB.")
    ] = None,
    min_speed: Annotated[
        str | None,
        limit("--min-speed", "TOKENS", "Tokens a second that our runtime decodes here, of one sequence."),
    ] = None,
    include_path: Annotated[
        Path | None,
        option("--include-path", help="Directory with your own task files, which may run code."),
    ] = None,
    data: Annotated[str | None, field("data")] = None,
    column: Annotated[str | None, field("column")] = None,
    samples: Annotated[int | None, option("--samples", min=1, help="Number of calibration windows.")] = None,
    length: Length = None,
    seed: Annotated[int | None, field("seed")] = None,
    tokenizer: Tokenizer = None,
    memory: Memory = None,
    resume: Annotated[
        bool, option("--resume", help="Go on with a search that was cut short.", rich_help_panel="Output")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the smallest size of MODEL that keeps to your limits, and write it.

    Several sizes are tried. The one that is chosen is verified on text that the search did not see.
    """
    from ..checkpoint import folder_of, refuse_existing, unfinished
    from ..checkpoint.at_rest import left_out
    from ..checkpoint.given import checked_path
    from ..report.page.pictures import refuse_without_matplotlib
    from ..studies.limits import Limits
    from ..studies.trials import Trials

    with answering(quiet, out, kept=folder_of(out), events=as_json) as progress:
        limits = Limits.parse(
            max_increase=max_increase, max_drop=max_drop, max_size=max_size, min_speed=min_speed, tasks=tasks
        )
        if include_path is not None and tasks is None:
            raise ValueError("--include-path has no effect without --tasks")
        given = {"model": checked_path("source", model), "data": data, "column": column, "samples": samples}
        given |= {"length": length, "seed": seed, "tokenizer": tokenizer}
        recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
        refuse_existing(out, force, model)
        silent = to_stderr(quiet=True)
        notes: list[Progress] = [progress]  # what of a source is not followed is said once

        def opened(source: str, folder: Path | None) -> Checkpoint:
            torch.manual_seed(recipe.seed)
            told = notes.pop() if notes else silent
            found = loaded(source, tokenizer, memory, told, folder)
            tell(left_out(found.extra), told)
            return found

        with unfinished(out, resume=resume, force=force) as journal:
            if journal.resumed:
                progress.note(f"going on in {journal.folder}")
            how = {"include_path": include_path, "progress": progress, "say": progress.say}
            trials = Trials(model, recipe, limits, opened, journal, **how)
            finding = trials.find()
            if finding.feasible:
                try:
                    refuse_without_matplotlib()
                    page = True
                except ValueError as error:
                    page = False
                    progress.note(f"note: report.html is not written ({error})")
                trials.write(finding, out, force=force, page=page)
            elif finding.points:  # else nothing was begun, and what lies there is of something else
                journal.clear()
    record = finding.record()
    if as_json:
        print_json({"out": str(out) if finding.feasible else None, **record})
    elif not quiet:
        if record["points"]:
            tables.show(tables.table(*points_table(record)))
        tables.show(*record["why"], *record["notes"])
        tables.show(f"Saved to {out}." if finding.feasible else "Nothing was written.")
    if not finding.feasible:
        raise typer.Exit(NOTHING)


def points_table(record: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Every size that was tried, the smallest first."""
    chosen = (record["chosen"] or {}).get("bits")
    asked_tasks = bool(record["asked"]["tasks"])
    columns = ["bits", "MB", "perplexity (95 %)", *["accuracy (95 %)"] * asked_tasks, "tokens/s", "verdict"]
    rows = []
    for point in sorted(record["points"], key=lambda point: point["bits"]):
        verdict = "chosen" if point["bits"] == chosen else "refused" if point["why"] else "feasible"
        cells = [f"{point['bits']:g}", f"{point['bytes'] / 1e6:.4g}"]
        cells.append(_change(point["increase"], point["low"], point["high"]))
        if asked_tasks:
            fall = point["tasks"]
            cells.append(_change(-fall["drop"], -fall["high"], -fall["low"]))
        cells.append("-" if point["speed"] is None else f"{point['speed']:,.1f}")
        rows.append([*cells, verdict])
    text = record["text"]
    windows = f"{text['search']['windows']} windows of {text['length']} tokens"
    return f"Sizes tried; change in % on {text['data']}, {windows}", columns, rows


def _change(value: float | None, low: float | None, high: float | None) -> str:
    parts = ["-" if part is None else f"{100 * part:+.2f}" for part in (value, low, high)]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"
