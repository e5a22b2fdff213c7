"""Runs on `stdlib` say which standard library they read, and a rerun on another one says so."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_mamba
from planned import prune

from sparsessm.architectures import adapt
from sparsessm.data import texts
from sparsessm.data.edition import edition
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.recipe.recipe import Recipe

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_digest_is_of_the_documents(split: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"m{number}" for number in range(40)]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"x = '{name}'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    side = [name for name in sorted(names) if texts.is_held_out(name) == (split == "evaluation")]
    want = hashlib.sha256("".join(f"x = '{name}'\n\0" for name in side).encode()).hexdigest()
    assert edition("stdlib", split) == {"python": platform.python_version(), "sha256": want}


def test_texts_that_are_the_same_everywhere_need_no_edition() -> None:
    assert not any(edition(name, "calibration") for name in ("wikitext2", "c4", "ptb", "my.txt", ""))


@pytest.mark.parametrize("how", [{"target": "ssm"}, {"pattern": "structured:state"}])
def test_the_record_says_which_text_it_was(how: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**how).resolved(model="pico", trained_length=16)
    record = prune(adapt(pico_mamba()), recipe, TOKENS).record()
    assert record["calibration"]["text"] == edition("stdlib", "calibration")
    own = recipe.updated(data=str(tmp_path / "my.txt"))
    assert "text" not in prune(adapt(pico_mamba()), own, TOKENS).record()["calibration"]
    blind = recipe.updated(method="magnitude", repair="none" if "pattern" in how else None)
    assert prune(adapt(pico_mamba()), blind, TOKENS).record()["calibration"] == {"sha256": None}


def test_a_measured_perplexity_says_which_text_it_was() -> None:
    model = pico_mamba()
    assert perplexity(model, TOKENS, 30, data="stdlib").record()["text"] == edition("stdlib", "evaluation")
    assert "text" not in perplexity(model, TOKENS, 30, data="my.txt").record()


HERE = edition("stdlib", "calibration")
OTHER = {"python": "2.7.18", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"calibration": {"sha256": "1", "text": HERE}}, ""),
        ({"calibration": {"sha256": "1", "text": HERE | {"python": "3.0"}}}, ""),
        (
            {"calibration": {"sha256": "1", "text": OTHER}},
            "stdlib was the library of Python 2.7.18, here it is",
        ),
        ({"calibration": {"sha256": "1"}, "versions": {"python": "3.8.9"}}, "library of Python 3.8.9, here"),
        ({"calibration": {"sha256": "1", "text": HERE | {"sha256": "0"}}}, "is another text here, of Python"),
        ({"calibration": {"sha256": "1"}, "versions": {"python": HERE["python"]}}, ""),
        ({"calibration": {"text": {"python": "\x1b[31m3.1", "sha256": "0"}}}, ""),
        ({"recipe": {"data": "wikitext2"}, "calibration": {}, "versions": {"python": "3.8.9"}}, ""),
        ({"calibration": [], "versions": 3}, ""),
        ([], ""),
    ],
)
def test_why_the_text_may_be_another(record: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "pruning.json").write_text(json.dumps(record))
    said = Recipe().other_text(tmp_path)
    assert (why in said if why else said == "") and "\x1b" not in said
    assert Recipe(data="my.txt").other_text(tmp_path) == ""
