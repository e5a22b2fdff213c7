"""Measuring a model: the bytes are exact, the clockwork is what it says. No time is ever asserted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from sparsessm import checkpoint, cli, kernels, runtime
from sparsessm.cli.measuring import bandwidth_table, bytes_table, speed_table
from sparsessm.evaluation import speed as measuring
from sparsessm.evaluation import timing
from sparsessm.evaluation.speed import Measurement, Subject, measure, storage, subject
from sparsessm.evaluation.timing import Phase, Segment, Spread, clean, settled

GOOD, STOLEN = Segment(1.0, 0.01), Segment(1.0, 0.1)


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
def short(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a call or a few, small buffers."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "SEGMENT", 1e-4)
    monkeypatch.setattr(timing, "BUFFER", 2**20)


def brief(*models: Any, **options: Any) -> Measurement:
    return measure(*models, **{"prompt": 8, "rounds": 3, **options})


class Recorder:
    """An engine that does nothing but say that it was called."""

    vocabulary, state_size, layout, nbytes, resident = 64, 5, "", 1, 2

    def __init__(self, name: str, log: list[tuple[str, str, list[int]]], vocabulary: int = 64) -> None:
        self.name, self.log, self.vocabulary = name, log, vocabulary

    def new_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.state_size)

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        assert state.shape == (self.state_size,) and not state.any()
        state += 1  # a prompt is read from the beginning each time
        self.log.append((self.name, "prompt", tokens.tolist()))
        return torch.zeros(self.vocabulary)

    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        assert state.shape == (len(tokens), self.state_size)
        self.log.append((self.name, f"step {len(tokens)}", tokens.tolist()))
        return torch.zeros(len(tokens), self.vocabulary)


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)


def test_a_phase_says_seconds_tokens_and_ratios_of_rounds() -> None:
    rounds = [(Segment(1.0, 0.0), Segment(2.0, 0.0)), (Segment(2.0, 0.0), Segment(8.0, None))]
    phase = Phase("decode", 4, 4, 10, rounds)
    assert phase.seconds(0) == Spread.of([0.1, 0.2])
    assert phase.speed(1) == Spread.of([20.0, 5.0])
    assert phase.ratio(0, 1) == Spread.of([2.0, 4.0])  # and not the ratio of the medians
    assert phase.ratio(1, 0) == Spread.of([0.5, 0.25])
    assert phase.ratio(1, 1) == Spread(1.0, 1.0, 1.0)
    assert not phase.watched and Phase("decode", 4, 4, 10, rounds[:1]).watched


def test_rounds_that_were_preempted_do_not_count() -> None:
    rounds = [(GOOD, GOOD), (GOOD, STOLEN), (STOLEN, GOOD), (GOOD, GOOD)]
    assert clean(rounds) == [True, False, False, True]
    assert clean([(Segment(1.0, 0.03),), (Segment(1.0, 0.031),)]) == [True, False]
    assert clean([(Segment(0.0, 0.0),)]) == [True]  # shorter than the clock
    assert clean([(Segment(1.0, None), GOOD), (Segment(1.0, None), STOLEN)]) == [True, False]


def test_what_one_thread_lost_is_what_its_clock_lacks() -> None:
    asleep = timing.segment(lambda: time.sleep(0.02), 2, 1)
    assert asleep.lost and 0.03 < asleep.lost <= asleep.wall
    assert clean([(asleep,)]) == [False]


def test_what_several_threads_lost_is_what_they_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for thread, text in (("1", "9 1500000000 3"), ("2", "9 500000000 3"), ("3", "")):
        (tmp_path / "tasks" / thread).mkdir(parents=True)
        (tmp_path / "tasks" / thread / "schedstat").write_text(text)
    (tmp_path / "tasks" / "4").mkdir()  # ended
    monkeypatch.setattr(timing, "TASKS", tmp_path / "tasks")
    assert timing.waited() == 2.0

    def wait() -> None:
        (tmp_path / "tasks" / "2" / "schedstat").write_text("9 750000000 4")

    assert timing.segment(wait, 1, 2).lost == 0.25
    for nowhere in (tmp_path / "absent", tmp_path / "tasks" / "4"):
        monkeypatch.setattr(timing, "TASKS", nowhere)
        assert timing.waited() is None
        assert timing.segment(lambda: None, 1, 2).lost is None


def test_there_is_always_a_number() -> None:
    good, stolen = (GOOD, GOOD), (GOOD, STOLEN)

    def of(*rounds: timing.Round) -> Phase:
        return settled(Phase("decode", 1, 1, 1, list(rounds)))

    some = of(good, stolen, good, good)
    assert (some.rounds, some.dropped, some.disturbed) == ([good] * 3, 1, False)
    few = of(good, stolen, stolen, good)
    assert (len(few.rounds), few.dropped, few.disturbed) == (4, 0, True)
    none = of(stolen)
    assert (len(none.rounds), none.dropped, none.disturbed) == (1, 0, True)
    assert of(good).disturbed is False  # no more than one was asked for


def test_engines_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SEGMENT", 0.0)
    monkeypatch.setattr(timing, "clean", lambda rounds: [True] * len(rounds))
    log: list[tuple[str, str, list[int]]] = []
    told: list[tuple[str, int, int]] = []
    engines = [Recorder("a", log), Recorder("b", log, vocabulary=7)]
    phases = timing.timed(
        engines, prompt=6, batches=(1, 3), rounds=4, progress=lambda *each: told.append(each)
    )
    names = [("prompt", 1, 6), ("decode", 1, 1), ("decode", 3, 3)]
    assert [(phase.name, phase.batch, phase.tokens) for phase in phases] == names
    assert [(phase.calls, len(phase.rounds), phase.dropped) for phase in phases] == [(1, 4, 0)] * 3
    kinds = ["prompt", "step 1", "step 3"]
    warm, rest = log[:6], log[6:]
    assert [(name, kind) for name, kind, _ in warm] == [(name, kind) for kind in kinds for name in "ab"]
    expected = [
        (name, kind) for turn in range(4) for kind in kinds for name in ("ab" if turn % 2 == 0 else "ba")
    ]
    assert [(name, kind) for name, kind, _ in rest] == expected
    for kind in kinds:  # both read the same tokens, which both have
        read = {name: [ids for by, what, ids in log if (by, what) == (name, kind)] for name in "ab"}
        assert read["a"] == read["b"]
        assert max(token for ids in read["a"] for token in ids) < 7
    assert told[-1] == ("bench", 12, 12) and len(told) == 12
    again: list[tuple[str, str, list[int]]] = []
    timing.timed([Recorder("a", again)], prompt=6, batches=(1, 3), rounds=1)
    log.clear()
    timing.timed([Recorder("a", log)], prompt=6, batches=(1, 3), rounds=1)
    assert log == again  # seeded


def test_what_does_not_count_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    def run(rounds: int, every: int) -> Phase:
        """Every so many rounds count."""

        def some(found: list[timing.Round]) -> list[bool]:
            return [number % every == every - 1 for number in range(len(found))]

        monkeypatch.setattr(timing, "clean", some)
        told.clear()
        engines = [Recorder("a", [])]
        (phase,) = timing.timed(
            engines, prompt=2, batches=(), rounds=rounds, progress=lambda *each: told.append(each)
        )
        assert told[-1] == ("bench", rounds, rounds)
        return phase

    half = run(4, 2)
    assert (len(half.rounds), half.dropped, half.disturbed) == (4, 4, False)
    third = run(9, 3)
    assert (len(third.rounds), third.dropped, third.disturbed) == (6, 12, False)  # not without end
    assert run(4, 100).disturbed


def test_a_slow_phase_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PHASE", 0.0)
    monkeypatch.setattr(timing, "clean", lambda rounds: [True] * len(rounds))
    (phase,) = timing.timed([Recorder("a", [])], prompt=2, batches=(), rounds=50)
    assert len(phase.rounds) == timing.FEWEST
    (phase,) = timing.timed([Recorder("a", [])], prompt=2, batches=(), rounds=2)
    assert len(phase.rounds) == 2


def test_the_memory_of_the_machine() -> None:
    found = timing.passes(2, 2**16)
    assert len(found) == 2 and all(seconds > 0 for each in found for seconds in each)
    said = timing.bandwidth([(1.0, 2.0), (2.0, 4.0), (4.0, 8.0)], 10**9)
    assert said.buffer == 10**9
    assert said.copy == Spread.of([2.0, 1.0, 0.5])  # reads and writes
    assert said.read == Spread.of([0.5, 0.25, 0.125])


def test_the_size_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timing.process_bytes()
    assert found is None or 2**20 < found < 2**40
    monkeypatch.setattr(timing, "STATM", Path("no/such/file"))
    assert timing.process_bytes() is None


@both
def test_what_an_engine_holds(make: Any) -> None:
    tied, own = make(pico_mamba()), make(pico_mamba(tie_word_embeddings=False))
    embedding = 4 * 64 * 16
    # a head of its own is read in place of the embedding, which stays in memory
    assert own.nbytes == tied.nbytes
    assert own.resident == tied.resident + embedding
    assert tied.resident >= tied.nbytes > embedding


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


def run(*arguments: str, code: int = 0) -> Any:
    outcome = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert outcome.exit_code == code, (outcome.stdout, outcome.stderr, outcome.exception)
    return outcome


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
    assert "DIR" in run(code=2).stderr
