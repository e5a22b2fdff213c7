"""Task files of our own beside those of the harness: they ask the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparsessm
from sparsessm.evaluation.comparison import MEAN, PAPER
from sparsessm.evaluation.tasks import zero_shot

pytest.importorskip("lm_eval")
import lm_eval.tasks  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from questions import SHARED, pico

ROOT = Path(__file__).parents[2]
FILES = ROOT / "bench/tasks"


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_local_task_files_ask_what_those_of_the_harness_ask(file: Path) -> None:
    ours = load_yaml(file, resolve_func=False)
    own = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "tag", "training_split"}
    own |= {"should_decontaminate", "doc_to_decontamination_query"}
    (theirs,) = [
        config
        for folder in ("arc", "lambada", "openbookqa", "piqa", "winogrande")
        for path in (Path(lm_eval.tasks.__file__).parent / folder).glob("*.yaml")
        if (config := load_yaml(path, resolve_func=False)).get("task") == ours["task"]
    ]

    def asked(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in own and value is not None}
        if "test_split" in kept:
            kept.pop("validation_split", None)  # documents come from the test split where there is one
        return {key: plain(value) for key, value in kept.items()}

    def plain(value: Any) -> Any:  # a function by its name: "…/preprocess_winogrande.doc_to_text"
        return (
            value.rpartition("/")[2].replace("lm_eval.tasks.winogrande.", "") if is_function(value) else value
        )

    def is_function(value: Any) -> bool:
        return isinstance(value, str) and "preprocess_winogrande." in value

    assert asked(ours) == asked(theirs)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="no ../shared/data with the data of the tasks beside this project"
)
def test_local_task_files_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESSM_TASK_DATA", str(SHARED))
    found = zero_shot(
        sparsessm.load("builtin:pycode"), [*PAPER, "lambada_openai"], include_path=FILES, limit=2
    )
    assert {score.task: score.documents for score in found.scores} == dict.fromkeys(
        [*PAPER, "lambada_openai"], 2
    )
    assert 0 <= found.metrics[MEAN][MEAN].value <= 1
    assert found.metrics["lambada_openai"]["perplexity"].value > 1


def test_local_task_files_without_their_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESSM_TASK_DATA", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^task 'piqa' cannot be loaded: FileNotFoundError: .*piqa_validation"
    ):
        zero_shot(pico(), ["piqa"], include_path=FILES)
