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


def interval(before: Sequence[int], after: Sequence[int]) -> tuple[float, float]:
    """Middle and standard error of Agresti and Min, from the table of who changed how: half of a document is
    added to each of its four cells."""
    worse = 0.5 + sum(x > y for x, y in zip(before, after, strict=True))
    better = 0.5 + sum(x < y for x, y in zip(before, after, strict=True))
    count = len(before) + 2
    return (worse - better) / count, math.sqrt(worse + better - (worse - better) ** 2 / count) / count


def test_the_mean_fall_and_its_interval_are_paired() -> None:
    random.seed(0)
    before = {task: [random.randrange(2) for _ in range(200)] for task in ("a", "b")}
    after = {task: [value if random.random() < 0.9 else 0 for value in row] for task, row in before.items()}
    dense = scored(a=("acc_norm", before["a"]), b=("acc", before["b"]))
    pruned = scored(a=("acc_norm", after["a"]), b=("acc", after["b"]))
    found = drop(dense, pruned)
    fall = mean(mean(before[task]) - mean(after[task]) for task in before)
    ends = [interval(before[task], after[task]) for task in before]
    middle, error = mean(one for one, _ in ends), math.hypot(*(one for _, one in ends)) / 2
    assert found["drop"] == pytest.approx(fall) and fall > 0.02
    assert found["high"] == pytest.approx(middle + 1.96 * error)
    assert found["low"] == pytest.approx(middle - 1.96 * error)
    plain = math.hypot(
        *(stdev(x - y for x, y in zip(before[task], after[task], strict=True)) for task in before)
    )
    assert found["high"] == pytest.approx(fall + 1.96 * plain / math.sqrt(200) / 2, abs=0.003)
    assert found["metrics"] == {"a": "acc_norm", "b": "acc"} and found["documents"] == {"a": 200, "b": 200}
    assert found["dense"]["a"] == pytest.approx(mean(before["a"]))


@pytest.mark.parametrize("count", [1, 3, 60, 1000])
def test_few_documents_that_do_not_change_are_no_proof(count: int) -> None:
    same = scored(a=("acc", [n % 2 for n in range(count)]))
    found = drop(same, same)
    assert found["drop"] == 0 and found["high"] == -found["low"] == pytest.approx(1.96 / (count + 2))


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


def test_an_accuracy_that_is_not_known_of_each_document_is_refused() -> None:
    bare = ZeroShot((Score("a", "1", "lm_eval", 0, 2, 0, {"acc": Metric(0.5, None)}),), "0", 16, None)
    with pytest.raises(ValueError, match="task 'a': its acc is not known of each document"):
        drop(bare, bare)


def test_scores_come_back_from_plain_values() -> None:
    scores = scored(a=("acc", [0, 1, 1]), b=("acc_norm", [1, 0]))
    assert ZeroShot.restored(json.loads(json.dumps(asdict(scores)))) == scores
