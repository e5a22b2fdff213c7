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

from . import runtime

if TYPE_CHECKING:
    from pathlib import Path

    from sparsessm.evaluation.perplexity import Perplexity
    from sparsessm.recipe.recipe import Recipe
    from sparsessm.report.record import Report
    from sparsessm.studies.run import Run as Run

    from .checkpoint import Checkpoint

__all__ = ["evaluate", "load", "prune", "runtime", "save"]

Progress = Callable[[str, int, int, str], None]  # (stage, done, total, block)


def __getattr__(name: str) -> Any:
    """What is looked up when somebody wants it, because it is slow to import: `Run`, and `__version__`."""
    if name == "Run":
        from sparsessm.studies.run import Run as Run

        return Run
    if name != "__version__":
        raise AttributeError(f"module 'sparsessm' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sparsessm")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"


def load(
    source: str | Path,
    tokenizer: str | None = None,
    *,
    memory: str | int | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """Load a model and its tokenizer, in float32.

    Args:
        source: a hub id, a local directory (transformers or state-spaces format), or "builtin:pycode".
        tokenizer: hub id or directory of a tokenizer, for a model that has none.
        memory: what all may take, "6GB" or a number of bytes: a larger model is read block by block where it
            is pruned or measured. None: the whole model is in memory.
        device: that prunes and measures it: "cpu", "cuda", "cuda:1", or "auto", a GPU where there is one. One
            block at a time is on a GPU, the model stays in memory.

    Raises:
        ValueError: no such model or device, an architecture without an adapter, or tensors that are missing,
            extra, corrupt or not finite.
    """
    from . import checkpoint
    from .checkpoint.given import checked_path, undisturbed

    checked_path("source", source)
    if tokenizer is not None:
        checked_path("tokenizer", tokenizer)
    streaming = None if memory is None else checkpoint.Streaming.within(memory)
    with undisturbed():
        return checkpoint.load(str(source), tokenizer=tokenizer, streaming=streaming, device=device)


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
    from sparsessm.studies.run import Run as Run

    return Run(checkpoint, recipe, progress=progress, **fields).prune(measure=measure)


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
    from sparsessm.evaluation.before_after import Yardstick
    from sparsessm.runtime.threads import refuse_torch_threads
    from sparsessm.studies.run import refuse_uncallable

    refuse_torch_threads()
    refuse_uncallable(progress)
    checked_path("data", data)
    for name, value, least in (("length", length, 2), ("limit", limit, 1)):
        if value is not None and type(value) is not int:
            raise TypeError(f"{name} is {value!r}; allowed: a whole number, or none")
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; allowed: a whole number from {least}, or none")
    with working(checkpoint, "evaluate"):
        yardstick = Yardstick.on(checkpoint, str(data), length=length, limit=limit, column=column)
        return yardstick.measure(checkpoint.architecture(compute), progress)


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
    from sparsessm.studies.run import saved

    checked_path("path", path)
    if report is not None and not isinstance(report, Report):
        raise TypeError(f"report is of type {type(report).__name__}; allowed: what prune returned, or none")
    if not isinstance(force, bool):
        raise TypeError(f"force is {force!r}; allowed: True or False")
    with working(checkpoint, "save"):
        return saved(checkpoint, path, report, force)
