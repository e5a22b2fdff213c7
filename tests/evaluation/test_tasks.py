"""Tasks and their comparison against the harness's own model type `hf`, on small tasks written here."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsessm.evaluation import comparison
from sparsessm.evaluation.comparison import MEAN, PAPER, Metric, Score, ZeroShot
from sparsessm.evaluation.tasks import batches, language_model, zero_shot

pytest.importorskip("lm_eval")
import datasets  # noqa: E402
import lm_eval.tasks  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from questions import CHOICE, CLOZE, LENGTH, MODULE, ROLLING, ROWS, noise, pico, stock, write_task


@pytest.fixture(autouse=True)
def no_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lm_eval's 15,000 task files, which take seconds to read, only those of a folder or two."""
    own = [Path(lm_eval.tasks.__file__).parent / name for name in ("piqa", "arc", "gsm8k")]
    manager = lm_eval.tasks.TaskManager(include_path=[str(path) for path in own], include_defaults=False)
    monkeypatch.setattr(MODULE, "_catalogue", lambda: manager)


@pytest.mark.parametrize("room", [1, 70, 2048])  # alone, a few together, all together
def test_every_likelihood_is_that_of_the_harness(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "TOKENS", room)
    for name, fields in {"choice": CHOICE, "cloze": CLOZE, "rolling": ROLLING}.items():
        write_task(tmp_path, name, fields, ROWS + noise(10))
    checkpoint = pico()
    found = zero_shot(checkpoint, ["choice", "cloze", "rolling"], include_path=tmp_path)
    manager = lm_eval.tasks.TaskManager(include_path=tmp_path, include_defaults=False)
    results = []
    for model in (language_model(checkpoint), stock(checkpoint)):
        tasks = manager.load(["choice", "cloze", "rolling"])
        results.append(evaluator.evaluate(model, tasks, bootstrap_iters=0))
    for score in found.scores:
        ours, theirs = (result["samples"][score.task] for result in results)
        assert len(ours) == len(theirs) == score.documents == 15
        for one, other in zip(ours, theirs, strict=True):
            for mine, given in zip(one["resps"], other["resps"], strict=True):
                ((mine,), (given,)) = mine, given
                if score.task == "rolling":
                    assert mine == pytest.approx(given, abs=1e-4)
                else:
                    assert mine[0] == pytest.approx(given[0], abs=1e-4)
                    assert mine[1] == given[1]
        for name, metric in score.metrics.items():
            assert metric.value == pytest.approx(results[1]["results"][score.task][f"{name},none"], rel=1e-5)
    # two continuations of the text, and more among the noise
    assert next(score for score in found.scores if score.task == "choice").truncated >= 2
    assert (
        next(score for score in found.scores if score.task == "rolling").truncated == 0
    )  # it is cut into windows


def test_scores_errors_and_progress(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", CHOICE, noise(9))
    write_task(tmp_path, "cloze", CLOZE, noise(9))
    seen: list[tuple[str, int, int, str]] = []
    checkpoint = pico()
    found = zero_shot(
        checkpoint, [" choice", "cloze", "", "choice"], limit=7, include_path=tmp_path,
        progress=lambda *call: seen.append(call),
    )  # fmt: skip
    choice, cloze = found.scores
    assert (choice.task, choice.version, choice.shots, choice.documents) == ("choice", "2", 0, 7)
    assert choice.source == str(tmp_path / "choice.yaml")
    assert (found.length, found.limit) == (LENGTH, 7)
    for metric in choice.metrics.values():
        assert set(metric.values) <= {0.0, 1.0} and len(metric.values) == 7
        assert metric.value == sum(metric.values) / 7
        assert metric.stderr == pytest.approx(mean_stderr(list(metric.values)))
    likelihoods = cloze.metrics["perplexity"].values
    assert cloze.metrics["perplexity"].value == pytest.approx(math.exp(-sum(likelihoods) / 7))
    slope = cloze.metrics["perplexity"].value * mean_stderr(list(likelihoods))
    assert cloze.metrics["perplexity"].stderr == pytest.approx(slope)
    assert seen[:3] == [("load tasks", 0, 2, ""), ("load tasks", 1, 2, ""), ("load tasks", 2, 2, "")]
    assert ("choice", 28, 28, "") in seen and seen[-1] == ("cloze", 7, 7, "")
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["scores"][0]["metrics"]["acc"]["value"] == choice.metrics["acc"].value
    assert record["mean"] is None and record["harness"] == found.harness
    tokenizer: Any = checkpoint.tokenizer
    assert tokenizer.pad_token_id is None  # the harness wants one, and gets it in a copy


def test_the_terminal_belongs_to_the_caller(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "choice", CHOICE)
    zero_shot(pico(), ["choice"], include_path=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_batches_hold_every_request_once_and_keep_to_their_room() -> None:
    draw = random.Random(1)
    requests = [(None, [1] * draw.randint(1, 40), [2] * draw.randint(1, 5)) for _ in range(60)]
    requests += [(None, [3, 4, 5], [token]) for token in range(6, 20)]  # one row for the model
    made = batches(requests, 30, 100)
    assert sorted(number for batch in made for number in batch) == list(range(len(requests)))
    for batch in made:
        rows = {tuple((requests[n][1] + requests[n][2])[:-1]) for n in batch}
        longest = max(min(len(row), 30) for row in rows)
        assert len(rows) * longest <= 100
    assert any(set(range(60, 74)) <= set(batch) for batch in made)
    assert [len(batch) for batch in batches(requests[:5], 30, 1)] == [1] * 5
    assert batches([], 30, 1) == []


def test_the_mean_of_the_five(tmp_path: Path) -> None:
    for name in PAPER:
        fields = {**CHOICE, "metric_list": CHOICE["metric_list"][: 1 if name == "winogrande" else 2]}
        write_task(tmp_path, name, fields, noise(4))
    found = zero_shot(pico(), [*reversed(PAPER)], include_path=tmp_path)
    taken = [found.metrics[task][metric] for task, metric in PAPER.items()]
    mean = found.metrics[MEAN][MEAN]
    assert mean.value == pytest.approx(sum(metric.value for metric in taken) / 5)
    assert mean.stderr == pytest.approx(math.sqrt(sum((metric.stderr or 0) ** 2 for metric in taken)) / 5)
    assert found.record()["mean"]["value"] == mean.value
    result = comparison.tasks({"pico": found})
    assert result.cells[-1][:3] == [MEAN, "", ""]
    assert any("acc_norm of PIQA" in note for note in result.notes)
    four = replace(found, scores=found.scores[1:])
    assert MEAN not in four.metrics and four.record()["mean"] is None


def test_a_group_has_a_score_over_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    write_task(tmp_path, "one", CHOICE, noise(3))
    write_task(tmp_path, "two", CHOICE, noise(9)[3:])
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    found = zero_shot(pico(), ["both"], include_path=tmp_path)
    assert [(score.task, score.documents) for score in found.scores] == [("one", 3), ("two", 6), ("both", 9)]
    values = found.metrics["one"]["acc"].values + found.metrics["two"]["acc"].values
    assert found.metrics["both"]["acc"].value == pytest.approx(sum(values) / 9)
    assert found.metrics["both"]["acc"].stderr == pytest.approx(mean_stderr(list(values)))


def test_two_models_are_compared_document_by_document(tmp_path: Path) -> None:
    write_task(tmp_path, "choice", CHOICE, noise(12))
    write_task(tmp_path, "cloze", CLOZE, noise(12))
    dense = zero_shot(pico(), ["choice", "cloze"], include_path=tmp_path)
    checkpoint = pico()
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(38.0)
    pruned = zero_shot(checkpoint, ["choice", "cloze"], include_path=tmp_path)
    change = comparison.changes(dense, pruned)
    for task, name in (("choice", "acc"), ("choice", "acc_norm"), ("cloze", "acc"), ("cloze", "perplexity")):
        before, after = dense.metrics[task][name], pruned.metrics[task][name]
        assert change[task][name].value == pytest.approx(after.value - before.value)
        slopes = (-before.value, -after.value) if name == "perplexity" else (1, 1)
        pairs = zip(before.values, after.values, strict=True)
        paired = mean_stderr([slopes[1] * new - slopes[0] * old for old, new in pairs])
        assert change[task][name].stderr == pytest.approx(paired)
    result = comparison.tasks({"dense": dense, "pruned": pruned})
    assert result.columns == ["task", "metric", "documents", "dense", "pruned", "change"]
    assert [line[:3] for line in result.cells][:2] == [["choice", "acc", "12"], ["choice", "acc_norm", "12"]]
    assert all(len(line) == 6 for line in result.cells)
    first, second = json.loads(json.dumps(result.document, allow_nan=False))["models"]
    assert (first["model"], first["change"]) == ("dense", None)
    assert second["change"]["cloze"]["perplexity"]["value"] == change["cloze"]["perplexity"].value
    less = zero_shot(pico(), ["choice", "cloze"], include_path=tmp_path, limit=11)
    with pytest.raises(ValueError, match="the same tasks with the same documents"):
        comparison.changes(dense, less)


def result(**metrics: Metric) -> ZeroShot:
    score = Score("task", "1", "lm_eval", 0, 3, 2, metrics, "abc")
    return ZeroShot((score,), "0.4", 24, 3)


def test_how_numbers_are_shown() -> None:
    plain = result(acc=Metric(0.5, 0.125), bits_per_byte=Metric(1.5, None), perplexity=Metric(math.inf, None))
    other = result(acc=Metric(0.4999, 0.125), bits_per_byte=Metric(2, None), perplexity=Metric(7.0, 0.1))
    shown = comparison.tasks({"a": plain, "b": other})
    assert shown.cells == [
        ["task", "acc", "3", "50.00 ± 12.50", "49.99 ± 12.50", "-0.01"],
        ["task", "bits_per_byte", "3", "1.50", "2.00", "+0.50"],
        ["task", "perplexity", "3", "-", "7.00 ± 0.10", "-"],
    ]
    assert shown.title.endswith("the first 3 documents of each task")
    assert (
        "task: 2 requests were longer than the 24 tokens of a, so their beginning was cut off." in shown.notes
    )
    assert comparison.mean_error(0.5, [1.0]) is None  # one document has no error
    assert comparison.mean_error(0.7, [1.0, 0.0, 1.0]) is None  # some other function of the values


def test_a_ruined_model_is_measured_too(tmp_path: Path) -> None:
    write_task(tmp_path, "cloze", CLOZE)
    checkpoint = pico()
    ruined: Any = checkpoint.model
    ruined.backbone.norm_f.weight.data *= 1e6
    found = zero_shot(checkpoint, ["cloze"], include_path=tmp_path)
    assert found.metrics["cloze"]["perplexity"].value == math.inf
    assert found.record()["scores"][0]["metrics"]["perplexity"]["value"] is None
    ruined.backbone.norm_f.weight.data *= math.nan
    with pytest.raises(
        ValueError, match="'cloze' cannot be evaluated: the likelihood of a text is not finite"
    ):
        zero_shot(checkpoint, ["cloze"], include_path=tmp_path)


def test_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown task 'piqq'; did you mean 'piqa'\?; .* \(--include-path\)$"
    ):
        zero_shot(pico(), ["piqq"])
    with pytest.raises(
        ValueError, match=r"unknown task 'chioce'; task files in '.*': none that can be read$"
    ):
        zero_shot(pico(), ["chioce"], include_path=tmp_path)
    write_task(tmp_path, "choice", CHOICE)
    with pytest.raises(ValueError, match=r"'chioce'; did you mean 'choice'\?; task files in '.*': choice$"):
        zero_shot(pico(), ["choice", "chioce"], include_path=tmp_path)
    with pytest.raises(ValueError, match="no task; name some, for example piqa, arc_easy"):
        zero_shot(pico(), ["", " "])
    with pytest.raises(ValueError, match="limit >= 1 or None, got 0"):
        zero_shot(pico(), ["piqa"], limit=0)
    with pytest.raises(ValueError, match="include_path 'absent': no such directory"):
        zero_shot(pico(), ["piqa"], include_path="absent")


def test_no_network_is_one_line_that_names_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^task 'piqa' cannot be loaded: ConnectionError: .*'baber/piqa'"):
        zero_shot(pico(), ["piqa"])


def test_a_task_that_generates_text_is_refused(tmp_path: Path) -> None:
    fields = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
    }
    write_task(tmp_path, "writes", fields)
    with pytest.raises(ValueError, match=r"'writes' is of type generate_until; .*lm_eval --model hf"):
        zero_shot(pico(), ["writes"], include_path=tmp_path)
    with pytest.raises(ValueError, match="tasks that generate text are not supported"):
        language_model(pico()).generate_until([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"doc_to_text": "{{question.upper(}}"}, "'own' cannot be loaded: TemplateSyntaxError"),
        ({"doc_to_choice": "{{chioces}}"}, "'own' cannot be loaded: "),
        (
            {"doc_to_target": "{{answer if question == 'the' else nothing.at.all}}"},
            "'own' cannot be evaluated: Undefined",
        ),
        (
            {"doc_to_choice": "{{choices + ['Q']}}", "target_delimiter": ""},  # no token of this vocabulary
            r"'own' cannot be evaluated: a request has \d+ tokens of context and 0 of continuation",
        ),
        (
            {"doc_to_choice": "{{[question * 40, 'a']}}"},
            "allowed: at least 1, and 1 to 24, the model's length",
        ),
        ({"metric_list": [{"metric": "no such"}]}, "'own' cannot be loaded: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_task_file_that_does_not_fit(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_task(tmp_path, "own", {**CHOICE, **fields}, [{**ROWS[0], "question": "the"}, ROWS[4]])
    with pytest.raises(ValueError, match=message):
        zero_shot(pico(), ["own"], include_path=tmp_path)


def test_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = pico()
    tokenizer: Any = checkpoint.tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="a token for the beginning or end of a text"):
        zero_shot(checkpoint, ["piqa"])
    other: Any = replace(pico(), model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model type 'Linear' has no adapter"):
        zero_shot(other, ["piqa"])
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ValueError, match=r'pip install "sparsessm\[eval\]"'):
        zero_shot(pico(), ["piqa"])
