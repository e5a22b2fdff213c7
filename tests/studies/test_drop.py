"""By how much accuracy falls: the mean over tasks, with an interval that is paired over documents."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean, stdev

import pytest

from sparsessm.evaluation.comparison import Metric, Score, ZeroShot
from sparsessm.studies.trials import accuracy, drop


def scored(**tasks: tuple[str, Sequence[float]]) -> ZeroShot:
    """Task -> name of its metric, and 0 or 1 for each document."""
    scores = [
        Score(
            task, "1", "lm_eval", 0, len(values), 0, {name: Metric(mean(values), None, tuple(values))}, task
        )
        for task, (name, values) in tasks.items()
    ]
    return ZeroShot(tuple(scores), "0", 16, None)


def test_the_mean_fall_and_its_interval_are_paired() -> None:
    random.seed(0)
    before = {task: [random.randrange(2) for _ in range(200)] for task in ("a", "b")}
    after = {task: [value if random.random() < 0.9 else 0 for value in row] for task, row in before.items()}
    dense = scored(a=("acc_norm", before["a"]), b=("acc", before["b"]))
    pruned = scored(a=("acc_norm", after["a"]), b=("acc", after["b"]))
    found = drop(dense, pruned)
    falls = {task: [x - y for x, y in zip(before[task], after[task], strict=True)] for task in before}
    fall = mean(mean(row) for row in falls.values())
    error = math.hypot(*(stdev(row) / math.sqrt(200) for row in falls.values())) / 2
    assert found["drop"] == pytest.approx(fall) and fall > 0.02
    assert found["high"] == pytest.approx(fall + 1.96 * error)
    assert found["low"] == pytest.approx(fall - 1.96 * error)
    assert found["metrics"] == {"a": "acc_norm", "b": "acc"} and found["documents"] == {"a": 200, "b": 200}
    assert found["dense"]["a"] == pytest.approx(mean(before["a"]))


def test_the_same_answers_are_no_fall() -> None:
    same = scored(a=("acc", [0, 1, 1, 0]))
    assert {name: drop(same, same)[name] for name in ("drop", "low", "high")} == {
        "drop": 0, "low": 0, "high": 0,
    }  # fmt: skip


def test_the_score_of_a_group_does_not_count_twice() -> None:
    alone = scored(a=("acc", [0, 1, 1, 0]), b=("acc", [1, 1, 1, 1]))
    group = replace(alone.scores[1], task="all", source="group")
    both = replace(alone, scores=(*alone.scores, group))
    assert drop(both, both)["metrics"] == {"a": "acc", "b": "acc"}


def test_which_metric_is_the_accuracy() -> None:
    one = Metric(0.5, None)
    assert accuracy("piqa", {"acc": one, "acc_norm": one}) == "acc_norm"
    assert accuracy("arc_easy", {"acc": one, "acc_norm": one}) == "acc"  # as in the paper's mean
    assert accuracy("mine", {"acc": one, "acc_norm": one}) == "acc_norm"
    assert accuracy("mine", {"acc": one}) == "acc"
    with pytest.raises(ValueError, match="task 'mine' has no accuracy for max-drop, only bits_per_byte"):
        accuracy("mine", {"bits_per_byte": one})


def test_a_single_document_has_no_interval() -> None:
    one = scored(a=("acc", [1]))
    with pytest.raises(ValueError, match="tasks a: a task with a single document has no interval"):
        drop(one, one)


def test_scores_come_back_from_plain_values() -> None:
    scores = scored(a=("acc", [0, 1, 1]), b=("acc_norm", [1, 0]))
    assert ZeroShot.restored(json.loads(json.dumps(asdict(scores)))) == scores
