"""Small tasks of the harness, and models that answer them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pico import TEXT, pico_mamba, pico_tokenizer

from sparsessm.checkpoint import Checkpoint
from sparsessm.evaluation.tasks import zero_shot

pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared/data/tasks"
MODULE = sys.modules[zero_shot.__module__]
LENGTH = 24  # tokens
WORDS = TEXT.split()
ROWS = [
    {"question": "the state of the", "choices": ["model", "rest", "a scan reads"], "answer": 0},
    {"question": "", "choices": ["the model", "small"], "answer": 1},  # no context at all
    {"question": TEXT, "choices": ["token", "keeps is small"], "answer": 0},  # longer than the model's length
    {"question": "a scan reads token after token ", "choices": ["a", "b", "c", "d"], "answer": 2},
    {
        "question": "what it keeps",
        "choices": ["is small", "forgets the rest; a scan reads token"],
        "answer": 1,
    },
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                    for metric in ("acc", "acc_norm")],
}  # fmt: skip
CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices[0]}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}


def pico(**overrides: Any) -> Checkpoint:
    """A checkpoint in memory, of a short trained length."""
    model: Any = pico_mamba(**overrides)
    tokenizer: Any = pico_tokenizer()
    return Checkpoint(model, tokenizer, "pico", "transformers", {}, trained_length=LENGTH)


def write_task(
    folder: Path, name: str, fields: dict[str, Any], rows: list[dict[str, Any]] | None = None
) -> None:
    """A user's own task: a YAML file, and its data in a .jsonl file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    own = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    metadata = {"metadata": {"version": 2}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**own, **metadata, **fields}))


def noise(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        choices = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(4)]
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        rows.append({"question": question, "choices": choices, "answer": draw.randrange(4)})
    return rows


def stock(checkpoint: Checkpoint) -> HFLM:
    """lm_eval's own model type `hf`: the stock forward of transformers."""
    tokenizer: Any = pico_tokenizer()
    return HFLM(checkpoint.model, backend="causal", tokenizer=tokenizer, max_length=LENGTH, batch_size=3)
