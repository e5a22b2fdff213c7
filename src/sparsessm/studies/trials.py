"""One size tried: the dense model is read again, pruned to it, measured, written, and timed.

Place in the flow: what `fit.py` calls for each size. All lies in the directory of the unfinished result, so
that a killed search goes on: what is known of the dense model and every measured point in its journal, the
walk under way in a journal of its own, and the smallest results that are feasible as packed directories.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from sparsessm.calibration.journal import Stage
from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import Checkpoint, Journal, refuse_full, unfinished
from sparsessm.checkpoint.atomic import replacing
from sparsessm.checkpoint.companions import FINDING
from sparsessm.checkpoint.container import PACKED
from sparsessm.checkpoint.given import working
from sparsessm.data.texts import evaluation_parts, fingerprint
from sparsessm.evaluation.before_after import LONGEST, Yardstick, compared
from sparsessm.evaluation.beside_dense import Known
from sparsessm.evaluation.comparison import PAPER, Metric, ZeroShot, changes
from sparsessm.evaluation.perplexity import Difference, Perplexity, difference
from sparsessm.evaluation.speed import decoding
from sparsessm.evaluation.tasks import zero_shot
from sparsessm.recipe.aims import bits_within, bytes_at
from sparsessm.recipe.fits import LEAST_BITS, MOST_BITS
from sparsessm.recipe.recipe import Recipe, window_length
from sparsessm.report import machine
from sparsessm.report.record import ENOUGH
from sparsessm.runtime.base import refuse_type
from sparsessm.studies.fit import Finding, first_guess, fitted
from sparsessm.studies.limits import Limits, Point
from sparsessm.studies.run import Run
from sparsessm.studies.shown import task_table, write_page
from sparsessm.studies.unseen import parted

KEPT = 2  # feasible results on the disk at a time: the smallest, and one more for the verification
BAND = 1.96  # standard errors of a 95 % interval

# Opens a model, and says where what is changed of it is written.
Open = Callable[[str, Path | None], Checkpoint]


@final
class _Shared:
    """The journal of one run of several: what is known of the dense model is that of all."""

    def __init__(self, shared: Journal, own: Journal) -> None:
        self._shared, self._own = shared, own

    @property
    def seconds(self) -> float:
        return self._own.seconds

    def start(self) -> None:
        self._own.start()

    def begin(self, what: Mapping[str, Any]) -> None:
        self._own.begin(what)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        return self._shared.once(name, make)

    def held(self, name: str) -> bool:
        return self._shared.held(name)

    def stage(self, name: str) -> Stage:
        return self._own.stage(name)


@final
class Trials:
    """Sizes of one model, tried on the same text.

    Attributes:
        span: the least and the most bits that are possible; the most may be less than the least.
        settings: the fields of the recipe, but for the bits.
    """

    def __init__(
        self,
        model: str,
        recipe: Recipe,
        limits: Limits,
        open_: Open,
        journal: Journal,
        *,
        include_path: Path | None = None,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Read the model and the text, and measure the dense model.

        Args:
            recipe: without bits. journal: of the unfinished result.
            include_path: as of `zero_shot`. progress, say: as of `Run`.

        Raises:
            ValueError: a model whose speed is asked for and that the runtime does not run; an unfinished run
                of something else; a disk without room; and as `Run` and `zero_shot`.
        """
        self._model, self._limits, self._open, self._journal = model, limits, open_, journal
        self._include, self._progress, self._say = include_path, progress, say or (lambda title: None)
        self._points: list[Point] = []
        self._failed: set[float] = set()  # bits of points that did not keep to it on unseen text
        checkpoint = open_(model, journal.folder)  # so that its weights have a checksum
        kind = str(checkpoint.model.config.model_type)
        self._runs = _runs(kind, limits)
        self._recipe = recipe
        run = self._run(checkpoint, first_guess(limits))
        self._compute = run.recipe.compute
        said = run.recipe.model_dump()
        self.settings = {name: said[name] for name in said if name != "bits" and said[name] is not None}
        least, most = float(LEAST_BITS), float(MOST_BITS)
        if limits.size is not None:
            most = min(most, bits_within(limits.size, run.recipe, run.architecture))
        self.span = least, most
        self._least = bytes_at(least, run.recipe, run.architecture)
        if most < least:
            return  # there is nothing to measure
        self._tokens = run.windows()
        self._say(f"reading {run.recipe.data} to measure on")
        self._searched, self._verified = self._yardsticks(checkpoint, run.recipe)
        journal.begin(self._question(checkpoint))
        journal.start()
        states = 0 if self._tokens is None else self._tokens.numel() * checkpoint.model.config.hidden_size
        room = journal.room(states, run.plan.working(run.architecture))
        refuse_full(journal.folder, checkpoint, 1.0 + KEPT / 2, room)  # of 16 bits at most 9 are left
        self._say("dense model")
        self._tasks = self._dense_tasks(checkpoint)
        with working(checkpoint, "evaluate"):
            self._dense = self._of_dense("search", self._searched, run)
            self._unseen = self._of_dense("verification", self._verified, run)

    def _of_dense(self, name: str, text: Yardstick, run: Run) -> Perplexity:
        made = self._journal.once(
            f"dense {name}", lambda: asdict(text.measure(run.architecture, self._progress))
        )
        return Perplexity.restored(made)

    def find(self) -> Finding:
        """Search, and verify."""
        if self.span[1] < self.span[0]:
            asked = self._limits.said.get("max-size", self._limits.size)
            least = f"the file takes {self._least / 1e6:.4g} MB at {self.span[0]:g} bits a weight, the fewest"
            told = f"No size is feasible: max-size is {asked}, but {least}."
            about = {"model": self._model, "recipe": self.settings, "notes": []}
            return Finding(self._limits, (), None, None, None, (told,), about)
        found = fitted(self.measure, self.verify, self._limits, self.span)
        found.about.update(self._about())
        return found

    def measure(self, bits: float) -> Point:
        """Try a size, or say what was measured of it before."""
        found = self._journal.once(f"point {bits:.2f}", lambda: self._tried(bits).record())
        point = self._limits.judged(Point(**{**found, "why": ()}))
        self._points.append(point)
        self._tidy()
        return point

    def verify(self, point: Point) -> Difference:
        """Change of perplexity of a result, read from its file, on windows that the search did not see."""
        found = difference(self._unseen, self._read_again(point))
        if self._limits.increase is not None and not found.high <= self._limits.increase:
            self._failed.add(point.bits)
        return found

    def _read_again(self, point: Point) -> Perplexity:
        def read() -> dict[str, Any]:
            folder = self._result(point)
            self._say(f"verifying {point.bits:g} bits on text that the search did not see")
            checkpoint = self._open(str(folder), None)
            with working(checkpoint, "evaluate"):
                found = self._verified.measure(checkpoint.architecture(self._compute), self._progress)
            return asdict(found)

        return Perplexity.restored(self._journal.once(f"verified {point.bits:.2f}", read))

    def write(self, finding: Finding, out: Path, *, force: bool, page: bool) -> None:
        """The chosen result with the finding beside it, whole or not at all; the unfinished one goes.

        Args:
            page: also measure what a page shows, and write it; needs matplotlib.

        Raises:
            ValueError: nothing was chosen. OSError: it cannot be written.
        """
        if finding.chosen is None:
            raise ValueError("nothing was chosen, so there is nothing to write")
        kept = self._result(finding.chosen)
        with replacing(out, force=force) as new:
            shutil.copytree(kept, new, dirs_exist_ok=True, copy_function=_linked)
            card = new / "README.md"
            text = card.read_text(encoding="utf-8")
            card.unlink()  # the one in the other directory stays as it is
            card.write_text(
                f"{text}\n## How the size was found\n\n{' '.join(finding.why)}\n", encoding="utf-8"
            )
            record = finding.record()
            content = json.dumps(record, indent=2, allow_nan=False)
            (new / FINDING).write_text(content + "\n", encoding="utf-8")
            if page:
                known = self._known(finding.chosen, out)
                write_page(new, record, known, progress=self._progress, say=self._say)
        self._journal.clear()

    def _known(self, point: Point, out: Path) -> Known:
        """What of a page is measured: perplexity on the text that the search did not see, and the tasks."""
        both = compared(self._unseen, self._read_again(point))
        return Known(
            str(out), lambda name: self._open(name, None), self._verified.windows, both, task_table(point)
        )

    def _run(self, checkpoint: Checkpoint, bits: float, journal: _Shared | None = None) -> Run:
        recipe = self._recipe.updated(bits=bits)
        return Run(checkpoint, recipe, progress=self._progress, say=self._say, journal=journal)

    def _tried(self, bits: float) -> Point:
        """Prune to a size, measure, write."""
        kept = self._folder(bits)
        self._say(f"trying {bits:g} bits a weight")
        with unfinished(kept, resume=True) as own:
            checkpoint = self._open(self._model, own.folder)
            own.holds(checkpoint.residence)
            run = self._run(checkpoint, bits, _Shared(self._journal, own))
            report = run.prune(self._tokens, measure=False)
            self._say(f"measuring {bits:g} bits")
            with working(checkpoint, "evaluate"):
                pruned = self._searched.measure(run.architecture, self._progress)
            report.perplexity, report.held_out = compared(self._dense, pruned), True
            tasks = self._drop(checkpoint)
            run.save(kept, force=True)
            del run, checkpoint, report
            gc.collect()  # the model, before its packed file is read
            speed = decoding(kept) if self._runs else None
            change = difference(self._dense, pruned)
            size = (kept / PACKED).stat().st_size
            return Point(bits, size, change.mean, change.low, change.high, speed, tasks)

    def _result(self, point: Point) -> Path:
        """The directory of a point; it is made again where it had to make room."""
        folder = self._folder(point.bits)
        if not folder.is_dir():
            self._tried(point.bits)
        return folder

    def _folder(self, bits: float) -> Path:
        return self._journal.folder / f"{bits:.2f}"

    def _tidy(self) -> None:
        """Of the results on the disk those stay that may be chosen."""
        fits = sorted({point.bits for point in self._points if point.feasible} - self._failed)
        if not self._limits.of_quality:
            fits.reverse()
        for point in self._points:
            if point.bits not in fits[:KEPT]:
                shutil.rmtree(self._folder(point.bits), ignore_errors=True)

    def _yardsticks(self, checkpoint: Checkpoint, recipe: Recipe) -> list[Yardstick]:
        """What the search measures on, and what is kept for the verification."""
        length = min(recipe.length or window_length(checkpoint.trained_length), LONGEST)
        found = evaluation_parts(
            recipe.data,
            checkpoint.tokenizer,
            lambda windows: parted(windows, self._tokens),
            length=length,
            column=recipe.column,
        )
        return [Yardstick(recipe.data, *part) for part in found]

    def _question(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What the unfinished run must have been about, so that its points hold here too."""
        return {
            "command": "fit",
            "recipe": self.settings,
            "weights": checkpoint.digest,
            "calibration": "" if self._tokens is None else fingerprint(self._tokens),
            "searched": fingerprint(self._searched.windows),
            "verified": fingerprint(self._verified.windows),
            "tasks": list(self._limits.tasks),
            "machine": {**machine.current(), **machine.versions()},
        }

    def _about(self) -> dict[str, Any]:
        searched, verified = self._dense, self._unseen
        few = min(searched.windows, verified.windows) < ENOUGH
        notes = [f"Intervals of fewer than {ENOUGH} windows are too narrow; give more text."] * few
        return {
            "model": self._model,
            "text": {
                "data": searched.data,
                "length": searched.length,
                "search": {"windows": searched.windows, "sha256": searched.fingerprint},
                "verification": {"windows": verified.windows, "sha256": verified.fingerprint},
            },
            "dense": {"search": searched.perplexity, "verification": verified.perplexity},
            "recipe": self.settings,
            "threads": machine.current()["threads"],
            "seconds": round(self._journal.seconds, 1),
            "notes": notes,
        }

    def _dense_tasks(self, checkpoint: Checkpoint) -> ZeroShot | None:
        if not self._limits.tasks:
            return None

        def made() -> dict[str, Any]:
            dense = self._scores(checkpoint)
            drop(dense, dense)  # refuses what has no accuracy before a size is tried
            return asdict(dense)

        return ZeroShot.restored(self._journal.once("dense tasks", made))

    def _scores(self, checkpoint: Checkpoint) -> ZeroShot:
        how = {"include_path": self._include, "progress": self._progress}
        return zero_shot(checkpoint, self._limits.tasks, **how)

    def _drop(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """By how much the mean accuracy falls."""
        if self._tasks is None:
            return None
        self._say(f"running {', '.join(self._limits.tasks)}")
        return drop(self._tasks, self._scores(checkpoint))


def drop(dense: ZeroShot, pruned: ZeroShot) -> dict[str, Any]:
    """By how much the mean accuracy of the tasks falls, with a paired 95 % interval, in shares.

    The interval is that of Agresti and Min (Statistics in Medicine, 2005): two documents are added, half of
    one for each way to change, so that few documents of which none changes do not say that none ever would.

    Raises:
        ValueError: a task without an accuracy, or one that is not known of each document.
    """
    changes(dense, pruned)  # refuses other documents
    alone = [score for score in dense.scores if score.source != "group"]
    names = {score.task: accuracy(score.task, score.metrics) for score in alone}
    falls, middles, variances = [], [], []
    for task, metric in names.items():
        before, after = (found.metrics[task][metric] for found in (dense, pruned))
        if not before.values or not after.values:
            raise ValueError(f"task {task!r}: its {metric} is not known of each document")
        parts = [old - new for old, new in zip(before.values, after.values, strict=True)]
        count, total = len(parts) + 2, math.fsum(parts)
        falls.append(before.value - after.value)
        middles.append(total / count)
        spread = math.fsum(part * part for part in parts) + 1 - total * total / count
        variances.append(spread / count**2)
    middle = math.fsum(middles) / len(middles)
    band = BAND * math.sqrt(math.fsum(variances)) / len(variances)

    def values(found: ZeroShot) -> dict[str, float]:
        return {task: found.metrics[task][metric].value for task, metric in names.items()}

    documents = {score.task: score.documents for score in alone}
    told = {"metrics": names, "dense": values(dense), "pruned": values(pruned), "documents": documents}
    ends = {"low": middle - band, "high": middle + band}
    return {"drop": math.fsum(falls) / len(falls), **ends, **told}


def accuracy(task: str, metrics: Mapping[str, Metric]) -> str:
    """Which metric of a task is its accuracy: as in the paper's mean, else normalised if it is there.

    Raises:
        ValueError: none is.
    """
    for name in (PAPER.get(task, "acc_norm"), "acc_norm", "acc"):
        if name in metrics:
            return name
    raise ValueError(f"task {task!r} has no accuracy for max-drop, only {', '.join(metrics)}")


def _runs(kind: str, limits: Limits) -> bool:
    """Whether the runtime runs a model of this type."""
    try:
        refuse_type(kind)
    except ValueError as error:
        if limits.speed is None:
            return False
        raise ValueError(f"min-speed is {limits.said.get('min-speed', limits.speed)}, but {error}") from None
    return True


def _linked(source: str, target: str) -> None:
    """The same file under another name, where the file system can; else a copy."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
