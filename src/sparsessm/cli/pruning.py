"""Commands that change a model or find out what it tolerates: prune, demo, analyze.

Place in the flow: parses, seeds and prints; the work is behind `sparsessm.*`. Every field of `recipe.Recipe`
is an option of `prune`, with the field's own help text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import sparsessm

from ..data.texts import fingerprint
from ..recipe.recipe import Recipe
from ..report import machine
from ..report.cost import cost_table
from ..report.record import percent, perplexity_table, removed_table
from . import ranks, tables
from .answering import (
    LOOK,
    SMALLER,
    START,
    Device,
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
    takes_recipe,
    tell,
)
from .progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Journal
    from ..report.record import Report

Out = Annotated[Path | None, option("--out", "-o", help="The directory to write.")]
Sparsity = Annotated[float | None, field("sparsity")]
Share = Annotated[
    float | None,
    option(
        "--structured",
        help="Take out whole units (states, channels, heads, blocks) until this share of all parameters is "
        "gone, in the mix that costs least. Short for --pattern structured --sparsity SHARE.",
        show_default=False,
    ),
]
FromFile = Annotated[
    Path | None,
    option("--recipe", help="A recipe (YAML), or a result to repeat. Options beside it replace its fields."),
]
DryRun = Annotated[
    bool,
    option(
        "--dry-run",
        help="Say what would be pruned, how many bytes it is, and how long it takes here; write nothing.",
    ),
]
Resume = Annotated[
    bool,
    option("--resume", help="Go on with a run that was cut short.", rich_help_panel="Output"),
]
NoEval = Annotated[
    bool,
    option("--no-eval", help="Do not measure perplexity before and after.", rich_help_panel="Output"),
]
EXAMPLES = """Examples:

  sparsessm prune builtin:pycode -o out

  sparsessm prune state-spaces/mamba-130m-hf -o out --sparsity 0.6 --data wikitext2

  sparsessm prune builtin:pycode -o out --pattern 2:4

  sparsessm prune builtin:pycode -o out --structured 0.25

  sparsessm prune --recipe recipe.yaml --dry-run"""


@app.command(rich_help_panel=SMALLER, epilog=EXAMPLES)
@takes_recipe(but=("model", "rules", "sparsity"))
def prune(
    model: Annotated[
        str | None, argument(metavar="MODEL", help=str(Recipe.model_fields["model"].description))
    ] = None,
    out: Out = None,
    sparsity: Sparsity = None,
    structured: Share = None,
    recipe: FromFile = None,
    dry_run: DryRun = False,
    memory: Memory = None,
    device: Device = "auto",
    resume: Resume = False,
    force: Force = False,
    no_eval: NoEval = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Remove weights from MODEL, measure what it costs, and write the result.

    The result is a checkpoint that transformers loads, or a packed directory where it cannot hold the result.
    """
    if out is None and not dry_run:
        raise typer.BadParameter(
            "missing; name the directory to write, or --dry-run", param_hint="--out / -o"
        )
    given |= {name: value for name, value in (("model", model), ("sparsity", sparsity)) if value is not None}
    from ..checkpoint import folder_of, unfinished

    target = None if dry_run else out
    kept = target and folder_of(target)
    with answering(quiet, target, kept=kept, events=as_json) as progress:
        wanted = _wanted(given, structured, recipe, out, force)
        report = cost = None
        if target is None:
            run = _planned(wanted, memory, device, None, progress)
            found = run.forecast(measure=not no_eval)
            cost = found and asdict(found)
        else:
            with unfinished(target, resume=resume, force=force) as journal:
                run = _planned(wanted, memory, device, journal, progress)
                report = _pruned(run, target, recipe, not no_eval, force, journal, progress)
    if report is None:
        _show_preview(run, cost, as_json, quiet)
    elif as_json:
        print_json({"out": str(out), **report.record()})
    elif not quiet:
        _show(report, out)


def _wanted(
    given: dict[str, Any], structured: float | None, recipe: Path | None, out: Path | None, force: bool
) -> Recipe:
    """What was asked for.

    Args:
        given: fields of the recipe, from the command line. recipe: the file that they replace fields of.
    """
    from ..checkpoint import refuse_existing

    if structured is not None:
        if clash := [name for name in ("pattern", "sparsity") if name in given]:
            raise ValueError(
                f"--structured already sets the pattern and the sparsity; leave out --{clash[0]}"
            )
        given |= {"pattern": "structured", "sparsity": structured}
    wanted = (Recipe.load(recipe) if recipe else Recipe()).updated(**given)
    if wanted.model is None:
        raise ValueError("no model was given; name one on the command line or in the recipe")
    if out is not None:
        refuse_existing(out, force, wanted.model)
    return wanted


def _planned(
    recipe: Recipe, memory: str | None, device: str, journal: Journal | None, progress: Progress
) -> sparsessm.Run:
    """The model is opened and the recipe fits it."""
    folder = journal and journal.folder
    checkpoint = loaded(str(recipe.model), recipe.tokenizer, memory, progress, folder, device)
    if journal is not None:
        journal.holds(checkpoint.residence)
    return sparsessm.Run(checkpoint, recipe, progress=progress, say=progress.say, journal=journal)


def _pruned(
    run: sparsessm.Run,
    out: Path,
    recipe: Path | None,
    measure: bool,
    force: bool,
    journal: Journal,
    progress: Progress,
) -> Report:
    """Prune, measure and save.

    Args:
        out: where the result goes. recipe: the file that the run's recipe came from, if it did.
    """
    from ..checkpoint import refuse_full
    from ..checkpoint.at_rest import left_out
    from ..checkpoint.container import PACKED

    share = run.plan.share_left(run.architecture)
    refuse_full(out, run.checkpoint, share)
    if journal.resumed:
        progress.note(f"going on in {journal.folder}")
        now = {**machine.current(), **machine.versions()}
        if other := machine.differences(journal.before.get("machine", {}), now):
            progress.note(f"note: it was begun with {', '.join(other)}; masks may differ")
    torch.manual_seed(run.recipe.seed)
    tokens = run.windows()
    states = 0 if tokens is None else tokens.numel() * run.checkpoint.model.config.hidden_size
    refuse_full(out, run.checkpoint, share, journal.room(states, run.plan.working(run.architecture)))
    if run.advice:
        progress.note(f"calibrating on {run.recipe.samples} windows")
    if recipe and tokens is not None:  # what looks at no data gives the same masks everywhere
        for note in _differences(run.recipe, recipe, tokens):
            progress.note(f"note: {note}; masks may differ")
    report = run.prune(tokens, measure=measure)
    if run.architecture.ranks.first:
        run.save(out, force=force)
        if (out / PACKED).is_file():
            tell(left_out(run.checkpoint.extra), progress)
    journal.clear()
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


def _show_preview(run: sparsessm.Run, cost: dict[str, Any] | None, as_json: bool, quiet: bool) -> None:
    """What a run would do and take."""
    preview = run.plan.preview(run.architecture)
    if as_json:
        print_json({"recipe": run.recipe.model_dump(), **preview.record, "cost": cost})
    elif not quiet:
        tables.show(*(tables.table(*parts) for parts in preview.tables))
        if cost is not None:
            tables.show(tables.table(*cost_table(cost)), *cost["faster"])
        tables.show("A dry run: nothing was read but the model, nothing was written.")


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


@app.command(rich_help_panel=START)
def demo(
    out: Annotated[
        Path, option("--out", "-o", help="The directory to write. The result of an earlier demo is replaced.")
    ] = (Path("demo-out")),
    sparsity: Annotated[float, option("--sparsity", help="Share removed.")] = 0.5,
    samples: Annotated[int, option("--samples", min=1, help="Number of calibration windows.")] = 32,
    seed: Annotated[int, option("--seed", min=0, help="Seed of everything drawn.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the built-in model smaller in several ways, compare them on held-out text, and run a result."""
    from . import demonstration as demos

    packs = (demos.packed_folder(out, kind) for kind in demos.FOLDERS)
    with answering(quiet, out, *packs, events=as_json) as progress:
        from ..checkpoint import read_record, refuse_existing

        record = read_record(out) if out.is_dir() else None
        former = record is not None and "methods" in (record.get("perplexity") or {})
        refuse_existing(out, former, demos.MODEL)
        for kind in demos.FOLDERS:
            refuse_existing(demos.packed_folder(out, kind), former, demos.MODEL)
        demos.refuse_full(out)
        torch.manual_seed(seed)
        done = demos.compare(progress, sparsity=sparsity, samples=samples, seed=seed)
        packed, text = demos.run(progress, out, done, force=former)
    if as_json:
        document = {"out": str(out), "saved": demos.SAVED, **done.report.record()}
        print_json({**document, "packed": packed, "text": text})
    elif not quiet:
        pruned = {name: run["pruned"] for name, run in done.measured.items()}
        changes = {name: run["difference"] for name, run in done.measured.items()}
        show_perplexities({"dense": done.dense.record(), **pruned}, changes)
        tables.show(
            f"removed: {percent(sparsity)} of all linear layers, and of A_log (by exact). bits: stored for a "
            "weight, of all matrices, the embedding too.",
            done.report.honesty(),
            f"The model of '{demos.SAVED}' is saved to {out}: a stock checkpoint.",
            f"That of '{demos.SMALL}' is {demos.packed_folder(out, 'small')}: `sparsessm unpack` makes a "
            "stock checkpoint of it.",
        )
        tables.show(tables.table(*demos.packed_table(packed), left=1))
        tables.show(
            "Its weights fit into the processor's cache, so fewer bytes save little time.",
            f"{demos.packed_folder(out, 'small')} goes on from {demos.PROMPT!r}:",
            text,
            demos.beside_dense(packed[-1]),
        )


@app.command(rich_help_panel=LOOK)
def analyze(
    model: Annotated[str, argument(metavar="MODEL", help=str(Recipe.model_fields["model"].description))],
    out: Annotated[
        Path | None, option("--out", "-o", help="Directory for analysis.json and the heat map (a PNG).")
    ] = None,
    sparsities: Annotated[
        str, option("--sparsities", help="Shares to remove from each matrix, one matrix at a time.")
    ] = "0.3,0.5,0.7",
    price: Annotated[str | None, field("price")] = None,
    data: Annotated[str, field("data")] = "stdlib",
    column: Annotated[str | None, field("column")] = None,
    samples: Annotated[int, option("--samples", min=1, help="Number of calibration windows.")] = 16,
    windows: Annotated[int, option("--windows", min=1, help="Number of held-out windows.")] = 8,
    length: Length = None,
    compute: Annotated[
        str,
        option(
            "--compute",
            help="Precision of products: float32, bfloat16 or auto. What is compared here may differ by less "
            "than bfloat16 rounds.",
        ),
    ] = "float32",
    seed: Annotated[int, field("seed")] = 0,
    tokenizer: Tokenizer = None,
    memory: Memory = None,
    device: Device = "auto",
    force: Annotated[bool, option("--force", help="Replace another analysis in --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find out which matrices of MODEL tolerate pruning: prune each alone and compare the predictions."""
    from ..studies import findings, tolerance

    with answering(quiet, out and out / tolerance.FILE, grown=True, events=as_json) as progress:
        from ..checkpoint import refuse_target

        if out is not None:
            findings.refuse_without_matplotlib()
            refuse_target(out, replaced=False)
            if (picture := out / findings.PICTURE).is_dir():
                raise ValueError(f"{str(picture)!r} is a directory; the picture cannot be written there")
        shares = tolerance.parse_sparsities(sparsities)
        checkpoint = loaded(model, tokenizer, memory, progress, device=device)
        options: dict[str, Any] = {"data": data, "column": column, "samples": samples, "windows": windows}
        options |= {"length": length, "compute": compute, "price": price, "seed": seed}
        options |= {"out": out, "force": force, "progress": progress}
        found = tolerance.analyze(checkpoint, sparsities=shares, **options)
        told = findings.summary(found)
        if out is not None and ranks.number() == 0:
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
