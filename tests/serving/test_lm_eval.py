"""lm-evaluation-harness as a client: what `local-completions` measures is what the model says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from served import served

from sparsessm import runtime

TEXTS = [
    ("def main(", "self):"),
    ("import", " os\nimport sys"),
    ("class A:\n    def f", "(self, x): return x"),
]


@pytest.mark.filterwarnings("ignore")  # of its libraries
def test_likelihoods_through_the_server(tmp_path: Path) -> None:
    completions: Any = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    model = runtime.load("builtin:pycode")
    model.tokenizer.save_pretrained(tmp_path)
    with served(model) as server:
        client = completions.LocalCompletionsAPI(
            base_url=server.address + "/v1/completions", model="tiny", tokenizer=str(tmp_path), max_length=512
        )
        how: dict[str, Any] = {"request_type": "loglikelihood", "doc": {}, "idx": 0}
        found = client.loglikelihood([Instance(arguments=pair, **how) for pair in TEXTS])
        until: Any = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False}
        how["request_type"] = "generate_until"
        texts = client.generate_until([Instance(arguments=(pair[0], until), **how) for pair in TEXTS])
    for (context, continuation), (told, greedy) in zip(TEXTS, found, strict=True):
        before, whole = model.encode(context), model.encode(context + continuation)
        logits = model.logits(whole)[len(before) - 1 : -1]
        after = torch.tensor(whole[len(before) :])
        want = torch.log_softmax(logits.double(), -1).gather(1, after[:, None]).sum()
        assert math.isclose(told, float(want), abs_tol=1e-3)
        assert greedy == bool((logits.argmax(-1) == after).all())
    for (context, _), text in zip(TEXTS, texts, strict=True):
        assert text == model.generate(context, 20, stop="\n").text
