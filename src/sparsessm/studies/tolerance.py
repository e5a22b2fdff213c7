"""Which parts of a model tolerate how much: every matrix pruned alone at several sparsities, measured by the
KL divergence of the logits on held-out windows; kept in a file, and continued there after an interruption.

Place in the flow: before pruning. `cells.py` measures, `findings.py` says in words and pictures what
was found, docs/analyze.md describes the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsessm.architectures import Architecture
from sparsessm.calibration.progress import Progress
from sparsessm.checkpoint import Checkpoint
from sparsessm.data.foreign import from_json, read_bytes
from sparsessm.data.texts import calibration_windows, evaluation_windows, fingerprint
from sparsessm.data.unfinished import undoing
from sparsessm.methods import Rule
from sparsessm.methods.base import UNIFORM
from sparsessm.pruning.entries import priced
from sparsessm.recipe.recipe import Recipe, window_length
from sparsessm.recipe.rules import assign, words
from sparsessm.studies.cells import Cell, measure, parts_of

FORMAT = 1
FILE = "analysis.json"
SPARSITIES = (0.3, 0.5, 0.7)


@dataclass
class Analysis:
    """What has been measured so far.

    Attributes:
        settings: what the cells depend on, and the model's name; plain values, see docs/analyze.md.
        expected: number of cells when it is complete.
        cells: in the order of the model, by sparsity within a matrix.
    """

    settings: dict[str, Any]
    expected: int
    cells: list[Cell] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The content of analysis.json."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "expected": self.expected,
            "complete": len(self.cells) == self.expected,
            "seconds": round(math.fsum(cell.seconds for cell in self.cells), 3),
            "cells": [asdict(cell) for cell in self.cells],
        }


def analyze(
    checkpoint: Checkpoint,
    *,
    sparsities: Iterable[float] = SPARSITIES,
    price: str | None = None,
    data: str = "stdlib",
    column: str | None = None,
    samples: int = 16,
    windows: int = 8,
    length: int | None = None,
    compute: str = "float32",
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Measure every cell, or those that an earlier run in the same directory left.

    Memory beside the model: the residual stream of the calibration windows once, of the held-out windows
    twice and for each sparsity once more, the sums of one block's targets, a copy of one block for each
    sparsity, some rows of logits.

    Args:
        checkpoint: what `load` returned; it is not changed.
        sparsities: each in [0, 1).
        price: what an error in an output row costs, as in a recipe; None: what the methods take. With "none"
            there is no backward pass.
        compute: precision of products, as in a recipe; what is compared here may differ by less than bfloat16
            rounds, so it is float32 unless asked for.
        data, column, samples, length, seed: of the calibration windows, as in a recipe.
        windows: number of held-out windows, of the same data.
        out: directory of analysis.json, which is written after every matrix; None: nothing is written.
        force: start anew where there is a file of other settings or of another model.
        progress: called with ("analyze", steps done, steps in all, block); a step is about one block forward.

    Raises:
        ValueError: options that are not allowed, a file that does not fit, or activations, Hessians or logits
            that are not finite, by name.
    """
    length = length or window_length(checkpoint.trained_length)
    architecture = checkpoint.architecture(compute)
    asked = sorted(set(sparsities))
    # Alone, a matrix has the dense model's inputs: there is nothing to absorb and nobody to share with.
    what: dict[str, Any] = {
        "repair": "self",
        "allocation": UNIFORM.name,
        "price": price,
        "length": length,
        "seed": seed,
        "compute": architecture.compute.used,
    }
    what |= {"data": data, "column": column, "samples": samples}
    recipes = [Recipe(sparsity=sparsity, **what) for sparsity in asked]
    if not recipes:
        raise ValueError("sparsities is empty; give at least one")
    rules = assign(recipes[0], architecture.targets).rules
    calibration = calibration_windows(
        data, checkpoint.tokenizer, samples=samples, length=length, seed=seed, column=column
    )
    held_out, _ = evaluation_windows(data, checkpoint.tokenizer, length=length, limit=windows, column=column)
    settings = {
        "model": checkpoint.source,
        "weights": weights_sha256(checkpoint),
        "methods": _methods(architecture, rules),
        "sparsities": asked,
        "data": data,
        "samples": samples,
        "windows": len(held_out),
        "length": length,
        "seed": seed,
        "compute": architecture.compute.used,
        "calibration": fingerprint(calibration),
        "held_out": fingerprint(held_out),
    }
    found = Analysis(settings, len(parts_of(architecture, rules)) * len(asked))
    path = None if out is None else Path(out) / FILE
    if path is not None:
        found.cells = architecture.ranks.given(_continued(path, settings, force))
        if architecture.ranks.first:
            write(path, found)  # a directory that cannot be written to fails now
    done = {(cell.target, cell.sparsity) for cell in found.cells}
    if len(done) < found.expected:
        rules = priced(architecture, rules, calibration, progress)
        for cells in measure(architecture, rules, asked, calibration, held_out, done, progress):
            found.cells += cells
            if path is not None and architecture.ranks.first:
                write(path, found)
    return found


def _methods(architecture: Architecture, rules: Mapping[str, Rule]) -> dict[str, str]:
    """Family -> how it is pruned, in words."""
    found = {}
    for target in architecture.targets:
        if target.name in rules:
            said = words(rules[target.name])
            found[target.family] = ", ".join(
                [said["method"], *(f"{name} {said[name]}" for name in ("removed", "repair", "price"))]
            )
    return found


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of every tensor: its name, shape, dtype in the checkpoint, and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.model.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {list(tensor.shape)} {checkpoint.stored.get(name)} ".encode())
        values: Any = checkpoint.residence.value(tensor).cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def parse_sparsities(text: str) -> list[float]:
    """The numbers of "0.3,0.5,0.7".

    Raises:
        ValueError: not numbers; their range is checked by `analyze`.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"sparsities is {text!r}; expected numbers like 0.3,0.5,0.7") from None


def write(path: Path, analysis: Analysis) -> None:
    """Write analysis.json, into a directory that is made if need be."""
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(analysis.record(), indent=1, allow_nan=False).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is always whole: the old one or the new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")

    def undo() -> None:
        with suppress(OSError):
            new.unlink(missing_ok=True)

    with undoing(undo):
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def read(path: str | Path) -> Analysis:
    """Read an analysis.json, or the one in a directory.

    Raises:
        ValueError: no such file, or not an analysis; names the path.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    content = read_bytes(path)
    try:
        record = from_json(content)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}; known: {FORMAT}")
        cells = [Cell(**cell) for cell in record["cells"]]
        return Analysis(dict(record["settings"]), int(record["expected"]), cells)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not an analysis ({type(error).__name__}: {error})") from None


def _continued(path: Path, settings: Mapping[str, Any], force: bool) -> list[Cell]:
    """The cells of an earlier run with these settings on this model.

    Raises:
        ValueError: there is a file, but of other settings, and not `force`.
    """
    if not path.exists():
        return []
    try:
        former = read(path)
    except ValueError as error:
        if force:
            return []
        raise ValueError(f"{error}; --force replaces it") from None
    names = [name for name in settings if name != "model" and former.settings.get(name) != settings[name]]
    if not names:
        return former.cells
    if force:
        return []
    told = "; ".join(
        f"{name} {_short(former.settings.get(name))}, now {_short(settings[name])}" for name in names
    )
    raise ValueError(f"{path} was measured with other settings ({told}); --force starts anew")


def _short(value: Any) -> str:
    """A setting as it is told; of a hash the beginning."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
