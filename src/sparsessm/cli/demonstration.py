"""The demo: the built-in model pruned in several ways, compared, packed and run; for `sparsessm demo`.

Place in the flow: on top of the door, as a user's program would be; `cli` prints what comes from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import sparsessm

from .. import runtime
from ..checkpoint import Checkpoint, load, local_folder, pack, refuse_room
from ..evaluation.before_after import Yardstick, compared
from ..evaluation.perplexity import Perplexity
from ..evaluation.speed import measure
from ..report.record import Report, percent
from .progress import Progress

MODEL = "builtin:pycode"
ROUNDS = 7  # of measuring each packed model beside the dense one
WINDOWS = 64  # held-out, that every result is measured on
_EXACT = {
    "targets": ["ssm"]
}  # the state matrix in all rows by its default, so that the linear layers compare
RUNS: dict[str, dict[str, Any]] = {
    "A_log alone: sparsessm": {"target": "ssm", "method": "sparsessm"},
    "A_log alone: exact": {"target": "ssm"},
    "all: magnitude": {"rules": [{"targets": ["projections"], "method": "magnitude"}, _EXACT]},
    "all: wanda": {"method": "wanda"},
    "all: sparsegpt": {"method": "sparsegpt"},
    "all: absorb (the default)": {},
}
SAVED = "all: absorb (the default)"  # the run whose model is kept
PACKED: dict[str, dict[str, Any]] = {  # how it is packed, by what is added to its directory's name
    "packed": {},
    "int8": {"dtype": "int8", "head": "int8"},
}
PROMPT, LENGTH = "def read_lines(path):\n", 64  # what the packed model goes on with, in tokens


class Demo(NamedTuple):
    """What was compared.

    Attributes:
        dense: the model before. measured: run -> as `Report.perplexity`.
        checkpoint, report: of the run `SAVED`; the report tells of all.
        yardstick: what all were measured on.
    """

    dense: Perplexity
    measured: dict[str, dict[str, Any]]
    checkpoint: Checkpoint
    report: Report
    yardstick: Yardstick


def compare(progress: Progress, **fields: Any) -> Demo:
    """Prune and measure by every one of `RUNS`.

    Args:
        fields: of the recipe, the same for all runs.

    Raises:
        ValueError: as `sparsessm.prune`.
    """
    checkpoint = sparsessm.load(MODEL)
    first = sparsessm.Run(checkpoint, say=progress.say, **RUNS[SAVED], **fields)
    tokens = first.windows()  # the same for all
    yardstick = Yardstick.of(checkpoint, first.recipe, WINDOWS)
    progress.say("dense model")
    dense = yardstick.measure(first.architecture, progress)
    measured: dict[str, dict[str, Any]] = {}
    kept = None
    for name, how in RUNS.items():
        run = sparsessm.Run(sparsessm.load(MODEL), progress=progress, **how, **fields)
        progress.say(f"pruning, {name}")
        report = run.prune(tokens, measure=False)
        progress.say(f"measuring, {name}")
        measured[name] = compared(dense, yardstick.measure(run.architecture, progress))
        kept = (run.checkpoint, report) if name == SAVED else kept
    assert kept is not None, "SAVED is none of RUNS"
    checkpoint, report = kept
    methods = {name: {part: measured[name][part] for part in ("pruned", "difference")} for name in measured}
    report.perplexity = {**measured[SAVED], "methods": methods}
    return Demo(dense, measured, checkpoint, report, yardstick)


def refuse_full(out: Path) -> None:
    """Refuse to begin where the results have no room: each has at most the bytes of the model.

    Raises:
        ValueError: says both numbers.
    """
    folder = local_folder(MODEL)
    assert folder is not None, "the demo's model is in the package"
    each = sum(file.stat().st_size for file in folder.iterdir())
    refuse_room(out, (1 + len(PACKED)) * each)


def packed_folder(out: Path, kind: str) -> Path:
    """Where the result in `out` is packed in one of the ways of `PACKED`."""
    return out.with_name(f"{out.name}.{kind}")


def run(progress: Progress, out: Path, done: Demo, *, force: bool) -> tuple[list[dict[str, Any]], str]:
    """Pack the saved result in every way of `PACKED`, measure each beside the dense model, and let one write.

    Args:
        out: the directory that the result was saved to.
        force: replace older ones.

    Returns:
        For each way: "model", "bytes" (of the file, and its share of the dense model's), "difference" of
        perplexity from dense, and the record "speed" (`Measurement.record`); and the text.
    """
    rows, text = [], ""
    for kind, how in PACKED.items():
        folder = packed_folder(out, kind)
        progress.say(f"packing and measuring, {folder}")
        packing = pack(out, folder, force=force, **how)
        if not text:
            text = PROMPT + runtime.load(folder).generate(PROMPT, LENGTH).text
        cost = compared(done.dense, done.yardstick.measure(load(str(folder)).architecture(), progress))
        speed = measure(folder, MODEL, rounds=ROUNDS, progress=progress).record()
        size = {"file": packing.after, "share": packing.ratio}
        rows.append({"model": str(folder), "bytes": size, "difference": cost["difference"], "speed": speed})
    return rows, text


def packed_table(rows: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """What `run` returned: title, columns, cells."""
    cells = []
    for row in rows:
        speed, gain = row["speed"]["models"][0]["tokens_per_second"], row["speed"]["ratios"]
        cells.append(
            [
                row["model"],
                f"{row['bytes']['file']:,}",
                percent(row["bytes"]["share"]),
                f"{row['difference']['mean']:+.2%}",
                *(
                    f"{at['decode'][size]['median']:{form}}"
                    for size in ("1", "16")
                    for at, form in ((speed, ",.0f"), (gain, ".2f"))
                ),
            ]
        )
    columns = [
        "packed",
        "bytes",
        "of dense",
        "perplexity",
        "tokens/s",
        "times dense",
        "at batch 16",
        "times dense",
    ]
    return f"Beside the dense model ({rows[0]['speed']['threads']} threads)", columns, cells
