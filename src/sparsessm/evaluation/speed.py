"""How large and how fast a model is here: bytes, tokens per second, and the bandwidth that they use.

Place in the flow: above `timing.py`, which times engines side by side, and beside `generation.py`. The
command `sparsessm bench` prints what `measure` returns. Nothing is claimed from zeros: a stock checkpoint is
measured as dense, and the notes say so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsessm.checkpoint import PackedTensor, open_checkpoint, packed
from sparsessm.checkpoint.shelf import give_back

from ..calibration.progress import Progress
from ..report import machine
from ..runtime import engine_of
from ..runtime.base import Engine, described, refuse_type
from . import timing
from .timing import BATCHES, PROMPT, ROUNDS, Bandwidth, Phase

PARTS = {  # the large matrices, by the last words of their names
    "linear layers": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "embedding and head": ("embeddings", "lm_head"),
}


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: what it is called.
        engine: runs it.
        config: has the attributes that `base.FIELDS` names.
        packed: its zeros are not stored.
        stored: how its large matrices are stored, see `storage`.
        disk: bytes of its weights' files and of all files of its directory; None: it is in memory only.
        grown: bytes by which loading it made this process larger; None where it cannot be asked.
        notes: what of its source is not followed, as `Checkpoint.notes`.
    """

    name: str
    engine: Engine
    config: Any
    packed: bool
    stored: dict[str, dict[str, Any]]
    disk: dict[str, int] | None = None
    grown: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        subjects: the model and, if it was given, the one it is compared with.
        phases: the prompt, then decoding at each batch size.
        bandwidth: measured in the same run with as many threads.
        threads: of this process.
        process: resident bytes of the whole process with everything loaded; None where it cannot be asked.
        notes: what a reader must know to take the figures for what they are.
    """

    subjects: list[Subject]
    phases: list[Phase]
    bandwidth: Bandwidth
    threads: int
    process: int | None
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Plain values; speeds are tokens per second of all sequences together, ratios those of the first
        model to the second: of bytes how many times as many, of speed how many times as fast."""
        models = [self._model(number) for number in range(len(self.subjects))]
        ratios = None
        if len(models) == 2:
            first, second = (model["bytes"] for model in models)
            names = [name for name in first if name != "process_grown"]  # small ones are noise
            sizes = {name: first[name] / second[name] for name in names if first[name] and second[name]}
            ratios = {"bytes": sizes, **self._phases(lambda phase: asdict(phase.ratio(0, 1)))}
        return {
            "models": models,
            "ratios": ratios,
            "rounds": self._phases(
                lambda phase: {
                    "counted": len(phase.rounds),
                    "dropped": phase.dropped,
                    "disturbed": phase.disturbed,
                    "calls": phase.calls,
                }
            ),
            "bandwidth": asdict(self.bandwidth),
            "prompt_tokens": next(phase.tokens for phase in self.phases if phase.name == "prompt"),
            "process_bytes": self.process,
            "threads": self.threads,
            "kernels": machine.current()["kernels"],
            "torch": torch.__version__,
            "spread": "first to third quartile of the rounds",
            "notes": self.notes,
        }

    def _model(self, number: int) -> dict[str, Any]:
        subject = self.subjects[number]
        engine, disk = subject.engine, subject.disk or {}
        alone = next((phase for phase in self.phases if phase.name == "decode" and phase.batch == 1), None)
        return {
            "model": subject.name,
            "packed": subject.packed,
            "stored": subject.stored,
            "architecture": described(subject.config),
            "bytes": {
                "disk": disk.get("weights"),
                "disk_all": disk.get("all"),
                "resident": engine.resident,
                "process_grown": subject.grown,
                "read_per_step": engine.nbytes,
                "state_per_sequence": 4 * engine.state_size,
            },
            "tokens_per_second": self._phases(lambda phase: asdict(phase.speed(number))),
            "gb_per_second": alone and engine.nbytes / alone.seconds(number).median / 1e9,
        }

    def _phases(self, value: Callable[[Phase], Any]) -> dict[str, Any]:
        """{"prompt": of the prompt, "decode": {batch: of decoding}}."""
        decode = {str(phase.batch): value(phase) for phase in self.phases if phase.name == "decode"}
        (prompt,) = (value(phase) for phase in self.phases if phase.name == "prompt")
        return {"prompt": prompt, "decode": decode}


def measure(
    model: str | os.PathLike[str] | Subject,
    against: str | os.PathLike[str] | Subject | None = None,
    *,
    prompt: int = PROMPT,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure a model on this machine, alone or round by round beside another one.

    Args:
        model: what `runtime.load` takes, or what `subject` made.
        against: the model to compare with, any architecture and precision; the notes say how they differ.
        prompt: tokens of the prompt.
        batches: sequences that are decoded together.
        rounds: of each phase; fewer of one that takes longer than `PHASE` seconds, at least `FEWEST`.
        threads: as `runtime.load`.
        progress: called with ("bench", done, total, "").

    Raises:
        ValueError: as `runtime.load`; a number below 1.
    """
    numbers = {"prompt": prompt, "rounds": rounds, **{f"batch {size}": size for size in batches}}
    if threads is not None:
        numbers["threads"] = threads
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} is {number!r}; allowed: a whole number from 1")
    given = [model] if against is None else [model, against]
    subjects = [one if isinstance(one, Subject) else subject(one, threads) for one in given]
    process = timing.process_bytes()
    engines = [one.engine for one in subjects]
    found = timing.passes()
    phases = timing.timed(engines, prompt=prompt, batches=batches, rounds=rounds, progress=progress)
    memory = timing.bandwidth(found + timing.passes())
    notes = _notes(subjects, phases, memory)
    return Measurement(subjects, phases, memory, torch.get_num_threads(), process, notes)


def subject(path: str | os.PathLike[str], threads: int | None = None) -> Subject:
    """Load a model to measure it; arguments as for `runtime.load`, but no tokenizer is needed of a packed
    one."""
    opened = open_checkpoint(path)
    refuse_type(opened.model_type)  # before gigabytes are read
    give_back()  # what was freed before and is used again would not count
    before = timing.process_bytes()
    held = packed.stream(opened)
    config, notes = held.config, held.notes
    is_packed, beside = opened.packed is not None, [file for file in opened.folder.entries if file.is_file()]
    disk = {"weights": _bytes(opened.weight_files), "all": _bytes(beside)}
    del opened
    stored = storage(held.tensors)
    engine = engine_of(config, held.tensors, threads)
    del held
    give_back()
    after = timing.process_bytes()
    grown = None if before is None or after is None else after - before
    return Subject(os.fspath(path), engine, config, is_packed, stored, disk, grown, notes)


def decoding(path: str | os.PathLike[str], rounds: int = timing.FEWEST) -> float:
    """Tokens a second of one sequence, the median of a few rounds: enough to compare with a limit.

    Args:
        path: a packed directory, or any model of a type that the runtime runs. rounds: at least 1.

    Raises:
        ValueError: as `runtime.load`.
    """
    opened = open_checkpoint(path)
    refuse_type(opened.model_type)
    held = packed.stream(opened)
    engine = engine_of(held.config, held.tensors, None)
    _, alone = timing.timed([engine], prompt=1, batches=(1,), rounds=rounds)
    return alone.speed(0).median


def storage(tensors: Mapping[str, PackedTensor]) -> dict[str, dict[str, Any]]:
    """How the large matrices are stored.

    Returns:
        For each of `PARTS`: "dtypes" of the values, "kinds" ("dense", "bitmask", "2:4"), and "zeros", the
        share of their entries that are zero, stored or not.
    """
    found = {}
    for part, words in PARTS.items():
        dtypes, kinds, entries, other = set[str](), set[str](), 0, 0
        for name in tensors:  # one by one: they may be read from a file just then
            if name.endswith(tuple(f"{word}.weight" for word in words)):
                tensor = tensors[name]
                dtypes.add(tensor.held)
                kinds.add(tensor.label)
                entries += math.prod(tensor.shape)
                other += int(torch.count_nonzero(tensor.decode()))
        zeros = 1 - other / entries if entries else 0.0
        found[part] = {"dtypes": sorted(dtypes), "kinds": sorted(kinds), "zeros": zeros}
    return found


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _notes(subjects: Sequence[Subject], phases: Sequence[Phase], memory: Bandwidth) -> list[str]:
    """What the figures do not say by themselves, in sentences."""
    first = subjects[0]
    notes = []
    if not first.packed:
        notes.append(
            f"{first.name} is a stock checkpoint and was measured as dense: its zeros are read like other "
            "numbers. To measure it without them, run `sparsessm pack` first."
        )
    for other in subjects[1:]:
        if other.packed:
            notes.append(f"{other.name} is packed, so the ratios do not compare with a dense model.")
        ours, theirs = described(first.config), described(other.config)
        names = [*ours, *(name for name in theirs if name not in ours)]
        if differ := [name for name in names if ours.get(name) != theirs.get(name)]:
            told = ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in differ)
            notes.append(f"The architectures differ: {told}.")
        for part in PARTS:
            mine, its = (", ".join(each.stored[part]["dtypes"]) for each in (first, other))
            if mine != its:
                notes.append(
                    f"The {part} are {mine} and {its}: the ratios show precision too, not only zeros."
                )
    alone = next((phase for phase in phases if phase.name == "decode" and phase.batch == 1), None)
    for number, each in enumerate(subjects):
        if alone and each.engine.nbytes / alone.seconds(number).median / 1e9 > memory.read.median:
            notes.append(
                f"{each.name} is read faster than memory allows: its weights are in a cache, so saving bytes "
                "does not save as much time."
            )
    if not all(phase.watched for phase in phases):
        notes.append("This system does not report how long threads wait for a core, so no round was dropped.")
    if disturbed := [phase for phase in phases if phase.disturbed]:
        told = ", ".join(f"{phase.name} at batch {phase.batch}" for phase in disturbed)
        notes.append(
            f"The machine was busy: fewer than {timing.FEWEST} rounds were undisturbed ({told}), so all of "
            "them count, and the figures are unreliable. Measure again."
        )
    return notes
