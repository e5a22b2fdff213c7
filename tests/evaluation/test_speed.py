"""Measuring a model: the bytes are exact, the record and its tables say what was measured. No time is ever
asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import command
import pytest
import torch
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import load_file

from sparsessm import checkpoint, kernels, runtime
from sparsessm.cli.measuring import bandwidth_table, bytes_table, speed_table
from sparsessm.evaluation import speed as measuring
from sparsessm.evaluation import timing
from sparsessm.evaluation.speed import Measurement, Subject, measure, storage, subject
from sparsessm.evaluation.timing import Phase, Segment


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one with every second entry of its linear layers removed, as it is and packed."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("dense", "sparse"):
        model = pico_mamba()
        if name == "sparse":
            with torch.no_grad():
                for name_, parameter in model.backbone.layers.named_parameters():
                    if name_.endswith("proj.weight"):
                        parameter[:, ::2] = 0
                    if name_.endswith("A_log"):
                        parameter[:, 2:] = 38
        model.save_pretrained(folder / name)
        pico_tokenizer().save_pretrained(folder / name)
    checkpoint.pack(folder / "sparse", folder / "packed")
    checkpoint.pack(folder / "dense", folder / "half", dtype="bf16")
    return folder


@pytest.fixture(autouse=True)
def short(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a call or a few, small buffers."""
    monkeypatch.setattr(timing, "SEGMENT", 1e-4)
    monkeypatch.setattr(timing, "BUFFER", 2**20)


def brief(*models: Any, **options: Any) -> Measurement:
    return measure(*models, **{"prompt": 8, "rounds": 3, **options})


def test_resident_bytes_of_the_definition() -> None:
    from engines import reference

    model = pico_mamba()
    stored = sum(tensor.nbytes for tensor in model.backbone.state_dict().values())
    assert reference(model).resident == stored + 2 * 4 * 32 * 8  # A = -exp(A_log) of two layers beside it


def test_bytes_are_exact() -> None:
    found = brief("packed", "dense").record()
    packed, dense = (model["bytes"] for model in found["models"])
    assert packed["disk"] == Path("packed/packed.safetensors").stat().st_size
    assert dense["disk"] == Path("dense/model.safetensors").stat().st_size
    for name, sizes in (("packed", packed), ("dense", dense)):
        assert sizes["disk_all"] == sum(file.stat().st_size for file in Path(name).iterdir())
        engine: Any = runtime.load(name).engine
        assert sizes["resident"] == engine.resident
        assert sizes["read_per_step"] == engine.nbytes
        assert sizes["state_per_sequence"] == engine.new_state(1).nbytes
    if kernels.LEVEL != "reference":
        past, kept, all_ = 3 * 32, 2 * 32, 8 * 32
        assert packed["state_per_sequence"] == 2 * 4 * (past + kept)
        assert dense["state_per_sequence"] == 2 * 4 * (past + all_)
        assert packed["resident"] < dense["resident"]
    names = packed.keys() - {"process_grown"}  # of models this small it is noise
    assert found["ratios"]["bytes"] == {name: packed[name] / dense[name] for name in names}


def test_shards_and_memory_have_their_bytes(tmp_path: Path) -> None:
    pico_mamba().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    pico_tokenizer().save_pretrained(tmp_path / "sharded")
    shards = list((tmp_path / "sharded").glob("model-*.safetensors"))
    loaded = subject(tmp_path / "sharded")
    assert len(shards) > 1 and loaded.disk
    assert loaded.disk["weights"] == sum(shard.stat().st_size for shard in shards)
    held = Subject("here", loaded.engine, loaded.config, False, loaded.stored)
    sizes = brief(held, loaded).record()
    assert sizes["models"][0]["bytes"]["disk"] is None
    assert "disk" not in sizes["ratios"]["bytes"]
    assert ["on disk, weights", "-"] == bytes_table(sizes)[2][2][:2]


def test_how_weights_are_stored() -> None:
    dense, sparse, packed, half = (subject(name) for name in ("dense", "sparse", "packed", "half"))
    assert [each.packed for each in (dense, sparse, packed, half)] == [False, False, True, True]
    linear = "linear layers"
    tensors = load_file("sparse/model.safetensors")
    matrices = [tensor for name, tensor in tensors.items() if name.endswith("proj.weight")]
    zeros = sum(int((tensor == 0).sum()) for tensor in matrices) / sum(tensor.numel() for tensor in matrices)
    assert dense.stored[linear] == {"dtypes": ["float32"], "kinds": ["dense"], "zeros": 0.0}
    found = {"dtypes": ["float32"], "kinds": ["dense"], "zeros": pytest.approx(zeros)}
    assert sparse.stored[linear] == found
    assert packed.stored[linear]["dtypes"] == ["float32"]
    assert "2:4" in packed.stored[linear]["kinds"]
    assert packed.stored[linear]["zeros"] == pytest.approx(zeros)
    assert half.stored["embedding and head"] == {"dtypes": ["bfloat16"], "kinds": ["dense"], "zeros": 0.0}
    assert storage({})[linear] == {"dtypes": [], "kinds": [], "zeros": 0.0}


def test_each_model_runs_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = timing.timed

    def watched(engines: Any, **options: Any) -> Any:
        seen.extend(engines)
        return original(engines, **options)

    monkeypatch.setattr(timing, "timed", watched)
    brief("packed", "dense")
    token = torch.tensor([3])
    for engine, name in zip(seen, ("packed", "dense"), strict=True):
        expected = runtime.load(name).engine
        assert engine.layout == expected.layout
        got = engine.step(token, engine.new_state(1))
        assert torch.equal(got, expected.step(token, expected.new_state(1)))
    assert seen[0].layout != seen[1].layout


def test_a_model_beside_itself() -> None:
    found = brief("packed", "packed", batches=(2,)).record()
    ratios = found["ratios"]
    assert set(ratios["bytes"].values()) == {1.0}
    for spread in (ratios["prompt"], ratios["decode"]["2"]):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert list(ratios["decode"]) == ["2"]
    assert found["models"][0]["gb_per_second"] is None  # nothing was decoded alone


def test_the_record_survives_json() -> None:
    found = brief("packed", "dense", batches=(1, 4), threads=1).record()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [model["model"] for model in found["models"]] == ["packed", "dense"]
    assert (found["prompt_tokens"], found["threads"], found["kernels"]) == (8, 1, kernels.LEVEL)
    assert found["bandwidth"]["buffer"] == 2**20
    for model in found["models"]:
        speeds = model["tokens_per_second"]
        assert list(speeds["decode"]) == ["1", "4"]
        # of an even number of rounds the median of speeds is not quite that of times turned over
        steps, speed = 1e9 * model["gb_per_second"] / model["bytes"]["read_per_step"], speeds["decode"]["1"]
        assert speed["low"] * 0.999 <= steps <= speed["high"] * 1.001
    alone = brief("dense", batches=(1,)).record()
    assert alone["ratios"] is None and len(alone["models"]) == 1


def notes(*models: Any, **options: Any) -> list[str]:
    """Those that do not depend on how busy the machine is and how large its caches."""
    said = brief(*models, batches=(1,), **options).notes
    return [line for line in said if "faster than memory" not in line and "was busy" not in line]


def test_a_stock_model_claims_nothing_from_its_zeros() -> None:
    (line,) = notes("sparse", "dense")
    assert line.startswith("sparse is a stock checkpoint and was measured as dense: its zeros are read")
    assert "`sparsessm pack`" in line
    assert notes("packed", "dense") == []


def test_what_makes_a_ratio_say_something_else(tmp_path: Path) -> None:
    linear, head = notes("half", "dense")
    assert linear.startswith("The linear layers are bfloat16 and float32: ")
    assert head.startswith("The embedding and head are bfloat16 and float32: ")
    assert notes("packed", "packed") == ["packed is packed, so the ratios do not compare with a dense model."]
    pico_mamba(num_hidden_layers=1, vocab_size=70).save_pretrained("small")
    pico_tokenizer().save_pretrained("small")
    (line,) = notes("packed", "small")
    assert line == "The architectures differ: vocab_size 64 and 70, num_hidden_layers 2 and 1."


def test_a_busy_machine_and_a_cache_are_said() -> None:
    one = subject("packed")
    rounds = [(Segment(1e-9, 0.0),)]
    busy = Phase("decode", 1, 1, 1, rounds, disturbed=True)
    slow = timing.bandwidth([(1.0, 1.0)], 1)
    cache, machine = measuring._notes([one], [busy], slow)
    assert cache.startswith("packed is read faster than memory allows: its weights")
    assert "fewer than 3 rounds were undisturbed (decode at batch 1)" in machine
    calm = Phase("decode", 1, 1, 1, [(Segment(1e9, 0.0),)])
    assert measuring._notes([one], [calm], slow) == []
    (unknown,) = measuring._notes([one], [Phase("decode", 1, 1, 1, [(Segment(1e9, None),)])], slow)
    assert "does not report how long threads wait" in unknown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 0}, "prompt is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": 1.5}, "rounds is 1.5"),
        ({"batches": (1, -1)}, "batch -1 is -1"),
        ({"threads": 0}, "threads is 0; allowed: a whole number from 1"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure("packed", **options)


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measuring, "measure", lambda *given, **options: brief(*given, **options))
    yield


run = partial(command.run, "bench")


def test_bench_prints_tables(quick: None) -> None:
    outcome = run("packed", "--against", "dense", "--threads", "1")
    words = " ".join(outcome.stdout.split())
    for expected in (
        "50.76 % zeros", "on disk, weights", "state of a sequence", "prompt of 8 tokens",
        "decode, batch 16", "times as fast", "Tokens/s, 1 thread", "memory, copy (read and written)",
        f"{Path('packed/packed.safetensors').stat().st_size:,}",
    ):  # fmt: skip
        assert expected in words
    assert "stock checkpoint" not in words
    assert outcome.stderr.splitlines()[0] == "loading packed and dense"
    alone = run("sparse")
    assert "sparse is a stock checkpoint and was measured as dense" in " ".join(alone.stdout.split())
    assert "times as fast" not in alone.stdout
    assert (quiet := run("packed", "--quiet")).stdout == "" and quiet.stderr == ""


def test_bench_as_one_document(quick: None) -> None:
    outcome = run("packed", "--against", "dense", "--json", "--quiet")
    document = json.loads(outcome.stdout)
    assert outcome.stderr == ""
    assert document.keys() == brief("packed", "dense").record().keys()
    assert list(document["ratios"]["decode"]) == ["1", "4", "16"]


def test_tables_have_as_many_cells_as_columns() -> None:
    for models in (("packed",), ("packed", "dense")):
        record = brief(*models).record()
        for pages in (record, record | {"process_bytes": None}):
            for _, columns, rows in (bytes_table(pages), speed_table(pages), bandwidth_table(pages)):
                assert {len(row) for row in rows} == {len(columns)}
    record["rounds"]["prompt"] |= {"dropped": 2, "disturbed": True}
    assert speed_table(record)[2][0][-1].endswith(", disturbed, 2 dropped")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent/x/y"], "no such directory: 'absent/x/y'"),
        (["packed", "--against", "absent/x/y"], "no such directory: 'absent/x/y'"),
        (["packed", "--threads", "0"], "threads is 0"),
    ],
    ids=str,
)
def test_bench_refuses_in_one_line(arguments: list[str], words: str) -> None:
    outcome = run(*arguments, "--quiet", code=1)
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert outcome.stdout == ""
    assert "MODEL" in run(code=2).stderr
