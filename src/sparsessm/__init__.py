"""sparsessm: one-shot pruning of state space language models.

    import sparsessm

    model = sparsessm.load("builtin:pycode")
    report = sparsessm.prune(model, sparsity=0.5)
    print(sparsessm.evaluate(model))
    sparsessm.save(model, "out", report)
    print(sparsessm.runtime.load("out").generate("import os").text)

This file is the door: four functions, and `Run`, the steps of one pruning run, which the command line takes
too. Importing it is light; torch and transformers come in with the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from . import runtime

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from sparsessm.evaluation.before_after import Yardstick
    from sparsessm.evaluation.perplexity import Perplexity
    from sparsessm.pruning import Journal
    from sparsessm.pruning.forecast import Forecast
    from sparsessm.recipe.recipe import Recipe
    from sparsessm.report.record import Report

    from .checkpoint import Checkpoint

__all__ = ["evaluate", "load", "prune", "runtime", "save"]

# Models that `prune` has changed in this process: their `source` no longer says all that they are.
_pruned: WeakSet[Module] = WeakSet()
Progress = Callable[[str, int, int, str], None]  # (stage, done, total, block)


def __getattr__(name: str) -> str:
    """`__version__`, looked up when somebody wants it: what looks it up is slow to import."""
    if name != "__version__":
        raise AttributeError(f"module 'sparsessm' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sparsessm")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"


def load(source: str | Path, tokenizer: str | None = None, *, memory: str | int | None = None) -> Checkpoint:
    """Load a model and its tokenizer, in float32 on the CPU.

    Args:
        source: a hub id, a local directory (transformers or state-spaces format), or "builtin:pycode".
        tokenizer: hub id or directory of a tokenizer, for a model that has none.
        memory: what all may take, "6GB" or a number of bytes: a larger model is read block by block where it
            is pruned or measured. None: the whole model is in memory.

    Raises:
        ValueError: no such model, an architecture without an adapter, or tensors that are missing, extra,
            corrupt or not finite.
    """
    from . import checkpoint
    from .checkpoint.given import checked_path, undisturbed

    checked_path("source", source)
    if tokenizer is not None:
        checked_path("tokenizer", tokenizer)
    streaming = None if memory is None else checkpoint.Streaming.within(memory)
    with undisturbed():
        return checkpoint.load(str(source), tokenizer=tokenizer, streaming=streaming)


def prune(
    checkpoint: Checkpoint,
    *,
    recipe: Recipe | None = None,
    measure: bool = True,
    progress: Progress | None = None,
    **fields: Any,
) -> Report:
    """Prune `checkpoint.model` in place, without training, and measure what it cost.

    Args:
        checkpoint: what `load` returned.
        recipe: what to do; the defaults if None.
        measure: perplexity before and after, on 16 held-out windows of the recipe's text; else only pruning.
        progress: called with (stage, done, total, block).
        fields: fields of the recipe (see `recipe.Recipe`), which replace those in `recipe`: `sparsity=0.5`.

    Returns:
        What was removed from which tensor and what it cost; `save` writes it beside the model. Its recipe
        names the model and the tokenizer of `checkpoint`, whatever `recipe` says.

    Raises:
        ValueError: an unknown or impossible field, a text shorter than one window, or activations that are
            not finite; a model that is not as `load` gave it (float32, on the CPU, not compiled or
            parametrised), or that another thread works on.
        TypeError: something else than a checkpoint, a recipe or a function.
    """
    return Run(checkpoint, recipe, progress=progress, **fields).prune(measure=measure)


class Run:
    """One recipe on one model, adapted and planned once, and the steps of a run: of `prune`, of the command.

    Attributes:
        checkpoint: what `load` returned.
        architecture: its model, as the loops see it.
        plan: what the recipe does to it (`pruning.Plan`).
        advice: the curve that the number of windows was chosen from (`studies.windows.Step`s as plain
            values); empty where the recipe says a number.

    Raises:
        ValueError: an unknown or impossible field, a rule that hits nothing, or a pattern that does not fit
            the model's matrices; a checkpoint as in `prune`.
        TypeError: as `prune`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe | None = None,
        *,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
        journal: Journal | None = None,
        **fields: Any,
    ) -> None:
        """
        Args:
            progress, fields: as of `prune`. say: called with the title of each step of the work.
            journal: keeps what is done, for a run that goes on from there; the checkpoint's weights are in
                its directory then.
        """
        from sparsessm.checkpoint.given import working
        from sparsessm.pruning import make_plan
        from sparsessm.recipe.recipe import Recipe
        from sparsessm.runtime.threads import refuse_torch_threads

        refuse_torch_threads()
        _refuse_uncallable(progress)
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"recipe is of type {type(recipe).__name__}; allowed: a Recipe (see Recipe.load)")
        for name, value in fields.items():
            if isinstance(value, bool) and name != "diagonal":  # pydantic takes True as 1
                raise ValueError(f"{name} is {value}; allowed: a number or a text")
        self.checkpoint, self._progress, self._say = checkpoint, progress, say or (lambda title: None)
        self.advice: list[dict[str, Any]] = []
        self._yardstick: Yardstick | None = None
        self._report: Report | None = None
        self._journal, self._begun = journal, False
        with working(checkpoint, "prune"):
            wanted = (recipe or Recipe()).updated(**{**fields, "tokenizer": checkpoint.tokenizer_source})
            wanted = wanted.resolved(model=checkpoint.source, trained_length=checkpoint.trained_length)
            self.architecture = checkpoint.architecture(wanted.compute)
            wanted = wanted.updated(compute=self.architecture.compute.used)
            self.plan = make_plan(wanted, self.architecture)

    @property
    def recipe(self) -> Recipe:
        """Resolved: it says everything. Where `samples` was auto, `windows` puts their number in."""
        return self.plan.recipe

    def windows(self) -> Tensor | None:
        """The calibration windows (W, L) int64: as many as the recipe says, or as are enough (auto).

        Returns:
            None where nothing looks at them.

        Raises:
            ValueError: unknown data, or a text shorter than one window; with `samples: auto` also methods
                that look at no data, or too little text.
        """
        from sparsessm.checkpoint.given import working
        from sparsessm.data.texts import calibration_windows
        from sparsessm.recipe.recipe import window_length
        from sparsessm.studies.windows import HELD_OUT, MOST, choose, watched

        recipe, auto = self.recipe, self.recipe.samples == "auto"
        with working(self.checkpoint, "prune"):
            if auto:
                watched(self.architecture, self.plan.assignment)  # refuses before the text is read
            elif not self.plan.looks:
                return None
            self._say(f"reading {recipe.data}")
            tokens = calibration_windows(
                recipe.data,
                self.checkpoint.tokenizer,
                samples=MOST + HELD_OUT if recipe.samples == "auto" else recipe.samples,
                length=recipe.length or window_length(self.checkpoint.trained_length),
                seed=recipe.seed,
                distinct=auto,
                column=recipe.column,
            )
            journal = self._begin(tokens)
            if not auto:
                return tokens
            what = self.architecture, self.plan.assignment, tokens, self._progress
            samples, self.advice = journal.once("samples", lambda: choose(*what))
            self.plan.settle(samples)
            return tokens[:samples]

    def measure(self) -> Perplexity:
        """Perplexity of the model as it is now, always on the same held-out windows of the recipe's text.

        Raises:
            ValueError: a text shorter than one window, or a likelihood that is not finite.
        """
        from sparsessm.checkpoint.given import working
        from sparsessm.evaluation.before_after import WINDOWS, Yardstick

        with working(self.checkpoint, "evaluate"):
            self._yardstick = self._yardstick or Yardstick.of(self.checkpoint, self.recipe, WINDOWS)
            return self._yardstick.measure(self.architecture, self._progress)

    def forecast(self, *, measure: bool = True) -> Forecast | None:
        """What the run takes on this machine, by a measurement of seconds; None where whole units go."""
        from sparsessm.checkpoint.given import working
        from sparsessm.checkpoint.memory import peak
        from sparsessm.evaluation.before_after import LONGEST, WINDOWS
        from sparsessm.pruning.forecast import forecast
        from sparsessm.recipe.recipe import window_length

        recipe, rules = self.recipe, self.plan.assignment.rules
        if not rules:
            return None
        length = recipe.length or window_length(self.checkpoint.trained_length)
        samples = 64 if recipe.samples == "auto" else recipe.samples
        measured = WINDOWS * min(length, LONGEST) * measure
        with working(self.checkpoint, "forecast"):
            return forecast(self.architecture, rules, samples, length, measured=measured, peak=peak)

    def prune(self, tokens: Tensor | None = None, *, measure: bool = True) -> Report:
        """Change the model in place.

        Args:
            tokens: to calibrate on, instead of those of `windows`.
            measure: as of `sparsessm.prune`.

        Raises:
            ValueError: as `windows`, `measure` and `pruning.Plan.run`.
        """
        from dataclasses import asdict

        from sparsessm.architectures.own import Own
        from sparsessm.checkpoint.given import working
        from sparsessm.evaluation.before_after import compared
        from sparsessm.evaluation.perplexity import Perplexity
        from sparsessm.report.contents import contents

        checkpoint = self.checkpoint
        with working(checkpoint, "prune"):
            tokens = self.windows() if tokens is None else tokens
            journal, dense = self._begin(tokens), None
            if measure:
                self._say("dense model")
                dense = Perplexity.restored(journal.once("dense", lambda: asdict(self.measure())))
            self._say(f"pruning by {' and '.join(self.plan.methods)}")
            before = checkpoint.model in _pruned
            _pruned.add(checkpoint.model)  # before the work: an interrupted run has changed the model too
            report = self.plan.run(self.architecture, tokens, self._progress, journal)
            # a layer that has gone takes its tensors along
            checkpoint.stored = dict(self.architecture.stored)
            report.pruned_before, report.packed = before, bool(Own.of(checkpoint.model))
            report.advice = self.advice
            report.machine["compute"] = self.architecture.compute.record()
            kinds = contents(checkpoint.model.state_dict(), checkpoint.stored)
            report.sizes = {kind: size for kind, (size, _) in kinds.items()}
            if dense is not None:
                self._say("pruned model")
                report.perplexity = compared(dense, self.measure())
            self._report = report
            return report

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the model with the report of `prune`; as `sparsessm.save`."""
        return save(self.checkpoint, path, self._report, force=force)

    def _begin(self, tokens: Tensor | None) -> Journal:
        """The journal, which knows what the run is: what is given here must be the same when it goes on."""
        from sparsessm.data.texts import fingerprint
        from sparsessm.pruning import Forgetful
        from sparsessm.report import machine

        if self._journal is not None and not self._begun:
            what = {"recipe": self.recipe.model_dump(), "weights": self.checkpoint.digest}
            what["calibration"] = "" if tokens is None else fingerprint(tokens)
            self._journal.begin(what | {"machine": {**machine.current(), **machine.versions()}})
            self._begun = True
        return self._journal or Forgetful(self.architecture)


def evaluate(
    checkpoint: Checkpoint,
    data: str = "stdlib",
    *,
    length: int | None = None,
    limit: int | None = None,
    column: str | None = None,
    compute: str = "auto",
    progress: Progress | None = None,
) -> Perplexity:
    """Measure perplexity and bits per byte on the evaluation split of a text, in non-overlapping windows.

    Args:
        checkpoint: what `load` returned, pruned or not.
        data: name of a data set, a .txt, .jsonl, .json or .parquet file, or a directory of such files.
        length: tokens in a window; 2048, or the model's own length if that is shorter.
        limit: use only so many windows, evenly spaced over the text.
        column: the field or column that holds the text; `text`, of a named data set its own.
        compute: precision of products: float32, bfloat16, or auto (bfloat16 where the CPU has AMX).
        progress: called with (stage, done, total, block).

    Raises:
        ValueError: unknown data, a column that is not there, or a text shorter than one window; a checkpoint
            as in `prune`.
        TypeError: an argument of another type.
    """
    from sparsessm.checkpoint.given import checked_path, working
    from sparsessm.data.texts import evaluation_windows
    from sparsessm.evaluation.perplexity import measure
    from sparsessm.recipe.recipe import window_length
    from sparsessm.runtime.threads import refuse_torch_threads

    refuse_torch_threads()
    _refuse_uncallable(progress)
    checked_path("data", data)
    for name, value, least in (("length", length, 2), ("limit", limit, 1)):
        if value is not None and type(value) is not int:
            raise TypeError(f"{name} is {value!r}; allowed: a whole number, or none")
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; allowed: a whole number from {least}, or none")
    with working(checkpoint, "evaluate"):
        length = length or window_length(checkpoint.trained_length)
        windows, n_bytes = evaluation_windows(
            str(data), checkpoint.tokenizer, length=length, limit=limit, column=column
        )  # (W, length)
        architecture = checkpoint.architecture(compute)
        return measure(architecture, windows, n_bytes, data=str(data), progress=progress)


def _refuse_uncallable(progress: object) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}; allowed: a function of (stage, done, total, block)")


def save(
    checkpoint: Checkpoint, path: str | Path, report: Report | None = None, *, force: bool = False
) -> Path:
    """Write the model in the format it came in, with `pruning.json` and a model card if there is a report.

    Args:
        checkpoint: what `load` returned, pruned or not.
        path: the directory; it appears only when it is complete.
        report: what `prune` returned.
        force: replace an existing directory.

    Returns:
        The directory.

    Raises:
        ValueError: the directory exists and `force` is False; a checkpoint as in `prune`.
        TypeError: an argument of another type.
    """
    from sparsessm.checkpoint.given import checked_path, working
    from sparsessm.report.record import Report

    checked_path("path", path)
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"report is of type {type(report).__name__}; allowed: what prune returned, or none")
    if not isinstance(force, bool):
        raise TypeError(f"force is {force!r}; allowed: True or False")
    with working(checkpoint, "save"):
        return _saved(checkpoint, path, report, force)


def _saved(checkpoint: Checkpoint, path: str | Path, report: Report | None, force: bool) -> Path:
    from sparsessm.architectures.own import Own
    from sparsessm.checkpoint import local_folder
    from sparsessm.report import card as cards

    from . import checkpoint as files

    record = card = None
    levels = report.levels if report is not None else {}
    if report is not None:
        source = checkpoint.source
        hub_id = source if local_folder(source) is None else None
        format = "packed" if levels or Own.of(checkpoint.model) else checkpoint.format
        record, card = report.record(), cards.card(report, source, base_model=hub_id, format=format)
    return files.save(checkpoint, path, record=record, card=card, force=force, levels=levels)
