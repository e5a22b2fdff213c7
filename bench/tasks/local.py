"""The documents of the task files in this folder: .jsonl files on this machine, nothing from the hub.

    sparsessm eval MODEL --tasks piqa,arc_easy,arc_challenge,winogrande,openbookqa --include-path bench/tasks

The task files beside this one carry the names and the prompts of lm_eval's own, which a test compares, and
take precedence over those. Their data, in the fields of the hub's data sets, is looked for in the directory
that the environment variable SPARSESSM_TASK_DATA names, else in ../shared/data/tasks beside the repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets

DATA = Path(__file__).resolve().parents[3] / "shared/data/tasks"


def load(file: str, split: str, **_: Any) -> dict[str, datasets.Dataset]:
    """lm_eval's `custom_dataset`: the documents of one file, in its order, under the name of one split.

    Raises:
        FileNotFoundError: the data directory has no such file.
    """
    path = Path(os.environ.get("SPARSESSM_TASK_DATA", DATA)) / file
    lines = path.read_text(encoding="utf-8").split("\n")
    return {split: datasets.Dataset.from_list([json.loads(line) for line in lines if line])}
