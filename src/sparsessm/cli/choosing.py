"""The command that says how many calibration windows are enough: samples.

Place in the flow: parses, seeds and prints; `studies/windows.py` measures the curve and chooses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch

import sparsessm

from ..data.foreign import from_json, read_bytes
from ..recipe.recipe import Recipe
from . import tables
from .answering import (
    LOOK,
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
)


@app.command(rich_help_panel=LOOK)
def samples(
    model: Annotated[str, argument(metavar="MODEL", help=str(Recipe.model_fields["model"].description))],
    out: Annotated[
        Path | None, option("--out", "-o", help="Also write the JSON document to this file.")
    ] = None,
    data: Annotated[str | None, field("data")] = None,
    column: Annotated[str | None, field("column")] = None,
    length: Length = None,
    seed: Annotated[int | None, field("seed")] = None,
    tokenizer: Tokenizer = None,
    memory: Memory = None,
    force: Annotated[
        bool, option("--force", help="Replace an existing --out.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find how many calibration windows are enough to prune half of MODEL; it is not changed."""
    with answering(quiet, out, events=as_json) as progress:
        from ..checkpoint.atomic import write_text
        from ..studies.windows import advice_table

        if out is not None:
            refuse_file(out, force)
        given = {"model": model, "data": data, "column": column, "length": length, "seed": seed}
        given |= {"tokenizer": tokenizer, "samples": "auto"}
        recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
        checkpoint = loaded(model, tokenizer, memory, progress)
        torch.manual_seed(recipe.seed)
        run = sparsessm.Run(checkpoint, recipe, progress=progress, say=progress.say)
        run.windows()
        found = {"model": model, "samples": run.recipe.samples, "curve": run.advice}
        document: dict[str, Any] = {**found, "recipe": run.recipe.model_dump()}
        if out is not None:
            write_text(out, as_text(document) + "\n")
    if as_json:
        print_json(document)
    elif not quiet:
        chosen = int(document["samples"])
        tables.show(tables.table("Calibration windows", *advice_table(run.advice, chosen)))
        tables.show(f"{chosen} windows are enough." + (f" Saved to {out}." if out is not None else ""))


def chosen_in(file: Path) -> int:
    """The number of windows in a document of `samples`.

    Raises:
        ValueError: the file holds something else.
    """
    told = from_json(read_bytes(file))
    found = told.get("samples") if isinstance(told, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{file}: it does not say a number of samples")
    return found


def refuse_file(out: Path, force: bool) -> None:
    """Refuse a file that cannot be written, or is there already.

    Raises:
        ValueError: says what is there.
    """
    from ..checkpoint import refuse_target

    if refuse_target(out).exists() and (out.is_dir() or not force):
        raise ValueError(
            f"{str(out)!r} {'is a directory' if out.is_dir() else 'exists'}; choose another name"
            + ", or replace it with --force" * out.is_file()
        )
