"""The command that compares traffic with the text that a model was pruned for: watch.

Place in the flow: parses and prints; the work is in `studies/traffic.py` and `studies/drift.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.texts import documents
from ..report.record import percent
from . import tables
from .answering import (
    LOOK,
    Force,
    Json,
    Quiet,
    Tokenizer,
    answering,
    app,
    argument,
    field,
    option,
    print_json,
    tell,
)

ALARM = 3  # the exit code
SHADOWED = 64  # prompts that the dense model reads, too


@app.command(rich_help_panel=LOOK)
def watch(
    directory: Annotated[str, argument(metavar="DIR", help="A result of `prune` or `pack`.")],
    data: Annotated[
        str | None,
        option("--data", help="The traffic, a document a prompt; with --learn, the usual text."),
    ] = None,
    column: Annotated[str | None, field("column")] = None,
    learn: Annotated[
        bool,
        option("--learn", help="Write the fingerprint of the usual text [default: that of the recipe]."),
    ] = False,
    against: Annotated[
        str | None, option("--against", help="The dense model: say what pruning costs on this traffic.")
    ] = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare traffic with the text that DIR was pruned for. Exit code 3: it has changed."""
    with answering(quiet, events=as_json) as progress:
        from ..checkpoint import open_checkpoint
        from ..checkpoint.given import checked_path
        from ..runtime import load
        from ..studies import traffic

        opened = open_checkpoint(checked_path("source", directory))
        record, file = opened.record or {}, Path(directory) / traffic.FILE
        usual = data or (record.get("recipe") or {}).get("data")
        if learn and against:
            raise ValueError("--against has no effect with --learn; leave it out")
        if learn and usual is None:
            raise ValueError(f"{directory} has no record that names its text; name one with --data")
        if learn and not Path(directory).is_dir():
            raise ValueError(f"{directory} is no directory; a fingerprint is written into one")
        if learn and file.exists() and not force:
            raise ValueError(f"{str(file)!r} exists; replace it with --force")
        if not learn and data is None:
            raise ValueError("no traffic was given; name it with --data, or learn with --learn")
        progress.say(f"loading {directory}")
        model = load(directory, tokenizer=tokenizer)
        tell(model.notes, progress)
        if learn:
            progress.say(f"reading {usual}")
            found = traffic.learn(model, str(usual), column=column)
            traffic.save(found, file)
            answer: dict[str, Any] = {"fingerprint": str(file), **found.about}
        else:
            answer = _judged(model, file, str(data), column, against, progress)
    if as_json:
        print_json(answer)
    elif not quiet and learn:
        tables.show(f"Saved to {file}: {answer['windows']} windows of {usual}.")
    elif not quiet:
        _show(answer)
    if answer.get("alarm"):
        raise typer.Exit(ALARM)


def _judged(
    model: Any, file: Path, data: str, column: str | None, against: str | None, progress: Any
) -> dict[str, Any]:
    """All prompts of a text, judged; plain values."""
    from ..runtime import load
    from ..studies import traffic

    fingerprint = traffic.load(file, model)
    prompts = list(traffic.pieces(model, documents(data, "evaluation", column)))
    if len(prompts) < traffic.FEWEST:
        least = f"of at least {traffic.SHORTEST} tokens; needed: {traffic.FEWEST}"
        raise ValueError(f"{data} has {len(prompts)} prompts {least}")
    progress.say(f"reading {data}")
    answer = traffic.judged(model, fingerprint, prompts, progress)
    if against is not None:
        progress.say(f"reading it with {against}")
        some = prompts[:: -(-len(prompts) // SHADOWED)]
        answer["cost"] = traffic.cost(model, load(against), some)
    return {"data": data, **answer}


def _show(answer: dict[str, Any]) -> None:
    cells = [
        [str(one["block"]), str(one["blocks"]), str(one["alarms"]), f"{one['largest']:.2f}", one["strangest"]]
        for one in answer["judged"]
    ]
    columns = ["prompts together", "blocks", "alarms", "largest score", "strangest"]
    title = f"{answer['data']}: {answer['prompts']} prompts, against {answer['reference']}"
    tables.show(tables.table(title, columns, cells))
    if cost := answer.get("cost"):
        low, high = percent(cost["low"], "+"), percent(cost["high"], "+")
        tables.show(
            f"On {cost['prompts']} of them pruning costs {percent(cost['increase'], '+')} perplexity "
            f"({low} to {high})."
        )
    tables.show(
        "Alarm: the traffic differs from the text of the fingerprint (score above 1); docs/guidance.md says "
        "what to do."
        if answer["alarm"]
        else "No alarm: the traffic looks like the text of the fingerprint."
    )
