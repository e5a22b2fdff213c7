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
# The state matrix in all rows by its default, so that the linear layers compare.
_EXACT = {"targets": ["ssm"]}
RUNS: dict[str, dict[str, Any]] = {
    "removed: magnitude": {"rules": [{"targets": ["projections"], "method": "magnitude"}, _EXACT]},
    "removed: wanda": {"method": "wanda"},
    "removed: sparsegpt": {"method": "sparsegpt"},
    "removed: absorb (the default)": {},
    "gptq, 4 bits": {"method": "gptq", "grid": "int4", "target": "matrices"},
    "one dial, 4.25 bits": {"bits": 4.25},
    "one dial, 3.25 bits": {"bits": 3.25},
}
SAVED = "removed: absorb (the default)"  # the run whose model is kept as a stock checkpoint
SMALL = "one dial, 3.25 bits"  # and the one that is kept as a small file
PACKED: dict[str, dict[str, Any]] = {  # how `SAVED` is packed, by what is added to its directory's name
    "packed": {},
    "int8": {"dtype": "int8", "head": "int8"},
}
FOLDERS = (*PACKED, "small")
PROMPT, LENGTH = "def read_lines(path):\n", 64  # what the packed model goes on with, in tokens


class Demo(NamedTuple):
    """What was compared.

    Attributes:
        dense: the model before. measured: run -> as `Report.perplexity`.
        kept: checkpoint and report of the runs `SAVED`, whose report tells of all, and `SMALL`.
        yardstick: what all were measured on.
    """

    dense: Perplexity
    measured: dict[str, dict[str, Any]]
    kept: dict[str, tuple[Checkpoint, Report]]
    yardstick: Yardstick

    @property
    def report(self) -> Report:
        """Of `SAVED`."""
        return self.kept[SAVED][1]


def compare(progress: Progress, sparsity: float, **fields: Any) -> Demo:
    """Prune and measure by every one of `RUNS`.

    Args:
        sparsity: of those that remove. fields: of the recipe, the same for all runs.

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
    kept: dict[str, tuple[Checkpoint, Report]] = {}
    for name, how in RUNS.items():
        share = {} if how.keys() & {"bits", "grid"} else {"sparsity": sparsity}
        run = sparsessm.Run(sparsessm.load(MODEL), progress=progress, **how, **share, **fields)
        progress.say(f"pruning, {name}")
        report = run.prune(tokens, measure=False)
        progress.say(f"measuring, {name}")
        measured[name] = compared(dense, yardstick.measure(run.architecture, progress))
        if name in (SAVED, SMALL):
            report.perplexity = measured[name]
            kept[name] = run.checkpoint, report
    methods = {name: {part: measured[name][part] for part in ("pruned", "difference")} for name in measured}
    kept[SAVED][1].perplexity = {**measured[SAVED], "methods": methods}
    return Demo(dense, measured, kept, yardstick)


def refuse_full(out: Path) -> None:
    """Refuse to begin where the results have no room: each has at most the bytes of the model.

    Raises:
        ValueError: says both numbers.
    """
    folder = local_folder(MODEL)
    assert folder is not None, "the demo's model is in the package"
    each = sum(file.stat().st_size for file in folder.iterdir())
    refuse_room(out, (1 + len(FOLDERS)) * each)


def packed_folder(out: Path, kind: str) -> Path:
    """Where another form of the result in `out` is, one of `FOLDERS`."""
    return out.with_name(f"{out.name}.{kind}")


def run(progress: Progress, out: Path, done: Demo, *, force: bool) -> tuple[list[dict[str, Any]], str]:
    """Save and pack, measure each of `FOLDERS` beside the dense model, and let the small one write.

    Args:
        out: the directory of the stock checkpoint.
        force: replace older ones.

    Returns:
        For each: "model", "bytes" (of the file, and its share of the dense model's), "difference" of
        perplexity from dense, and the record "speed" (`Measurement.record`); and the text.
    """
    rows = []
    sparsessm.save(done.kept[SAVED][0], out, done.kept[SAVED][1], force=force)
    for kind in FOLDERS:
        folder = packed_folder(out, kind)
        progress.say(f"packing and measuring, {folder}")
        if kind in PACKED:
            pack(out, folder, force=force, **PACKED[kind])
        else:
            sparsessm.save(done.kept[SMALL][0], folder, done.kept[SMALL][1], force=force)
        cost = compared(done.dense, done.yardstick.measure(load(str(folder)).architecture(), progress))
        speed = measure(folder, MODEL, rounds=ROUNDS, progress=progress).record()
        size, dense = (model["bytes"]["disk"] for model in speed["models"])
        sizes = {"file": size, "share": size / dense}
        rows.append({"model": str(folder), "bytes": sizes, "difference": cost["difference"], "speed": speed})
    folder = packed_folder(out, FOLDERS[-1])
    return rows, PROMPT + runtime.load(folder).generate(PROMPT, LENGTH).text


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


def beside_dense(row: dict[str, Any]) -> str:
    """One of what `run` returned, in a sentence: its bytes and its speed beside the dense model's."""
    small, dense = row["speed"]["models"]
    rates = [model["tokens_per_second"]["decode"]["1"]["median"] for model in (small, dense)]
    return (
        f"{row['model']} has {row['bytes']['file']:,} bytes, the dense model {dense['bytes']['disk']:,}; it "
        f"writes {rates[0]:,.0f} tokens/s, the dense model {rates[1]:,.0f} "
        f"({row['speed']['ratios']['decode']['1']['median']:.2f} times as fast); perplexity "
        f"{row['difference']['mean']:+.2%}."
    )
