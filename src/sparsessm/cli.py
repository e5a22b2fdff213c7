"""The command line: parses, prints, sets seeds and the environment; everything else is behind `sparsessm.*`.

Place in the flow: the outermost layer. Results go to stdout, progress and errors to stderr. Exit codes: 0,
1 a mistake of the user (one line `error: ...`), 2 wrong usage, 130 interrupted. Every option that says what
is pruned is a field of `recipe.Recipe`, which gives its help text and default.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import sparsessm

from . import kernels, tables
from .data import DATASETS, fingerprint
from .methods import METHODS
from .patterns import NofM, Unstructured
from .recipe import Recipe, window_length
from .report import checked, finite, percent, perplexity_table, removed_table

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .plan import Plan

EVALUATED_TOKENS = 32768  # tokens that `prune` measures on, before and after

app = typer.Typer(
    name="sparsessm",
    help="One-shot pruning of state space language models: a dense Mamba goes in, a pruned one comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _field(name: str, *flags: str) -> Any:
    """The option of a recipe field. Its default is None (not given): it must not override a recipe file."""
    field = Recipe.model_fields[name]
    default = f" [default: {str(field.default).lower()}]" if field.default not in (None, ()) else ""
    return typer.Option(*flags, help=f"{field.description}{default}", show_default=False)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and the JSON, if asked for).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing directory.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what every rule hits and the bytes; read no text, write nothing."),
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity before and after.")]
FromFile = Annotated[
    Path | None,
    typer.Option(help="A recipe (YAML), or a result to repeat; options beside it replace its fields."),
]
Models = Annotated[list[str], typer.Argument(help="Models; all others are compared with the first.")]
TEXT_HELP = str(Recipe.model_fields["data"].description).replace("Calibration", "Evaluation")
Text = Annotated[str | None, typer.Option(help=f"{TEXT_HELP} [default: stdlib]")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window [default: 2048, or the model's own].")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="So many windows, evenly spaced; of --tasks the first documents.")
]
Tasks = Annotated[
    str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness instead: piqa,arc_easy,...")
]
IncludePath = Annotated[Path | None, typer.Option(help="A directory of task files (YAML) for --tasks.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sparsessm {sparsessm.__version__} (kernels: {kernels.LEVEL})")
        raise typer.Exit


@app.command()
def prune(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=Recipe.model_fields["model"].description)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The directory to write.")] = None,
    sparsity: Annotated[float | None, _field("sparsity")] = None,
    target: Annotated[str | None, _field("target")] = None,
    ignore: Annotated[list[str] | None, _field("ignore")] = None,
    method: Annotated[str | None, _field("method")] = None,
    pattern: Annotated[str | None, _field("pattern")] = None,
    repair: Annotated[str | None, _field("repair")] = None,
    weight: Annotated[str | None, _field("weight")] = None,
    allocation: Annotated[str | None, _field("allocation")] = None,
    removed: Annotated[str | None, _field("removed")] = None,
    diagonal: Annotated[bool | None, _field("diagonal", "--diagonal/--no-diagonal")] = None,
    time_weights: Annotated[str | None, _field("time_weights")] = None,
    data: Annotated[str | None, _field("data")] = None,
    samples: Annotated[str | None, _field("samples")] = None,
    length: Annotated[int | None, _field("length")] = None,
    seed: Annotated[int | None, _field("seed")] = None,
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    recipe: FromFile = None,
    dry_run: DryRun = False,
    no_eval: NoEval = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL and write the result, a stock checkpoint, to a directory."""
    if out is None and not dry_run:
        raise typer.BadParameter(
            "missing; name the directory to write, or --dry-run", param_hint="--out / -o"
        )
    options = context.params.items()
    given = {
        name: value for name, value in options if name in Recipe.model_fields and value not in (None, [], ())
    }
    with _answering(quiet) as progress:
        from .checkpoint import refuse_existing
        from .yardstick import Yardstick, compared

        wanted = (Recipe.load(recipe) if recipe else Recipe()).updated(**given)
        if wanted.model is None:
            raise ValueError("no model: name one on the command line or in the recipe")
        if out is not None:
            refuse_existing(out, force, wanted.model)
        checkpoint = sparsessm.load(wanted.model, tokenizer=wanted.tokenizer)
        wanted = sparsessm.resolve(checkpoint, wanted)
        plan = sparsessm.planned(checkpoint, wanted)
        if out is None or dry_run:
            _preview(checkpoint, plan, wanted, as_json, quiet)
            return
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
            progress.say(f"note: not the calibration tokens of {recipe} ({before[:12]}...); masks may differ")
        yardstick = None if no_eval else Yardstick.of(checkpoint, wanted, EVALUATED_TOKENS)
        if yardstick:
            progress.say("dense model")
        dense = yardstick and yardstick.measure(checkpoint, progress)
        progress.say(f"pruning by {' and '.join(plan.methods)}")
        report = sparsessm.follow(checkpoint, wanted, tokens, progress)
        report.advice = advice
        if yardstick and dense:
            progress.say("pruned model")
            report.perplexity = compared(dense, yardstick.measure(checkpoint, progress))
        sparsessm.save(checkpoint, out, report, force=force)
    record = report.record()
    if as_json:
        _print_json({"out": str(out), **record})
    elif not quiet:
        if advice:
            from .advice import advice_table

            title = "Calibration windows (samples: auto)"
            tables.show(tables.table(title, *advice_table(advice, record["recipe"]["samples"])))
        table = removed_table(record["targets"], record["totals"])
        tables.show(tables.table("What was removed", *table, left=2))
        if measured := record["perplexity"]:
            records = {name: measured[name] for name in ("dense", "pruned")}
            _show_perplexities(records, {"pruned": measured["difference"]})
        notes = (report.damped(), report.caveat(), report.honesty())
        tables.show(*filter(None, notes), f"Saved to {out}; pruning took {report.seconds:.0f} s.")


def _preview(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, as_json: bool, quiet: bool) -> None:
    """What `prune --dry-run` answers."""
    from .inventory import preview, preview_tables

    record = preview(plan, checkpoint.model.state_dict(), checkpoint.stored)
    if as_json:
        _print_json({"recipe": recipe.model_dump(), **record})
    elif not quiet:
        tables.show(*(tables.table(*parts) for parts in preview_tables(checkpoint.source, record)))
        tables.show("A dry run: nothing was read but the model, nothing was written.")


@app.command(name="eval")
def evaluate(
    models: Models,
    data: Text = None,
    length: Length = None,
    limit: Limit = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and bits per byte, or zero-shot tasks; models after the first with their change."""
    perplexities, zero_shots = {}, {}
    with _answering(quiet) as progress:
        from . import scores
        from .zero_shot import zero_shot

        none = {"--include-path": include_path} if tasks is None else {"--data": data, "--length": length}
        if given := [option for option, value in none.items() if value is not None]:
            raise ValueError(f"{given[0]} has no effect with{'out' if tasks is None else ''} --tasks")
        for model in models:
            progress.say(f"model {model}")
            checkpoint = sparsessm.load(model, tokenizer=tokenizer)
            options: dict[str, Any] = {"limit": limit, "progress": progress}
            if tasks is not None:
                zero_shots[model] = zero_shot(
                    checkpoint, tasks.split(","), include_path=include_path, **options
                )
            else:
                length = length or window_length(checkpoint.trained_length)
                perplexities[model] = sparsessm.evaluate(
                    checkpoint, data or "stdlib", length=length, **options
                )
        result = scores.tasks(zero_shots) if zero_shots else scores.perplexities(perplexities)
    if as_json:
        _print_json(result.document)
    elif not quiet:
        tables.show(tables.table(result.title, result.columns, result.cells, result.words), *result.notes)


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help=Recipe.model_fields["model"].description)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="For analysis.json and a PNG.")] = None,
    sparsities: Annotated[str, typer.Option(help="Shares removed, of each matrix alone.")] = "0.3,0.5,0.7",
    weight: Annotated[str | None, _field("weight")] = None,
    data: Annotated[str, _field("data")] = "stdlib",
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 16,
    windows: Annotated[int, typer.Option(min=1, help="Number of held-out windows.")] = 8,
    length: Length = None,
    seed: Annotated[int, _field("seed")] = 0,
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another analysis in --out.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which parts of MODEL tolerate how much: every matrix pruned alone, measured on the logits."""
    kept = f"what is in {out}/analysis.json is kept, the same command goes on" if out else None
    with _answering(quiet, kept) as progress:
        from . import analysis, findings

        if out is not None:
            findings.refuse_without_matplotlib()
        shares = analysis.parse_sparsities(sparsities)
        checkpoint = sparsessm.load(model, tokenizer=tokenizer)
        options: dict[str, Any] = {"data": data, "samples": samples, "windows": windows, "length": length}
        options |= {"weight": weight, "seed": seed, "out": out, "force": force, "progress": progress}
        found = analysis.analyze(checkpoint, sparsities=shares, **options)
        told = findings.summary(found)
        if out is not None:
            findings.draw(found, out / findings.PICTURE)
    if as_json:
        _print_json({**found.record(), "summary": told})
    elif not quiet:
        panels = findings.maps(found)
        tables.show(tables.heat_maps(panels, findings.bounds(panels), findings.brief))
        tables.show(*(tables.table(*parts) for parts in findings.summary_tables(told)), told["conclusion"])


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A result of `prune`, or any model.")],
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is in a result: its record, and what its tensors themselves say."""
    with _answering(quiet):
        from .checkpoint import read_record
        from .inventory import inspection, inspection_tables

        checkpoint = sparsessm.load(directory, tokenizer=tokenizer)
        record = checked(read_record(directory), f"{directory}/pruning.json")
        facts = inspection(checkpoint, directory, record)
    if as_json:
        _print_json(facts)
    elif not quiet:
        tables.show(*(tables.table(*parts) for parts in inspection_tables(facts)))
        if record is None:
            tables.show("It has no pruning.json: not a result of `sparsessm prune`.")


@app.command(name="list")
def list_() -> None:
    """List the methods, architectures, patterns and data sets."""
    from .architectures import MODEL_TYPES

    methods = [[row.name, ", ".join(row.families), row.summary, row.paper] for row in METHODS.values()]
    texts = [[row.name, row.calibration, row.evaluation, row.summary] for row in DATASETS.values()]
    patterns = [
        [name, str(kind.__doc__).splitlines()[0]]
        for name, kind in (("unstructured", Unstructured), ("N:M", NofM))
    ]
    models = [[name, str(kind.__doc__).splitlines()[0]] for name, kind in MODEL_TYPES.items()]
    tables.show(
        tables.table("Methods (--method)", ["name", "targets", "summary", "source"], methods, left=4),
        tables.table("Patterns (--pattern)", ["name", "meaning"], patterns, left=2),
        tables.table("Data (--data)", ["name", "calibration", "evaluation", "summary"], texts, left=4),
        tables.table("Architectures (model_type in config.json)", ["name", "meaning"], models, left=2),
    )


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
    """Prune the built-in model by the main methods, compare them on held-out text, and save the default's."""
    with _answering(quiet) as progress:
        from . import demo as demos
        from .checkpoint import read_record, refuse_existing

        record = read_record(out) if out.is_dir() else None
        former = record is not None and "methods" in (record.get("perplexity") or {})
        refuse_existing(out, former, demos.MODEL)
        torch.manual_seed(seed)
        done = demos.compare(progress, sparsity=sparsity, samples=samples, seed=seed)
        sparsessm.save(done.checkpoint, out, done.report, force=former)
    if as_json:
        _print_json({"out": str(out), "saved": demos.SAVED, **done.report.record()})
    elif not quiet:
        pruned = {name: run["pruned"] for name, run in done.measured.items()}
        changes = {name: run["difference"] for name, run in done.measured.items()}
        _show_perplexities({"dense": done.dense.record(), **pruned}, changes)
        tables.show(
            f"{percent(sparsity)} removed: of A_log alone, or of all linear layers and A_log (by exact).",
            done.report.honesty(),
            f"The model of '{demos.SAVED}' is saved to {out}: a stock checkpoint.",
        )


@contextmanager
def _answering(quiet: bool, kept: str | None = None) -> Iterator[tables.Progress]:
    """Run a command's work; a user's mistake ends in one line and exit code 1, Ctrl-C in 130.

    Args:
        kept: what to say of an interrupted command that has written something.
    """
    try:
        with tables.Progress(quiet) as progress:
            if not kernels.NATIVE:
                progress.note("note: the native kernels are not installed; the slow reference is used")
            yield progress
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {kept or 'nothing was written'}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _show_perplexities(records: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    first = next(iter(records.values()))
    title = f"Perplexity on {first['data']}, {first['windows']} windows of {first['length']} tokens"
    tables.show(tables.table(title, *perplexity_table(records, changes)))


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(finite(document), indent=2, allow_nan=False))


def main() -> None:
    """The `sparsessm` command."""
    # before transformers is imported: its bars and advice are not ours, and stdout is for results
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGINT, lambda *_: tables.Progress.end(KeyboardInterrupt()))
    signal.signal(signal.SIGTERM, lambda *_: tables.Progress.end(SystemExit(143)))  # cleans up like Ctrl-C
    app()


if __name__ == "__main__":
    main()
