"""Commands that only look: eval, inspect, list.

Place in the flow: parses and prints; the work is behind `sparsessm.*`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import sparsessm

from ..data.texts import DATASETS
from ..methods import entry_methods, unit_methods
from ..methods.allocation import ALLOCATIONS
from ..methods.patterns import NofM, Structured, Unstructured
from ..recipe.recipe import Recipe, window_length
from ..report.record import checked
from . import ranks, tables
from .answering import (
    LOOK,
    START,
    Compute,
    Device,
    Json,
    Length,
    Memory,
    Quiet,
    Tokenizer,
    answering,
    app,
    argument,
    as_text,
    field,
    loaded,
    option,
    print_json,
    tell,
)
from .choosing import refuse_file

Models = Annotated[
    list[str], argument(metavar="MODEL", help="Models. The others are compared with the first.")
]
TEXT_HELP = str(Recipe.model_fields["data"].description).replace("Calibration", "Evaluation")
Text = Annotated[str | None, option(help=f"{TEXT_HELP} [default: stdlib]")]
Limit = Annotated[
    int | None,
    option(
        min=1, help="Use at most this many windows, evenly spaced; with --tasks, this many documents of each."
    ),
]
Tasks = Annotated[
    str | None, option(help="Zero-shot tasks of lm-evaluation-harness instead: piqa,arc_easy,...")
]
IncludePath = Annotated[Path | None, option(help="A directory of task files (YAML) for --tasks.")]
Document = Annotated[
    Path | None, option("--out", "-o", help="Also write the JSON document to this file.", show_default=False)
]
Expected = Annotated[
    list[str] | None,
    option(
        "--sha256",
        metavar="FILE=SHA256",
        help="Refuse MODEL where FILE has another SHA-256; may be given several times.",
    ),
]


@app.command(name="eval", rich_help_panel=LOOK)
def evaluate(
    models: Models,
    data: Text = None,
    column: Annotated[str | None, field("column")] = None,
    length: Length = None,
    compute: Compute = None,
    limit: Limit = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    tokenizer: Tokenizer = None,
    memory: Memory = None,
    device: Device = "auto",
    out: Document = None,
    force: Annotated[
        bool, option("--force", help="Replace an existing --out.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and bits per byte, or zero-shot tasks, of one or several models."""
    perplexities, zero_shots = {}, {}
    with answering(quiet, out, events=as_json, shares=tasks is None) as progress:
        from ..checkpoint.atomic import write_text
        from ..evaluation import comparison
        from ..evaluation.tasks import zero_shot

        if out is not None:
            refuse_file(out, force)

        of_text = {"--data": data, "--column": column, "--length": length, "--compute": compute}
        none = {"--include-path": include_path} if tasks is None else of_text
        if tasks is not None and device not in ("auto", "cpu"):
            raise ValueError(f"--device {device} cannot be used with --tasks; leave it out")
        if given := [option for option, value in none.items() if value is not None]:
            raise ValueError(f"{given[0]} has no effect with{'out' if tasks is None else ''} --tasks")
        for model in models:
            progress.say(f"model {model}")
            where = device if tasks is None else "cpu"
            checkpoint = loaded(model, tokenizer, memory, progress, device=where)
            options: dict[str, Any] = {"limit": limit, "progress": progress}
            if tasks is not None:
                zero_shots[model] = zero_shot(
                    checkpoint, tasks.split(","), include_path=include_path, **options
                )
            else:
                length = length or window_length(checkpoint.trained_length)
                options |= {"length": length, "column": column, "compute": compute or "auto"}
                perplexities[model] = sparsessm.evaluate(checkpoint, data or "stdlib", **options)
        result = comparison.tasks(zero_shots) if zero_shots else comparison.perplexities(perplexities)
        if out is not None and ranks.number() == 0:
            write_text(out, as_text(result.document) + "\n")
    if as_json:
        print_json(result.document)
    elif not quiet:
        tables.show(tables.table(result.title, result.columns, result.cells, result.words), *result.notes)
        if out is not None:
            tables.show(f"Saved to {out}.")


@app.command(rich_help_panel=LOOK)
def inspect(
    directory: Annotated[str, argument(metavar="MODEL", help="A result of `prune`, or any model.")],
    sha256: Expected = None,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a result contains: its record, its recipe, and the zeros counted in its tensors."""
    with answering(quiet, events=as_json) as progress:
        from ..checkpoint import at_rest, open_checkpoint
        from ..checkpoint.digests import refuse_others
        from ..checkpoint.given import checked_path
        from ..evaluation.inspection import inspection, inspection_tables

        opened = open_checkpoint(checked_path("source", directory))
        refuse_others(opened.folder.path, sha256 or ())
        found = at_rest(opened, tokenizer)
        tell(found.checkpoint.notes, progress)
        record = checked(opened.record, f"{directory}/pruning.json")
        facts = inspection(found, directory, record)
    if as_json:
        print_json(facts)
    elif not quiet:
        tables.show(*(tables.table(*parts) for parts in inspection_tables(facts)))
        if record is None:
            tables.show("It has no pruning.json: not a result of `sparsessm prune`.")


@app.command(name="list", rich_help_panel=START)
def list_() -> None:
    """List methods, allocations, architectures, patterns and data sets."""
    from ..architectures import MODEL_TYPES

    methods = [
        [row.name, ", ".join(row.families), row.summary, row.paper] for row in entry_methods().values()
    ]
    units = [[row.name, ", ".join(row.axes), row.summary, row.paper] for row in unit_methods().values()]
    texts = [[row.name, row.calibration, row.evaluation, row.summary] for row in DATASETS.values()]
    patterns = [
        [name, str(kind.__doc__).splitlines()[0]]
        for name, kind in (("unstructured", Unstructured), ("N:M", NofM), ("structured:AXIS", Structured))
    ]
    shares = [[row.name, row.summary, row.paper] for row in ALLOCATIONS.values()]
    models = [
        [name, str(kind.__doc__).splitlines()[0], ", ".join(kind.structure)]
        for name, kind in MODEL_TYPES.items()
    ]
    tables.show(
        tables.table("Methods (--method)", ["name", "targets", "summary", "source"], methods, left=4),
        tables.table(
            "Methods for whole units (--method)", ["name", "axes", "summary", "source"], units, left=4
        ),
        tables.table("Allocations (--allocation)", ["name", "summary", "source"], shares, left=3),
        tables.table("Patterns (--pattern)", ["name", "meaning"], patterns, left=2),
        tables.table("Data (--data)", ["name", "calibration", "evaluation", "summary"], texts, left=4),
        tables.table(
            "Architectures (model_type in config.json)", ["name", "meaning", "axes"], models, left=3
        ),
    )
