"""The command line: parses, prints, sets seeds and the environment; everything else is behind `sparsessm.*`.

Place in the flow: the outermost layer. Results go to stdout, progress and errors to stderr. Exit codes: 0,
1 a mistake of the user (one line `error: ...`), 2 wrong usage, 130 interrupted. Every option that says what
is pruned is a field of `recipe.Recipe`, which gives its help text and default.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
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
from .report import Report, checked, contents, finite, percent, perplexity_table, removed_table

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .evaluation import Perplexity

EVALUATED_TOKENS = 32768  # tokens that `prune` measures on, before and after
DEMO_MODEL = "builtin:pycode"
DEMO_TOKENS = 65536
DEMO_METHODS = ("random", "magnitude", "sparsessm-vote", "sparsessm", "exact")
DEMO_RUNS = {method: {"method": method, "budget": "layer"} for method in DEMO_METHODS} | {
    f"{method}, budget model": {"method": method, "budget": "model"} for method in ("sparsessm", "exact")
}

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
    default = "" if field.default is None else f" [default: {str(field.default).lower()}]"
    return typer.Option(*flags, help=f"{field.description}{default}", show_default=False)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and the JSON, if asked for).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing directory.")]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity before and after.")]
FromFile = Annotated[
    Path | None,
    typer.Option(help="A recipe (YAML), or a result to repeat; options beside it replace its fields."),
]
Models = Annotated[list[str], typer.Argument(help="Models; all others are compared with the first.")]
Text = Annotated[
    str, typer.Option(help=str(Recipe.model_fields["data"].description).replace("Calibration", "Evaluation"))
]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window [default: 2048, or the model's own].")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use only so many windows, evenly spaced over the text.")
]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sparsessm {sparsessm.__version__} (kernels: {kernels.LEVEL})")
        raise typer.Exit


@app.command()
def prune(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write.")],
    model: Annotated[str | None, typer.Argument(help=Recipe.model_fields["model"].description)] = None,
    sparsity: Annotated[float | None, _field("sparsity")] = None,
    method: Annotated[str | None, _field("method")] = None,
    target: Annotated[str | None, _field("target")] = None,
    removed: Annotated[str | None, _field("removed")] = None,
    pattern: Annotated[str | None, _field("pattern")] = None,
    budget: Annotated[str | None, _field("budget")] = None,
    diagonal: Annotated[bool | None, _field("diagonal", "--diagonal/--no-diagonal")] = None,
    time_weights: Annotated[str | None, _field("time_weights")] = None,
    data: Annotated[str | None, _field("data")] = None,
    samples: Annotated[int | None, _field("samples")] = None,
    length: Annotated[int | None, _field("length")] = None,
    seed: Annotated[int | None, _field("seed")] = None,
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    recipe: FromFile = None,
    no_eval: NoEval = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL and write the result, a stock checkpoint, to a directory."""
    options = context.params.items()
    given = {name: value for name, value in options if name in Recipe.model_fields and value is not None}
    with _answering(quiet) as progress:
        from .checkpoint import refuse_existing

        wanted = (Recipe.load(recipe) if recipe else Recipe()).updated(**given)
        if wanted.model is None:
            raise ValueError("no model: name one on the command line or in the recipe")
        refuse_existing(out, force, wanted.model)
        checkpoint = sparsessm.load(wanted.model, tokenizer=wanted.tokenizer)
        wanted = sparsessm.resolve(checkpoint, wanted)
        torch.manual_seed(wanted.seed)
        progress.say(f"reading {wanted.data}")
        tokens = sparsessm.draw(checkpoint, wanted)
        if (
            recipe
            and tokens is not None
            and (before := Recipe.calibrated_on(recipe)) not in (None, fingerprint(tokens))
        ):
            progress.say(f"note: not the calibration tokens of {recipe} ({before[:12]}...); masks may differ")
        measure = None if no_eval else _measure(checkpoint, wanted, EVALUATED_TOKENS, progress)
        dense = measure(checkpoint, "dense model") if measure else None
        progress.say(f"pruning by {wanted.method}")
        report = sparsessm.follow(checkpoint, wanted, tokens, progress)
        if measure and dense:
            report.perplexity = _compared(dense, measure(checkpoint, "pruned model"))
        sparsessm.save(checkpoint, out, report, force=force)
    record = report.record()
    if as_json:
        _print_json({"out": str(out), **record})
    elif not quiet:
        title = f"Removed by {wanted.method}, {wanted.pattern}, {wanted.removed}"
        tables.show(tables.table(title, *removed_table(record["targets"], record["totals"])))
        if measured := record["perplexity"]:
            records = {name: measured[name] for name in ("dense", "pruned")}
            _show_perplexities(records, {"pruned": measured["difference"]})
        if report.caveat():
            tables.show(report.caveat())
        tables.show(report.honesty(), f"Saved to {out}; pruning took {report.seconds:.0f} s.")


@app.command(name="eval")
def evaluate(
    models: Models,
    data: Text = "stdlib",
    length: Length = None,
    limit: Limit = None,
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and bits per byte; with two or more models, the paired change against the first."""
    measured, changes, others = {}, {}, []
    with _answering(quiet) as progress:
        from .evaluation import difference

        for model in models:
            progress.say(f"model {model}")
            checkpoint = sparsessm.load(model, tokenizer=tokenizer)
            length = length or window_length(checkpoint.trained_length)
            measured[model] = sparsessm.evaluate(
                checkpoint, data, length=length, limit=limit, progress=progress
            )
            if measured[model].fingerprint != measured[models[0]].fingerprint:
                others.append(model)
            elif model != models[0]:
                changes[model] = asdict(difference(measured[models[0]], measured[model]))
    records = {model: perplexity.record() for model, perplexity in measured.items()}
    if as_json:
        lines = [
            {"model": model, **record, "change": changes.get(model)} for model, record in records.items()
        ]
        _print_json({"models": lines})
    elif not quiet:
        _show_perplexities(records, changes)
        if others:
            names = f"The tokenizer of {', '.join(others)} cuts the text otherwise than that of {models[0]}"
            tables.show(f"{names}: the perplexities do not compare, bits per byte do.")


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A result of `prune`, or any model.")],
    tokenizer: Annotated[str | None, _field("tokenizer")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is in a result: its record, and what its tensors themselves say."""
    with _answering(quiet):
        from .architectures import REMOVED_A_LOG
        from .checkpoint import read_record

        checkpoint = sparsessm.load(directory, tokenizer=tokenizer)
        record = checked(read_record(directory), f"{directory}/pruning.json")
        tensors = checkpoint.model.state_dict()
        kinds = contents(tensors, checkpoint.stored)
        dtypes = {
            kind: sorted(str(dtype).removeprefix("torch.") for dtype in kinds[kind][1]) for kind in kinds
        }
        rows = record["targets"] if record else []
        if unknown := [row["target"] for row in rows if row["target"] not in tensors]:
            raise ValueError(f"{directory}/pruning.json: the model has no {unknown[0]}")
        found = {
            row["target"]: int((tensors[row["target"]] == REMOVED_A_LOG[row["removed"]]).sum())
            for row in rows
        }
        for row in rows:
            # There may be more: of an earlier pruning, and `unit` stores 0, as do models near their start.
            if found[row["target"]] < row["pruned"]:
                count = f"{row['pruned']} removed entries, its tensor has {found[row['target']]}"
                raise ValueError(
                    f"pruning.json does not fit the tensors: it says that {row['target']} has {count}"
                )
    if as_json:
        sizes = {kind: {"bytes": kinds[kind][0], "dtypes": dtypes[kind]} for kind in kinds}
        facts = {"model": directory, "format": checkpoint.format, "tensors": sizes, "removed": found}
        _print_json({**facts, "record": record})
    elif not quiet:
        total = sum(size for size, _ in kinds.values())
        title = f"{directory}: format {checkpoint.format}, {total:,} bytes of tensors"
        cells = [
            [kind, ", ".join(dtypes[kind]), f"{n:,}", percent(n / total)] for kind, (n, _) in kinds.items()
        ]
        tables.show(tables.table(title, ["tensors", "dtype", "bytes", "share"], cells, left=2))
        if record is None:
            tables.show("It has no pruning.json: not a result of `sparsessm prune`.")
            return
        title = "What was removed (counted again in the tensors)"
        tables.show(tables.table(title, *removed_table(rows, record["totals"])))
        recipe = [[name, str(value)] for name, value in record["recipe"].items()]
        tables.show(tables.table("Recipe", ["field", "value"], recipe, left=2))


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
        Path, typer.Option("--out", "-o", help="For the best result; an older demo is replaced.")
    ] = (Path("demo-out")),
    sparsity: Annotated[float, typer.Option(help="Share of A_log removed.")] = 0.5,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration windows.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune the built-in model by every method, compare them on held-out text, and save the best."""
    with _answering(quiet) as progress:
        from .checkpoint import read_record, refuse_existing
        from .pipeline import needs_data

        record = read_record(out) if out.is_dir() else None
        former = record is not None and "methods" in (record.get("perplexity") or {})
        refuse_existing(out, former, DEMO_MODEL)
        torch.manual_seed(seed)
        checkpoint = sparsessm.load(DEMO_MODEL)
        options: dict[str, Any] = {"sparsity": sparsity, "samples": samples, "seed": seed}
        recipes = {name: sparsessm.resolve(checkpoint, **run, **options) for name, run in DEMO_RUNS.items()}
        progress.say("reading the standard library")
        every = list(recipes.values())
        tokens = sparsessm.draw(checkpoint, next(filter(needs_data, every), every[0]))  # the same for all
        measure = _measure(checkpoint, every[0], DEMO_TOKENS, progress)
        dense = measure(checkpoint, "dense model")
        runs: dict[str, tuple[Checkpoint, Report]] = {}
        for name, recipe in recipes.items():
            checkpoint = sparsessm.load(DEMO_MODEL)
            progress.say(f"pruning by {name}")
            report = sparsessm.follow(checkpoint, recipe, tokens if needs_data(recipe) else None, progress)
            report.perplexity = _compared(dense, measure(checkpoint, f"pruned by {name}"))
            runs[name] = checkpoint, report
        measured = {name: report.perplexity for name, (_, report) in runs.items()}
        best = min(measured, key=lambda name: measured[name]["pruned"]["nll"])
        checkpoint, report = runs[best]
        report.perplexity = {
            **measured[best],
            "methods": {
                name: {part: measured[name][part] for part in ("pruned", "difference")} for name in measured
            },
        }
        sparsessm.save(checkpoint, out, report, force=former)
    if as_json:
        _print_json({"out": str(out), "best": best, **report.record()})
    elif not quiet:
        records = {"dense": dense.record(), **{name: measured[name]["pruned"] for name in measured}}
        _show_perplexities(records, {name: measured[name]["difference"] for name in measured})
        tables.show(
            f"{percent(sparsity)} of the entries of A_log removed: the same share in every layer or, with "
            "budget model (the default of prune), the cheapest of all layers together."
        )
        tables.show(report.honesty())
        tables.show(f"The best, {best}, is saved to {out}: a stock checkpoint.")


@contextmanager
def _answering(quiet: bool) -> Iterator[tables.Progress]:
    """Run a command's work; a user's mistake ends in one line and exit code 1, Ctrl-C in 130."""
    try:
        with tables.Progress(quiet) as progress:
            if not kernels.NATIVE:
                progress.note("note: the native kernels are not installed; the slow reference is used")
            yield progress
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def _measure(
    checkpoint: Checkpoint, recipe: Recipe, tokens: int, progress: tables.Progress
) -> Callable[[Checkpoint, str], Perplexity]:
    """How to measure a model on about so many tokens of the recipe's data, always the same ones.

    They are held out, unless the data is a local file; `Report.caveat` says so then.
    """
    from .data import evaluation_windows
    from .evaluation import perplexity

    length = recipe.length or window_length(checkpoint.trained_length)
    limit = max(1, tokens // length)
    windows, n_bytes = evaluation_windows(recipe.data, checkpoint.tokenizer, length=length, limit=limit)

    def measure(checkpoint: Checkpoint, title: str) -> Perplexity:
        progress.say(title)
        return perplexity(checkpoint.model, windows, n_bytes, data=recipe.data, progress=progress)

    return measure


def _compared(dense: Perplexity, pruned: Perplexity) -> dict[str, Any]:
    """What a report says about perplexity: both measurements and their paired difference."""
    from .evaluation import difference

    return {
        "dense": dense.record(),
        "pruned": pruned.record(),
        "difference": asdict(difference(dense, pruned)),
    }


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up like Ctrl-C
    app()


if __name__ == "__main__":
    main()
