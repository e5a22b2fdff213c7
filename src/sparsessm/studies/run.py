"""One run of one recipe on one model: windows, measure, prune, save. `sparsessm.prune` and the command take
these steps, and what asks a question of several runs repeats them.

Place in the flow: right below the door, above the loops (pruning) and what they cost (evaluation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.nn import Module

from sparsessm import checkpoint as files
from sparsessm.architectures.own import Own
from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import Checkpoint, local_folder
from sparsessm.checkpoint.given import working
from sparsessm.checkpoint.memory import peak
from sparsessm.data.texts import calibration_windows, fingerprint
from sparsessm.evaluation import before_after
from sparsessm.evaluation.before_after import Yardstick, compared
from sparsessm.evaluation.perplexity import Perplexity
from sparsessm.pruning import Forgetful, Journal, make_plan
from sparsessm.pruning.forecast import Forecast, forecast
from sparsessm.recipe.recipe import Recipe, window_length
from sparsessm.report import card as cards
from sparsessm.report import machine
from sparsessm.report.contents import contents
from sparsessm.report.record import Report
from sparsessm.runtime.threads import refuse_torch_threads

from . import windows as enough

# Models that a run has changed in this process: their `source` no longer says all that they are.
_changed: WeakSet[Module] = WeakSet()


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
        refuse_torch_threads()
        refuse_uncallable(progress)
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
        recipe, auto = self.recipe, self.recipe.samples == "auto"
        with working(self.checkpoint, "prune"):
            if auto:
                enough.watched(self.architecture, self.plan.assignment)  # refuses before the text is read
            elif not self.plan.looks:
                return None
            self._say(f"reading {recipe.data}")
            tokens = calibration_windows(
                recipe.data,
                self.checkpoint.tokenizer,
                samples=enough.MOST + enough.HELD_OUT if recipe.samples == "auto" else recipe.samples,
                length=recipe.length or window_length(self.checkpoint.trained_length),
                seed=recipe.seed,
                distinct=auto,
                column=recipe.column,
            )
            journal = self._begin(tokens)
            if not auto:
                return tokens
            what = self.architecture, self.plan.assignment, tokens, self._progress
            samples, self.advice = journal.once("samples", lambda: enough.choose(*what))
            self.plan.settle(samples)
            return tokens[:samples]

    def measure(self) -> Perplexity:
        """Perplexity of the model as it is now, always on the same held-out windows of the recipe's text.

        Raises:
            ValueError: a text shorter than one window, or a likelihood that is not finite.
        """
        with working(self.checkpoint, "evaluate"):
            self._yardstick = self._yardstick or Yardstick.of(
                self.checkpoint, self.recipe, before_after.WINDOWS
            )
            return self._yardstick.measure(self.architecture, self._progress)

    def forecast(self, *, measure: bool = True) -> Forecast | None:
        """What the run takes on this machine, by a measurement of seconds; None where whole units go."""
        recipe, rules = self.recipe, self.plan.assignment.rules
        if not rules:
            return None
        length = recipe.length or window_length(self.checkpoint.trained_length)
        samples = 64 if recipe.samples == "auto" else recipe.samples
        measured = before_after.WINDOWS * min(length, before_after.LONGEST) * measure
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

        checkpoint = self.checkpoint
        with working(checkpoint, "prune"):
            tokens = self.windows() if tokens is None else tokens
            journal, dense = self._begin(tokens), None
            if measure:
                self._say("dense model")
                dense = Perplexity.restored(journal.once("dense", lambda: asdict(self.measure())))
            self._say(f"pruning by {' and '.join(self.plan.methods)}")
            before = checkpoint.model in _changed
            _changed.add(checkpoint.model)  # before the work: an interrupted run has changed the model too
            report = self.plan.run(self.architecture, tokens, self._progress, journal)
            # a layer that has gone takes its tensors along
            checkpoint.stored = dict(self.architecture.stored)
            report.pruned_before, report.packed = before, bool(Own.of(checkpoint.model))
            report.advice = self.advice
            report.machine["compute"] = self.architecture.compute.record()
            report.machine |= machine.beside(
                self.architecture.residence.device, self.architecture.ranks.count
            )
            kinds = contents(checkpoint.model.state_dict(), checkpoint.stored)
            report.sizes = {kind: size for kind, (size, _) in kinds.items()}
            if dense is not None:
                self._say("pruned model")
                report.perplexity = compared(dense, self.measure())
            self._report = report
            return report

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the model with the report of `prune`; as `sparsessm.save`."""
        with working(self.checkpoint, "save"):
            return saved(self.checkpoint, path, self._report, force)

    def _begin(self, tokens: Tensor | None) -> Journal:
        """The journal, which knows what the run is: what is given here must be the same when it goes on."""
        if self._journal is not None and not self._begun:
            what = {"recipe": self.recipe.model_dump(), "weights": self.checkpoint.digest}
            what["calibration"] = "" if tokens is None else fingerprint(tokens)
            self._journal.begin(what | {"machine": {**machine.current(), **machine.versions()}})
            self._begun = True
        return self._journal or Forgetful(self.architecture)


def refuse_uncallable(progress: object) -> None:
    """Refuse a `progress` that is no function.

    Raises:
        TypeError: it is neither a function nor None.
    """
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}; allowed: a function of (stage, done, total, block)")


def saved(checkpoint: Checkpoint, path: str | Path, report: Report | None, force: bool) -> Path:
    """Write a model with its record and its card, as `sparsessm.save`."""

    record = card = None
    levels = report.levels if report is not None else {}
    if report is not None:
        source = checkpoint.source
        hub_id = source if local_folder(source) is None else None
        format = "packed" if levels or Own.of(checkpoint.model) else checkpoint.format
        record, card = report.record(), cards.card(report, source, base_model=hub_id, format=format)
    return files.save(checkpoint, path, record=record, card=card, force=force, levels=levels)
