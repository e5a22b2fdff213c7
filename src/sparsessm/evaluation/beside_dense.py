"""A result beside the dense model that it was made of: all that its page says was measured.

Place in the flow: on top of this folder. `measure` opens both models and runs them on the same held-out text;
`kept` and `keep` remember the answer as `measured.json` in the result, so that it is measured once.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import Checkpoint, Opened, Streaming, atomic, load, open_checkpoint
from sparsessm.checkpoint.companions import BESIDE, MEASURED
from sparsessm.checkpoint.files import CONFIG
from sparsessm.checkpoint.given import undisturbed
from sparsessm.checkpoint.shelf import give_back
from sparsessm.data.foreign import from_json, read_bytes
from sparsessm.data.texts import evaluation_windows, fingerprint
from sparsessm.recipe.recipe import window_length
from sparsessm.report import machine
from sparsessm.report.page.measured import Measured
from sparsessm.report.record import finite

from . import comparison, divergence, speed
from .before_after import LONGEST
from .tasks import zero_shot

WINDOWS = 32  # of the text, at least; of short ones so many that they have `TOKENS` together
TOKENS = 2**15
MOST = 256  # windows
FEW = 16  # windows on which KL is measured, where perplexity is known of more
SPEED: Mapping[str, Any] = {"batches": (1,), "rounds": 7}  # of `speed.measure`
Say = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """What a search has measured, so that it need not be measured again.

    Attributes:
        name: of the result, as the user named it; it may still lie somewhere else.
        load: reads a model as the search did, by its name.
        windows: (W, L) int64, held out, of which perplexity is known; KL is measured on `FEW` of them.
        perplexity: as `Measured.perplexity`. tasks: as `Measured.tasks`.
    """

    name: str
    load: Callable[[str], Checkpoint]
    windows: Tensor
    perplexity: Mapping[str, Any]
    tasks: Mapping[str, Any] = field(default_factory=dict)


def asked(
    record: Mapping[str, Any],
    before: Measured | None,
    *,
    against: str | None,
    data: str | None,
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """What to measure: what was given, else as it was measured before, else as the record says."""
    recipe = record.get("recipe") or {}
    told = before.asked if before else {}

    def first(given: str | None, name: str, field: str, default: str) -> str:
        found = (given, told.get(name), recipe.get(field), default)
        return next(one for one in found if isinstance(one, str) and (one or one is default))

    return {
        "against": first(against, "against", "model", ""),
        "data": first(data, "data", "data", "stdlib"),
        "tasks": [*tasks] or [str(name) for name in told.get("tasks") or ()],
    }


def kept(opened: Opened) -> Measured | None:
    """What `keep` left in a directory, if it is of these weights; None if there is nothing, or nothing that
    can be read."""
    file = opened.folder.path / MEASURED
    try:
        content = from_json(read_bytes(file), strict=True)
    except (ValueError, OSError):
        return None
    found = Measured.restored(content) if isinstance(content, dict) else None
    return found if found and found.weights == weights_sha256(opened) else None


def keep(folder: Path, found: Measured) -> None:
    """Write what was measured beside the record, whole or not at all.

    Raises:
        OSError: as the file system reports it; nothing is left behind, an old file is intact.
    """
    content = json.dumps(finite(found.record()), indent=1, allow_nan=False) + "\n"
    atomic.write_text(folder / MEASURED, content)


def weights_sha256(opened: Opened) -> str:
    """SHA-256 of a checkpoint's `config.json` and weight files, by their bytes."""
    told = hashlib.sha256()
    for file in (opened.folder.path / CONFIG, *sorted(opened.weight_files)):
        with open(file, "rb") as content:
            told.update(hashlib.file_digest(content, "sha256").digest())
    return told.hexdigest()


def sizes(opened: Opened) -> dict[str, int]:
    """Bytes on the disk: of the files that hold the "weights", and of "all" files of the directory but those
    that `report` writes."""
    weights = [file.stat().st_size for file in opened.weight_files]
    everything = [
        file.stat().st_size for file in opened.folder.entries if file.is_file() and file.name not in BESIDE
    ]
    return {"weights": sum(weights), "all": sum(everything)}


def measure(
    opened: Opened,
    record: Mapping[str, Any],
    question: Mapping[str, Any],
    *,
    given: Sequence[str] = (),
    run: bool = True,
    known: Known | None = None,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Measured:
    """Measure a result and its dense model, one beside the other.

    What the user did not ask for in words and cannot be had (a source that is gone, a text without network)
    is left out, and `missing` says so.

    Args:
        opened: the result. record: its own; see `report.record.checked`.
        question: as `asked` returns it.
        given: names of the question that the user gave: what goes wrong with them is an error.
        run: whether the models are run; False: only sizes are looked up.
        known: what was measured before; it is taken as it is.
        progress: as of `divergence.compare`, `speed.measure` and `tasks.zero_shot`.
        say: told what begins.

    Raises:
        ValueError: as `open_checkpoint`, `load`, `evaluation_windows` and `zero_shot`, of what was given.
    """
    work = _Work(opened, record, question, given, known, progress, say)
    work.measure(run)
    return Measured(
        weights=weights_sha256(opened) if run else "",
        against=question["against"] if work.dense else "",
        day=datetime.date.today().isoformat() if run else "",
        asked=dict(question),
        machine={**machine.current(), "versions": machine.versions()},
        missing=work.missing,
        **work.found,
    )


class _Work:
    """One measurement while it is made."""

    def __init__(
        self,
        opened: Opened,
        record: Mapping[str, Any],
        question: Mapping[str, Any],
        given: Sequence[str],
        known: Known | None,
        progress: Progress | None,
        say: Say,
    ) -> None:
        self._opened, self._recipe, self._question = opened, record.get("recipe") or {}, question
        self._given, self._known, self._progress, self._say = given, known, progress, say
        self._name = known.name if known else opened.source
        self.missing: list[str] = []
        self.found: dict[str, Any] = {}
        self.dense: Opened | None = None

    def measure(self, run: bool) -> None:
        against = self._question["against"]
        self._attempt("against", "The dense model was not found, so nothing is compared with it", self._open)
        self.found["sizes"] = {"result": sizes(self._opened)}
        if self.dense:
            self.found["sizes"]["dense"] = sizes(self.dense)
        if not run:
            self.missing.append("Nothing was measured for this page: it shows what the record says.")
            return
        if self.dense:
            if self._known:
                self.found["perplexity"] = dict(self._known.perplexity)
                self._attempt("data", "KL was not measured", self._few_texts)
            else:
                self._attempt("data", "Perplexity and KL were not measured", self._texts)
        elif "data" in self._given:
            raise ValueError("--data needs the dense model, which was not found; name it with --against")
        if self._known and self._known.tasks:
            self.found["tasks"] = dict(self._known.tasks)
        elif self._question["tasks"]:
            self._attempt("tasks", "Tasks were not measured", self._tasks)
        else:
            self.missing.append(
                "No zero-shot tasks were run: `sparsessm report --tasks piqa,arc_easy` runs some."
            )
        give_back()
        what = f"{self._name} beside {against}" if self.dense else self._name
        self._say(f"speed of {what}")
        self._attempt("", "Speed was not measured", self._speed)

    def _attempt(self, name: str, otherwise: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (ValueError, OSError) as error:
            if name in self._given:
                raise
            self.missing.append(f"{otherwise}: {' '.join(str(error).split())}.")

    def _open(self) -> None:
        if not (against := self._question["against"]):
            raise ValueError("the record names no model")
        opened = open_checkpoint(against)
        opened.weight_files  # noqa: B018, refused now where there are none
        self.dense = opened

    def _loaded(self, opened: Opened) -> Checkpoint:
        if self._known:
            return self._known.load(opened.source)
        words = self._recipe.get("tokenizer")
        with undisturbed():
            return load(
                opened, tokenizer=words if isinstance(words, str) else None, streaming=Streaming.within(None)
            )

    def _texts(self) -> None:
        assert self.dense is not None
        dense, result = self._both()
        data = self._question["data"]
        column, length = self._recipe.get("column"), self._recipe.get("length")
        same_text = data == self._recipe.get("data")
        if not isinstance(length, int) or isinstance(length, bool) or length < 2:
            length = window_length(dense.trained_length)
        length = min(length, LONGEST)
        how: dict[str, Any] = {"length": length, "limit": min(MOST, max(WINDOWS, TOKENS // length))}
        how["column"] = column if same_text and isinstance(column, str) else None
        windows, n_bytes = evaluation_windows(data, result.tokenizer, **how)
        its, _ = evaluation_windows(data, dense.tokenizer, **how)
        if fingerprint(its) != fingerprint(windows):
            raise ValueError(
                f"the tokenizers of {self._question['against']} and {self._opened.source} split the text "
                "differently"
            )
        compared = self._compared(dense, result, windows)
        self.found["perplexity"] = finite(divergence.perplexities(compared, windows, n_bytes, data))

    def _few_texts(self) -> None:
        assert self._known is not None
        windows = self._known.windows
        spread = torch.linspace(0, len(windows) - 1, min(FEW, len(windows))).round().long()
        self._compared(*self._both(), windows[spread])

    def _both(self) -> tuple[Checkpoint, Checkpoint]:
        """The dense model and the result."""
        assert self.dense is not None
        self._say(f"text through {self._name} and {self._question['against']}")
        return self._loaded(self.dense), self._loaded(self._opened)

    def _compared(self, dense: Checkpoint, result: Checkpoint, windows: Tensor) -> divergence.Compared:
        """Both on the same windows, (W, L) int64: how far their predictions are from one another."""
        both = dense.architecture(), result.architecture()
        compared = divergence.compare(*both, windows, progress=self._progress)
        self.found["divergence"] = finite(divergence.histogram(compared))
        decode = divergence.text_of(result.tokenizer)
        self.found["windows"] = finite(divergence.worst(compared, windows, decode))
        return compared

    def _tasks(self) -> None:
        named = {self._name: self._opened}
        if self.dense:
            named = {self._question["against"]: self.dense, **named}
        scores = {}
        for name, opened in named.items():
            self._say(f"tasks, {name}")
            scores[name] = zero_shot(self._loaded(opened), self._question["tasks"], progress=self._progress)
        told = comparison.tasks(scores)
        self.found["tasks"] = {
            "title": told.title,
            "columns": told.columns,
            "cells": told.cells,
            "words": told.words,
            "notes": told.notes,
        }

    def _speed(self) -> None:
        dense = self._question["against"] if self.dense else None
        out = os.fspath(self._opened.folder.path)
        ours = replace(speed.subject(out), name=self._name)  # where it lies now may be no place to stay
        self.found["speed"] = finite(speed.measure(ours, dense, progress=self._progress, **SPEED).record())
