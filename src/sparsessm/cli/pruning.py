"""Commands that change a model or find out what it tolerates: prune, demo, analyze.

Place in the flow: parses, seeds and prints; the work is behind `sparsessm.*`. Every option that says what is
pruned is a field of `recipe.Recipe`, which gives its help text and default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import sparsessm

from ..data.texts import fingerprint
from ..recipe.recipe import Recipe
from ..report import machine
from ..report.record import percent, perplexity_table, removed_table
from . import tables
from .answering import Force, Json, Length, Quiet, Tokenizer, answering, app, field, print_json, tell

if TYPE_CHECKING:
    from torch import Tensor

    from ..report.record import Report

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what every rule hits and the bytes; read no text, write nothing."),
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity before and after.")]
Structured = Annotated[
    float | None,
    typer.Option(
        help="Take out whole units until this share of all parameters is gone, in the mix of axes that costs "
        "least: short for --pattern structured --sparsity SHARE.",
        show_default=False,
    ),
]
FromFile = Annotated[
    Path | None,
    typer.Option(help="A recipe (YAML), or a result to repeat; options beside it replace its fields."),
]


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=Recipe.model_fields["model"].description)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The directory to write.")] = None,
    sparsity: Annotated[float | None, field("sparsity")] = None,
    target: Annotated[str | None, field("target")] = None,
    ignore: Annotated[list[str] | None, field("ignore")] = None,
    method: Annotated[str | None, field("method")] = None,
    pattern: Annotated[str | None, field("pattern")] = None,
    structured: Structured = None,
    repair: Annotated[str | None, field("repair")] = None,
    price: Annotated[str | None, field("price")] = None,
    allocation: Annotated[str | None, field("allocation")] = None,
    removed: Annotated[str | None, field("removed")] = None,
    diagonal: Annotated[bool | None, field("diagonal", "--diagonal/--no-diagonal")] = None,
    time_weights: Annotated[str | None, field("time_weights")] = None,
    data: Annotated[str | None, field("data")] = None,
    column: Annotated[str | None, field("column")] = None,
    samples: Annotated[str | None, field("samples")] = None,
    length: Annotated[int | None, field("length")] = None,
    seed: Annotated[int | None, field("seed")] = None,
    tokenizer: Annotated[str | None, field("tokenizer")] = None,
    recipe: FromFile = None,
    dry_run: DryRun = False,
    no_eval: NoEval = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL and write the result: a stock checkpoint, or a packed one where none can hold it."""
    if out is None and not dry_run:
        raise typer.BadParameter(
            "missing; name the directory to write, or --dry-run", param_hint="--out / -o"
        )
    options = context.params.items()
    given = {
        name: value for name, value in options if name in Recipe.model_fields and value not in (None, [], ())
    }
    with answering(quiet, None if dry_run else out) as progress:
        run = _planned(given, structured, recipe, out, force, progress)
        report = None if dry_run or out is None else _pruned(run, out, recipe, not no_eval, force, progress)
    if report is None:
        preview = run.plan.preview(run.architecture)
        if as_json:
            print_json({"recipe": run.recipe.model_dump(), **preview.record})
        elif not quiet:
            tables.show(*(tables.table(*parts) for parts in preview.tables))
            tables.show("A dry run: nothing was read but the model, nothing was written.")
    elif as_json:
        print_json({"out": str(out), **report.record()})
    elif not quiet:
        _show(report, out)


def _planned(
    given: dict[str, Any],
    structured: float | None,
    recipe: Path | None,
    out: Path | None,
    force: bool,
    progress: tables.Progress,
) -> sparsessm.Run:
    """The model is loaded and the recipe fits it.

    Args:
        given: fields of the recipe, from the command line. recipe: the file that they replace fields of.
    """
    from ..checkpoint import refuse_existing

    if structured is not None:
        if clash := [name for name in ("pattern", "sparsity") if name in given]:
            raise ValueError(
                f"--structured is --pattern structured --sparsity; give no --{clash[0]} beside it"
            )
        given |= {"pattern": "structured", "sparsity": structured}
    wanted = (Recipe.load(recipe) if recipe else Recipe()).updated(**given)
    if wanted.model is None:
        raise ValueError("no model: name one on the command line or in the recipe")
    if out is not None:
        refuse_existing(out, force, wanted.model)
    checkpoint = sparsessm.load(wanted.model, tokenizer=wanted.tokenizer)
    tell(checkpoint.notes, progress)
    return sparsessm.Run(checkpoint, wanted, progress=progress, say=progress.say)


def _pruned(
    run: sparsessm.Run, out: Path, recipe: Path | None, measure: bool, force: bool, progress: tables.Progress
) -> Report:
    """Prune, measure and save.

    Args:
        out: where the result goes. recipe: the file that the run's recipe came from, if it did.
    """
    from ..checkpoint import refuse_full

    refuse_full(out, run.checkpoint, run.plan.share_left(run.architecture))
    torch.manual_seed(run.recipe.seed)
    tokens = run.windows()
    if run.advice:
        progress.note(f"calibrating on {run.recipe.samples} windows")
    if recipe and tokens is not None:  # what looks at no data gives the same masks everywhere
        for note in _differences(run.recipe, recipe, tokens):
            progress.note(f"note: {note}; masks may differ")
    report = run.prune(tokens, measure=measure)
    sparsessm.save(run.checkpoint, out, report, force=force)
    return report


def _differences(recipe: Recipe, file: Path, tokens: Tensor) -> Iterator[str]:
    """Why a result that is repeated may come out otherwise here: other tokens, another machine."""
    before = Recipe.calibrated_on(file)
    if before not in (None, fingerprint(tokens)):
        why = (reason := recipe.other_text(file)) and f": {reason}"
        yield f"not the calibration tokens of {file} ({before[:12]}...){why}"
    now = {**machine.current(), **machine.versions()}
    if other := machine.differences(Recipe.made_with(file), now):
        yield f"{file} was made with {', '.join(other)}"


def _show(report: Report, out: Path | None) -> None:
    """What was done, as tables."""
    record = report.record()
    if advice := report.advice:
        from ..studies.windows import advice_table

        title = "Calibration windows (samples: auto)"
        tables.show(tables.table(title, *advice_table(advice, record["recipe"]["samples"])))
    table = removed_table(record["targets"], record["totals"])
    tables.show(tables.table("What was removed", *table, left=2))
    if measured := record["perplexity"]:
        records = {name: measured[name] for name in ("dense", "pruned")}
        show_perplexities(records, {"pruned": measured["difference"]})
        tables.show("`sparsessm eval` measures both on all of the text.")
    notes = (report.damped(), report.caveat(), report.honesty())
    tables.show(*filter(None, notes), f"Saved to {out}; pruning took {report.seconds:.0f} s.")


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="For the pruned model; an older demo is replaced.")
    ] = (Path("demo-out")),
    sparsity: Annotated[float, typer.Option(help="Share removed.")] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune the built-in model by the main methods, compare them on held-out text, and run the default's."""
    from . import demonstration as demos

    with answering(quiet, out, *(demos.packed_folder(out, kind) for kind in demos.PACKED)) as progress:
        from ..checkpoint import read_record, refuse_existing

        record = read_record(out) if out.is_dir() else None
        former = record is not None and "methods" in (record.get("perplexity") or {})
        refuse_existing(out, former, demos.MODEL)
        for kind in demos.PACKED:
            refuse_existing(demos.packed_folder(out, kind), former, demos.MODEL)
        demos.refuse_full(out)
        torch.manual_seed(seed)
        done = demos.compare(progress, sparsity=sparsity, samples=samples, seed=seed)
        sparsessm.save(done.checkpoint, out, done.report, force=former)
        packed, text = demos.run(progress, out, done, force=former)
    if as_json:
        document = {"out": str(out), "saved": demos.SAVED, **done.report.record()}
        print_json({**document, "packed": packed, "text": text})
    elif not quiet:
        pruned = {name: run["pruned"] for name, run in done.measured.items()}
        changes = {name: run["difference"] for name, run in done.measured.items()}
        show_perplexities({"dense": done.dense.record(), **pruned}, changes)
        tables.show(
            f"{percent(sparsity)} removed: of A_log alone, or of all linear layers and A_log (by exact).",
            done.report.honesty(),
            f"The model of '{demos.SAVED}' is saved to {out}: a stock checkpoint.",
        )
        tables.show(tables.table(*demos.packed_table(packed), left=1))
        tables.show(
            "Its weights fit into a cache, where bytes are not time; larger models gain more (README).",
            f"{demos.packed_folder(out, 'packed')} goes on from {demos.PROMPT!r}:",
            text,
        )


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help=Recipe.model_fields["model"].description)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="For analysis.json and a PNG.")] = None,
    sparsities: Annotated[str, typer.Option(help="Shares removed, of each matrix alone.")] = "0.3,0.5,0.7",
    price: Annotated[str | None, field("price")] = None,
    data: Annotated[str, field("data")] = "stdlib",
    column: Annotated[str | None, field("column")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 16,
    windows: Annotated[int, typer.Option(min=1, help="Number of held-out windows.")] = 8,
    length: Length = None,
    seed: Annotated[int, field("seed")] = 0,
    tokenizer: Tokenizer = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another analysis in --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which parts of MODEL tolerate how much: every matrix pruned alone, measured on the logits."""
    from ..studies import findings, tolerance

    with answering(quiet, out and out / tolerance.FILE, grown=True) as progress:
        from ..checkpoint import refuse_target

        if out is not None:
            findings.refuse_without_matplotlib()
            refuse_target(out, replaced=False)
            if (picture := out / findings.PICTURE).is_dir():
                raise ValueError(f"{str(picture)!r} is a directory; the picture cannot be written there")
        shares = tolerance.parse_sparsities(sparsities)
        checkpoint = sparsessm.load(model, tokenizer=tokenizer)
        tell(checkpoint.notes, progress)
        options: dict[str, Any] = {"data": data, "column": column, "samples": samples, "windows": windows}
        options |= {"length": length, "price": price, "seed": seed}
        options |= {"out": out, "force": force, "progress": progress}
        found = tolerance.analyze(checkpoint, sparsities=shares, **options)
        told = findings.summary(found)
        if out is not None:
            findings.draw(found, out / findings.PICTURE)
    if as_json:
        print_json({**found.record(), "summary": told})
    elif not quiet:
        panels = findings.maps(found)
        tables.show(tables.heat_maps(panels, findings.bounds(panels), findings.brief))
        tables.show(*(tables.table(*parts) for parts in findings.summary_tables(told)), told["conclusion"])


def show_perplexities(records: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    first = next(iter(records.values()))
    title = f"Perplexity on {first['data']}, {first['windows']} windows of {first['length']} tokens"
    tables.show(tables.table(title, *perplexity_table(records, changes)))
