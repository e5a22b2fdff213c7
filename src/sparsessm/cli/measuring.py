"""The command that measures how large and how fast a model is here: bench.

Place in the flow: parses and prints; the work is in `evaluation/speed.py`. Tables are (title, columns, rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..report.record import percent
from . import tables
from .answering import LOOK, Json, Quiet, answering, app, argument, option, print_json, tell

Table = tuple[str, list[str], list[list[str]]]
Record = Mapping[str, Any]

BYTES = {
    "disk": "on disk, weights",
    "disk_all": "on disk, all files",
    "resident": "resident, weights",
    "process_grown": "resident, growth of the process",
    "read_per_step": "read for a step of decoding",
    "state_per_sequence": "state of a sequence",
}


@app.command(rich_help_panel=LOOK)
def bench(
    model: Annotated[str, argument(metavar="MODEL", help="A packed directory, or any model.")],
    against: Annotated[
        str | None, option(metavar="DENSE", help="A model to compare with, such as the dense one.")
    ] = None,
    threads: Annotated[int | None, option(help="Number of threads [default: as many as torch uses].")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure bytes, tokens per second and memory bandwidth of a model, or of two side by side."""
    with answering(quiet, events=as_json) as progress:
        from ..evaluation.speed import measure

        progress.say(f"loading {model}" + (f" and {against}" if against is not None else ""))
        done = measure(model, against, threads=threads, progress=progress)
        for subject in done.subjects:
            tell(subject.notes, progress)
        record = done.record()
    if as_json:
        print_json(record)
    elif not quiet:
        parts = (bytes_table(record), speed_table(record), bandwidth_table(record))
        tables.show(*(tables.table(*part) for part in parts), *record["notes"])


def bytes_table(record: Record) -> Table:
    """How the models are stored, and what that takes."""
    models, ratios = record["models"], record["ratios"]
    rows = [
        [part, *(_stored(model["stored"][part]) for model in models), *([""] if ratios else [])]
        for part in models[0]["stored"]
    ]
    for name, title in BYTES.items():
        sizes = [model["bytes"][name] for model in models]
        cells = ["-" if size is None else f"{size:,}" for size in sizes]
        if ratios:
            ratio = ratios["bytes"].get(name)
            cells.append("-" if ratio is None else f"{ratio:.3f}")
        rows.append([title, *cells])
    if record["process_bytes"] is not None:
        whole = f"{record['process_bytes']:,}"
        rows.append(["resident, this whole process", whole, *([""] * (len(models) - 1 + bool(ratios)))])
    return "Bytes", ["", *(model["model"] for model in models), *(["ratio"] if ratios else [])], rows


def speed_table(record: Record) -> Table:
    """Tokens per second, all sequences of a batch together, and how many times as fast the first model is."""
    models, ratios = record["models"], record["ratios"]
    phases = {f"prompt of {record['prompt_tokens']} tokens": ("prompt",)}
    phases |= {f"decode, batch {batch}": ("decode", batch) for batch in record["rounds"]["decode"]}
    rows = []
    for title, keys in phases.items():
        rounds = _at(record["rounds"], keys)
        speeds = [_at(model["tokens_per_second"], keys) for model in models]
        cells = [f"{speed['median']:,.1f}" if ratios else _spread(speed, ",.1f") for speed in speeds]
        if ratios:
            cells.append(_spread(_at(ratios, keys), ".3f"))
        dropped = f", {rounds['dropped']} dropped" if rounds["dropped"] else ""
        rows.append([title, *cells, f"{rounds['counted']}{', disturbed' * rounds['disturbed']}{dropped}"])
    threads = record["threads"]
    title = f"Tokens/s, {threads} thread{'s' * (threads > 1)}: median (first to third quartile) of the rounds"
    names = [model["model"] for model in models]
    return title, ["", *names, *(["times as fast"] if ratios else []), "rounds"], rows


def bandwidth_table(record: Record) -> Table:
    """What decoding one sequence reads per second, beside what the memory of this machine gives."""
    memory = record["bandwidth"]
    rows = [
        [
            f"decode, batch 1: {model['model']}",
            "-" if (rate := model["gb_per_second"]) is None else f"{rate:.1f}",
        ]
        for model in record["models"]
    ]
    rows.append(["memory, read only", _spread(memory["read"], ".1f")])
    rows.append(["memory, copy (read and written)", _spread(memory["copy"], ".1f")])
    return f"GB/s; memory by buffers of {memory['buffer'] // 2**20} MiB", ["", "GB/s"], rows


def _at(record: Record, keys: tuple[str, ...]) -> Any:
    for key in keys:
        record = record[key]
    return record


def _spread(value: Record, form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _stored(part: Record) -> str:
    """How matrices are stored, in a few words."""
    words = f"{' + '.join(part['dtypes'])} {' + '.join(part['kinds'])}"
    return f"{words}, {percent(part['zeros'])} zeros" if part["zeros"] else words
