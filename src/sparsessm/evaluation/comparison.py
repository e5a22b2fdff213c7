"""What `sparsessm eval` says: the scores of zero-shot tasks, the mean of a paper, models side by side.

Place in the flow: perplexity.py and tasks.py measure, `cli` prints what comes from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from sparsessm.evaluation.perplexity import Perplexity, difference
from sparsessm.report.record import finite, perplexity_table

# The five tasks of SparseSSM (arXiv 2506.09613), and of each the metric that goes into the mean: those of the
# authors' program, github.com/CFinTech/SparseSSM, eval/eval_zero_shot.py (acc_norm where the task has it, but
# acc for arc_easy). The Mamba paper's tables differ in one: they take acc for piqa.
PAPER: Mapping[str, str] = {
    "piqa": "acc_norm",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
    "openbookqa": "acc_norm",
}
MEAN = "mean of the five"


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        value: as the harness gives it: a share between 0 and 1 for an accuracy.
        stderr: standard error over documents; None where it is not known. That of a mean is the harness's,
            that of exp(-mean), a perplexity, comes from the derivative and not from a bootstrap.
        values: what each document adds, in the order of the documents; empty where that is no number.
    """

    value: float
    stderr: float | None
    values: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Score:
    """What was measured on one task, or over the tasks of a group.

    Attributes:
        task: its name.
        version: of the task, as its file says.
        source: "lm_eval", the path of a task file outside of it, or "group".
        shots: solved examples in front of each document; 0 unless the task's file says otherwise.
        documents: number of documents.
        truncated: requests that were longer than the model's length and lost their beginning (of a group: see
            its tasks).
        metrics: by name, with the harness's filter behind it if it has one: "exact_match (strict-match)".
        fingerprint: SHA-256 of the documents, their prompts and their answers.
    """

    task: str
    version: str
    source: str
    shots: int
    documents: int
    truncated: int
    metrics: Mapping[str, Metric]
    fingerprint: str = field(default="", repr=False)


@dataclass(frozen=True)
class ZeroShot:
    """What was measured.

    Attributes:
        scores: one for each task, then one for each group that has a score of its own.
        harness: version of lm_eval.
        length: tokens of the longest request the model was given.
        limit: only so many documents of each task, the first ones; None for all.
    """

    scores: tuple[Score, ...]
    harness: str
    length: int
    limit: int | None

    @classmethod
    def restored(cls, fields: Mapping[str, Any]) -> ZeroShot:
        """Of its fields as plain values."""

        def metric(what: Mapping[str, Any]) -> Metric:
            return Metric(**{**what, "values": tuple(what["values"])})

        scores = (
            Score(**{**score, "metrics": {name: metric(what) for name, what in score["metrics"].items()}})
            for score in fields["scores"]
        )
        return cls(**{**fields, "scores": tuple(scores)})

    @property
    def metrics(self) -> dict[str, Mapping[str, Metric]]:
        """Task -> metric -> value; with "mean of the five" (`PAPER`) where all five were run."""
        metrics = {score.task: score.metrics for score in self.scores}
        return metrics | _paper_mean(metrics)

    def record(self) -> dict[str, Any]:
        """Returns the fields as JSON values (a number that is not finite is null)."""
        mean = self.metrics.get(MEAN, {}).get(MEAN)
        return finite({**asdict(self), "mean": mean and {**asdict(mean), "of": dict(PAPER)}})


def changes(dense: ZeroShot, pruned: ZeroShot) -> dict[str, Mapping[str, Metric]]:
    """Task -> metric -> pruned - dense; its standard error is paired, document by document.

    Raises:
        ValueError: the two were measured on different documents.
    """
    if [(s.task, s.fingerprint) for s in dense.scores] != [(s.task, s.fingerprint) for s in pruned.scores]:
        raise ValueError("changes needs the same tasks with the same documents")
    found: dict[str, Mapping[str, Metric]] = {
        before.task: {
            name: _change(before.metrics[name], after) for name, after in pruned_score.metrics.items()
        }
        for before, pruned_score in zip(dense.scores, pruned.scores, strict=True)
    }
    return found | _paper_mean(found)


class Comparison(NamedTuple):
    """Several models side by side: what `sparsessm eval` prints.

    Attributes:
        document: JSON values, one entry under "models" for each model, all but the first with their "change".
        title, columns, cells: a table of texts.
        words: columns that are words and no numbers, the first ones.
        notes: sentences that belong under the table.
    """

    document: dict[str, Any]
    title: str
    columns: list[str]
    cells: list[list[str]]
    words: int
    notes: list[str]


def perplexities(results: Mapping[str, Perplexity]) -> Comparison:
    """Compares perplexities by name of the model with that of the first, as far as tokenizers allow."""
    (first, dense), *_ = results.items()
    same = [model for model, result in results.items() if result.fingerprint == dense.fingerprint]
    changed = {model: asdict(difference(dense, results[model])) for model in same[1:]}
    records = {model: result.record() for model, result in results.items()}
    lines = [
        {"model": model, **record, "change": finite(changed.get(model))} for model, record in records.items()
    ]
    notes = []
    if others := [model for model in results if model not in same]:
        names = f"The tokenizer of {', '.join(others)} splits the text differently from that of {first}"
        notes.append(f"{names}: compare bits per byte, not perplexities.")
    title = f"Perplexity on {dense.data}, {dense.windows} windows of {dense.length} tokens"
    return Comparison({"models": lines}, title, *perplexity_table(records, changed), 1, notes)


def tasks(results: Mapping[str, ZeroShot]) -> Comparison:
    """Compares zero-shot scores by name of the model with those of the first: a line for each metric.

    Raises:
        ValueError: as `changes`.
    """
    (first, dense), *others = results.items()
    changed = {model: changes(dense, result) for model, result in others}
    lines = []
    for model, result in results.items():
        told = {task: {n: asdict(m) for n, m in row.items()} for task, row in changed.get(model, {}).items()}
        lines.append({"model": model, **result.record(), "change": finite(told) or None})
    title = f"Zero-shot by lm-evaluation-harness {dense.harness}"
    if dense.limit is not None:
        title += f", the first {dense.limit} documents of each task"
    columns = ["task", "metric", "documents", first]
    for model in changed:
        columns += [model, "change"]
    documents = {score.task: str(score.documents) for score in dense.scores}
    cells = []
    for task, metrics in dense.metrics.items():
        for name, metric in metrics.items():
            share = name == MEAN or name.startswith(("acc", "exact_match", "f1"))
            cell = [task, "" if name == MEAN else name, documents.get(task, ""), _cell(metric, share)]
            for model, change in changed.items():
                after = results[model].metrics[task][name]
                cell += [_cell(after, share), _cell(change[task][name], share, "+")]
            cells.append(cell)
    return Comparison({"models": lines}, title, columns, cells, 2, _notes(results))


def _notes(results: Mapping[str, ZeroShot]) -> list[str]:
    notes = ["Accuracies in %, ± one standard error."]
    if any(MEAN in result.metrics for result in results.values()):
        notes.append(
            f"{MEAN}: acc_norm of PIQA, ARC-challenge and OpenBookQA, acc of ARC-easy and WinoGrande, as in "
            "the program of the SparseSSM authors (the Mamba papers take acc for PIQA)."
        )
    for model, result in results.items():
        for score in result.scores:
            if score.truncated:
                cut = f"longer than the {result.length} tokens of {model}, so their beginning was cut off."
                notes.append(f"{score.task}: {score.truncated} requests were {cut}")
    return notes


def _cell(metric: Metric, share: bool, sign: str = "") -> str:
    """12.34 ± 1.20: a share in %."""
    scale = 100 if share else 1
    if not math.isfinite(metric.value):
        return "-"
    error = "" if metric.stderr is None else f" ± {scale * metric.stderr:.2f}"
    return f"{round(scale * metric.value, 2) + 0.0:{sign}.2f}{error}"  # + 0.0: no "-0.00"


def mean_error(value: float, values: Sequence[float]) -> float | None:
    """Standard error of a metric over documents; None if it is neither their mean nor exp(-mean).

    Args:
        value: the metric.
        values: what each document adds.
    """
    return _error([slope * number for number in values]) if (slope := _slope(value, values)) else None


def _slope(value: float, values: Sequence[float]) -> float | None:
    """d metric / d mean of the values: 1 for the mean, -value for exp(-mean), None for anything else."""
    if not values or not math.isfinite(value):
        return None
    mean = math.fsum(values) / len(values)
    if math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-12):
        return 1.0
    return -value if value > 0 and math.isclose(math.log(value), -mean, rel_tol=1e-6) else None


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, with Bessel's correction as in the harness; None for one value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _change(before: Metric, after: Metric) -> Metric:
    """after - before, with a paired standard error where both know their documents."""
    slopes = _slope(before.value, before.values), _slope(after.value, after.values)
    error = None
    if slopes[0] is not None and slopes[1] is not None:
        pairs = zip(before.values, after.values, strict=True)
        error = _error([slopes[1] * new - slopes[0] * old for old, new in pairs])
    return Metric(after.value - before.value, error)


def _paper_mean(metrics: Mapping[str, Mapping[str, Metric]]) -> dict[str, Mapping[str, Metric]]:
    """The unweighted mean over the tasks of `PAPER`; empty unless all were run."""
    if not all(name in metrics.get(task, {}) for task, name in PAPER.items()):
        return {}
    parts = [metrics[task][name] for task, name in PAPER.items()]
    errors = [part.stderr for part in parts if part.stderr is not None]
    error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return {MEAN: {MEAN: Metric(math.fsum(part.value for part in parts) / len(parts), error)}}
