"""Commands that change a model or find out what it tolerates: prune, demo, analyze.

Place in the flow: parses, seeds and prints; the work is behind `sparsessm.*`. Every option that says what is
pruned is a field of `recipe.Recipe`, which gives its help text and default.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    from ..checkpoint import Checkpoint
    from ..recipe.plan import Plan
    from ..recipe.units import Order
    from ..report.record import Report

EVALUATED_WINDOWS = 16  # that `prune` measures on, before and after: as few as an interval needs

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
        wanted = sparsessm.resolve(checkpoint, wanted)
        plan = sparsessm.planned(checkpoint, wanted)
        report = None
        if out is not None and not dry_run:
            report = _pruned(checkpoint, plan, wanted, out, recipe, no_eval, progress)
            sparsessm.save(checkpoint, out, report, force=force)
    if report is None:
        _preview(checkpoint, plan, wanted, as_json, quiet)
        return
    record = report.record()
    if as_json:
        print_json({"out": str(out), **record})
    elif not quiet:
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


def _pruned(
    checkpoint: Checkpoint,
    plan: Plan | Order,
    wanted: Recipe,
    out: Path,
    recipe: Path | None,
    no_eval: bool,
    progress: tables.Progress,
) -> Report:
    """Prune the model in memory and measure it before and after.

    Args:
        out: where the result will go. recipe: the file that `wanted` came from, if it did.
    """
    from ..architectures import adapt
    from ..checkpoint import refuse_full
    from ..evaluation.before_after import Yardstick, compared
    from ..pruning.preview import share_left

    refuse_full(out, checkpoint, share_left(plan, adapt(checkpoint.model, checkpoint.stored)))
    torch.manual_seed(wanted.seed)
    progress.say(f"reading {wanted.data}")
    wanted, tokens, advice = sparsessm.settle(checkpoint, wanted, progress)
    if advice:
        progress.note(f"calibrating on {wanted.samples} windows")
    if (
        recipe
        and tokens is not None
        and (before := Recipe.calibrated_on(recipe)) not in (None, fingerprint(tokens))
    ):
        why = (reason := wanted.other_text(recipe)) and f": {reason}"
        progress.note(
            f"note: not the calibration tokens of {recipe} ({before[:12]}...){why}; masks may differ"
        )
    if recipe and tokens is not None:  # what looks at no data gives the same masks everywhere
        now = {**machine.current(), **machine.versions()}
        if other := machine.differences(Recipe.made_with(recipe), now):
            progress.note(f"note: {recipe} was made with {', '.join(other)}; masks may differ")
    yardstick = None if no_eval else Yardstick.of(checkpoint, wanted, EVALUATED_WINDOWS)
    if yardstick:
        progress.say("dense model")
    dense = yardstick and yardstick.measure(checkpoint, progress)
    progress.say(f"pruning by {' and '.join(plan.methods)}")
    report = sparsessm.follow(checkpoint, wanted, tokens, progress)
    report.advice = advice
    if yardstick and dense:
        progress.say("pruned model")
        report.perplexity = compared(dense, yardstick.measure(checkpoint, progress))
    return report


def _preview(checkpoint: Checkpoint, plan: Plan | Order, recipe: Recipe, as_json: bool, quiet: bool) -> None:
    """What `prune --dry-run` answers."""
    from ..architectures import adapt
    from ..pruning.preview import preview, preview_tables, preview_units, preview_units_table
    from ..recipe.units import Order

    if isinstance(plan, Order):
        units = preview_units(plan, adapt(checkpoint.model, checkpoint.stored))
        if as_json:
            print_json({"recipe": recipe.model_dump(), **units})
        elif not quiet:
            tables.show(tables.table(*preview_units_table(checkpoint.source, units)))
            tables.show("A dry run: nothing was read but the model, nothing was written.")
        return
    record = preview(plan, checkpoint.model.state_dict(), checkpoint.stored)
    if as_json:
        print_json({"recipe": recipe.model_dump(), **record})
    elif not quiet:
        tables.show(*(tables.table(*parts) for parts in preview_tables(checkpoint.source, record)))
        tables.show("A dry run: nothing was read but the model, nothing was written.")


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
