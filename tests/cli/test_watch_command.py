"""`sparsessm watch` and `serve --watch`: learning, alarms, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import shortened
import torch
from command import refused, run
from safetensors.torch import load_file, save_file
from served import post, served

from sparsessm import runtime
from sparsessm.serving.watching import Monitor
from sparsessm.studies import traffic


@pytest.fixture(scope="module", autouse=True)
def little(few_layers: Path) -> Iterator[None]:
    """Built-in models have two layers, and the library a few modules."""
    with pytest.MonkeyPatch.context() as patch:
        shortened.use_builtins(patch, few_layers)
        shortened.use_library(patch)
        yield


@pytest.fixture(scope="module")
def result(little: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with a fingerprint of 96 windows."""
    folder = tmp_path_factory.mktemp("watched") / "small"
    fast = ["--samples", "2", "--length", "64", "--no-eval", "--quiet"]
    run("prune", "builtin:pycode", "-o", str(folder), "--bits", "3.25", *fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic.learn, "__kwdefaults__", {"column": None, "windows": 96})
        run("watch", str(folder), "--learn", "--quiet")
    return folder


@pytest.fixture(scope="module")
def model(result: Path) -> Any:
    return runtime.load(result)


def noise(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(chr(draw.randrange(32, 127)) for _ in range(300)) for _ in range(count)]


def usual(model: Any, count: int) -> Iterator[str]:
    windows, _ = traffic.evaluation_windows("stdlib", model.tokenizer, length=128, limit=count)
    return (model.decode(ids.tolist()) for ids in windows)


def written(path: Path, texts: Any) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_other_traffic_is_an_alarm_and_usual_traffic_is_none(
    result: Path, model: Any, tmp_path: Path
) -> None:
    strange = written(tmp_path / "strange.jsonl", noise(40))
    outcome = run("watch", str(result), "--data", strange, "--against", "builtin:pycode", "--json", code=3)
    found = json.loads(outcome.stdout)
    assert found["alarm"] and found["prompts"] == 48 and found["reference"] == "stdlib"
    (row,) = found["judged"]
    assert (row["block"], row["blocks"], row["alarms"]) == (16, 3, 3) and row["largest"] > 1
    cost = found["cost"]
    assert cost["low"] < cost["increase"] < cost["high"] and cost["prompts"] == 48
    same = written(tmp_path / "same.jsonl", usual(model, 64))
    outcome = run("watch", str(result), "--data", same)
    assert "No alarm" in outcome.stdout and "64" in outcome.stdout


def test_the_cost_is_that_of_the_two_models(model: Any) -> None:
    dense = runtime.load("builtin:pycode")
    prompts = list(traffic.pieces(model, list(usual(model, 8))))
    gaps = []
    for ids in prompts:
        nll = [
            float(torch.nn.functional.cross_entropy(one.logits(ids)[:-1], ids[1:])) for one in (model, dense)
        ]
        gaps.append(nll[0] - nll[1])
    found = traffic.cost(model, dense, prompts)
    assert found["nats"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)


def test_a_fingerprint_is_read_as_it_was_written(result: Path, model: Any, tmp_path: Path) -> None:
    found = traffic.load(result / traffic.FILE, model)
    traffic.save(found, tmp_path / "again.safetensors")
    again = traffic.load(tmp_path / "again.safetensors", model)
    assert found.names == again.names and (found.features == again.features).all()
    assert all((a == b).all() for a, b in zip(found.directions, again.directions, strict=True))
    assert (result / traffic.FILE).stat().st_size < 200_000


def test_a_damaged_or_foreign_fingerprint_is_refused(result: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; `sparsessm watch .* --learn` writes"):
        traffic.load(tmp_path / traffic.FILE, model)
    with pytest.raises(ValueError, match="another model"):
        traffic.load(result / traffic.FILE, runtime.load("builtin:pycode"))
    tensors = load_file(result / traffic.FILE)
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, {"format": "something"})
    with pytest.raises(ValueError, match="not a fingerprint"):
        traffic.load(bad, model)
    for names, about in (("[", "{}"), ("[]", '{"layout": 1}'), ('["a"]', "[]")):
        save_file(tensors, bad, {"format": traffic.FORMAT, "names": names, "about": about})
        with pytest.raises(ValueError, match="damaged|another model"):
            traffic.load(bad, model)


def test_refusals(result: Path, tmp_path: Path) -> None:
    few = written(tmp_path / "few.jsonl", noise(3))
    assert "3 prompts" in refused("watch", str(result), "--data", few)
    assert "no traffic was given" in refused("watch", str(result))
    assert "--force" in refused("watch", str(result), "--learn")
    assert "--against has no effect" in refused("watch", str(result), "--learn", "--against", "x")
    assert "needs 64" in refused("watch", str(result), "--learn", "--force", "--data", few)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in result.iterdir():
        if file.name != traffic.FILE:
            (bare / file.name).write_bytes(file.read_bytes())
    assert "fingerprint.safetensors" in refused("watch", str(bare), "--data", few)


def test_a_server_watches_its_prompts(result: Path, model: Any) -> None:
    lines: list[str] = []
    monitor = Monitor(model, traffic.load(result / traffic.FILE, model), lines.append)
    with served(model, monitor=monitor) as server:
        for text in noise(16):
            body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
            assert post(server.address, "/v1/completions", body)[0] == 200
        assert post(server.address, "/v1/completions", b'{"prompt": "x", "max_tokens": 1}')[0] == 200
        found = httpx.get(server.address + "/watch").json()
        assert found["prompts"] == 16 and found["alarms"] == 1 and found["blocks"]["16"]["alarm"]
        page = httpx.get(server.address + "/watch", headers={"Accept": "text/html"}).text
        assert "Alarm: the traffic has changed" in page and "16 prompts seen" in page
        metrics = httpx.get(server.address + "/metrics").text
        assert (
            "sparsessm_drift_alarms_total 1.0" in metrics and 'sparsessm_drift_score{block="16"}' in metrics
        )
    assert len(lines) == 1 and lines[0].startswith("drift: score ")
    with served(model) as server:
        assert httpx.get(server.address + "/watch").status_code == 404
