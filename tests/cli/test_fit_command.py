"""`sparsessm fit`: the smallest size that keeps to limits, as a user meets it."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pages
import programs
import pytest
import torch
from command import COMMAND, FAST, refused, row_of, run
from pico import pico_tokenizer
from pico_hybrids import pico_hybrid

import sparsessm
from sparsessm import checkpoint
from sparsessm.cli.fitting import NOTHING
from sparsessm.data.texts import calibration_windows, fingerprint
from sparsessm.evaluation import beside_dense, timing
from sparsessm.evaluation.perplexity import Perplexity, difference, measure
from sparsessm.studies.trials import Trials
from sparsessm.studies.unseen import parted

pytestmark = pytest.mark.usefixtures("here")

FIT = ["fit", "dense", *FAST]
LIMIT = ["--max-increase", "0.3%"]


def finding(folder: Path | str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "fit.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def done(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory in which a size was found, as `out`, and what the command printed."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(shelf, folder, dirs_exist_ok=True)
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside_dense, "SPEED", {"batches": (1,), "rounds": 1, "prompt": 8})
        patch.setattr(timing, "PHASE", 0.2)
        patch.setattr(timing, "BUFFER", 1 << 20)
        return folder, run(*FIT, "-o", "out", *LIMIT).stdout


def test_a_size_is_found_verified_and_written(done: tuple[Path, str]) -> None:
    folder, printed = done
    out = folder / "out"
    found = finding(out)
    chosen, limit = found["chosen"], 0.003
    assert chosen["high"] <= limit and found["verified"]["high"] <= limit and found["feasible"]
    assert (out / "packed.safetensors").stat().st_size == chosen["bytes"]
    for point in found["points"]:  # one may fail on the other text alone
        unseen = any("the search did not see" in why for why in point["why"])
        assert point["feasible"] == (point["high"] <= limit and not unseen) == (not point["why"])
    assert chosen["bits"] == min(point["bits"] for point in found["points"] if point["feasible"])
    assert names(folder) == ["dense", "out", "text.txt"]
    assert row_of(printed, f"{chosen['bits']:g}")[-1] == "chosen"
    words = " ".join(printed.split())
    assert all(" ".join(sentence.split()) in words for sentence in found["why"]) and len(found["why"]) >= 3
    card = (out / "README.md").read_text()
    assert found["why"][0] in card and "## How the size was found" in card
    record = json.loads((out / "pruning.json").read_text())
    assert record["recipe"]["bits"] == chosen["bits"]
    assert record["perplexity"]["difference"]["high"] == chosen["high"]
    assert sparsessm.runtime.load(out).logits("the state").isfinite().all()


def test_the_result_is_that_of_prune_bit_for_bit(done: tuple[Path, str]) -> None:
    """What the sizes of a search share (prices, the survey) is what one run would have found."""
    out = done[0] / "out"
    run("prune", "dense", *FAST, "-o", "plain", "--bits", str(finding(out)["chosen"]["bits"]), "--no-eval")
    for file in ("packed.safetensors", "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == Path("plain", file).read_bytes(), file


def test_the_verification_is_on_text_that_neither_search_nor_calibration_saw(done: tuple[Path, str]) -> None:
    """Measured again here, from the file, on the windows that the finding names."""
    out = done[0] / "out"
    found = finding(out)
    dense = checkpoint.load("dense")
    tokens: Any = dense.tokenizer(Path("text.txt").read_text(), add_special_tokens=False)["input_ids"]
    every = torch.tensor(tokens)[: len(tokens) // 16 * 16].view(-1, 16)
    calibration = calibration_windows("text.txt", dense.tokenizer, samples=3, length=16, seed=0)
    stream = every.flatten().unfold(0, 16, 1)
    starts = {
        start for window in calibration for start in (stream == window).all(1).nonzero().flatten().tolist()
    }
    seen = {start // 16 for start in starts} | {(start + 15) // 16 for start in starts}
    searched, verified = parted(every, calibration)
    assert starts and not ({*searched.tolist()} | {*verified.tolist()}) & seen
    assert not {*searched.tolist()} & {*verified.tolist()}
    fingerprints = [fingerprint(every[part]) for part in (searched, verified)]
    assert fingerprints == [found["text"][name]["sha256"] for name in ("search", "verification")]

    def measured(folder: Path | str) -> Perplexity:
        return measure(checkpoint.load(folder).architecture(found["recipe"]["compute"]), every[verified], 1)

    again = difference(measured("dense"), measured(out))
    assert math.isclose(again.high, found["verified"]["high"], rel_tol=1e-6, abs_tol=1e-9)


def test_the_page_shows_the_search_and_the_verified_figures(
    done: tuple[Path, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the search knew is not measured again, neither by it nor by `report` afterwards."""
    shutil.copytree(done[0] / "out", here / "out")
    found, measured = finding(), json.loads(Path("out/measured.json").read_text())
    assert measured["perplexity"]["difference"] == found["verified"]
    assert measured["perplexity"]["pruned"]["fingerprint"] == found["text"]["verification"]["sha256"]
    dense = measured["perplexity"]["dense"]["perplexity"]
    assert math.isclose(dense, found["dense"]["verification"], rel_tol=1e-9)
    windows = min(beside_dense.FEW, found["text"]["verification"]["windows"])
    assert measured["divergence"]["tokens"] == windows * 15 and measured["divergence"]["mean"] > 0
    assert measured["speed"]["models"][0]["model"] == "out" and measured["asked"]["against"] == "dense"
    whole = Path("out/report.html").read_text()
    assert not any(".saving-" in Path("out", name).read_text() for name in ("report.html", "measured.json"))
    page = pages.Reader(whole)
    assert len(page.all_of("svg")) == 5
    said = " ".join(page.text.replace("\u00a0", " ").split())
    assert "Find the smallest size of dense at which perplexity rises by at most 0.3 % (" in said
    assert "What other sizes would cost" in said and " ".join(" ".join(found["why"]).split()) in said
    for point in found["refused"]:
        assert f"{point['bits']:g} bits: {'; '.join(point['why'])}" in said
    assert found["refused"] and "no held-out part" not in said + Path("out/README.md").read_text()
    monkeypatch.setattr(beside_dense._Work, "measure", None)  # a second measurement would fail
    run("report", "out", "-o", "again.html")
    assert Path("again.html").read_text() == whole


def test_without_matplotlib_the_result_is_written_and_the_page_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run(*FIT, "-o", "out", "--max-size", "17KB")
    assert "report.html is not written" in outcome.stderr and "sparsessm[plot]" in outcome.stderr
    assert finding()["feasible"] and not {"report.html", "measured.json"} & {*names(Path("out"))}


@pytest.mark.parametrize("content", ["{", '{"format": 99}', "[]"])
def test_a_finding_that_cannot_be_read_is_said_and_left_out(
    content: str, done: tuple[Path, str], here: Path
) -> None:
    shutil.copytree(done[0] / "out", here / "out")
    Path("out/fit.json").write_text(content)
    assert "the page does not show the search" in run("report", "out").stderr
    assert len(pages.Reader(Path("out/report.html").read_text()).all_of("svg")) == 4


def test_a_size_in_bytes_is_not_passed_and_filled_as_far_as_it_goes() -> None:
    run(*FIT, "-o", "out", "--max-size", "17KB")
    found = finding()
    assert len(found["points"]) == 1
    assert 0.95 * 17_000 <= found["chosen"]["bytes"] <= 17_000
    assert Path("out/packed.safetensors").stat().st_size <= 17_000
    assert "largest size" in found["why"][0]


def test_a_speed_is_measured_and_kept() -> None:
    run(*FIT, "-o", "out", "--min-speed", "20", *LIMIT)
    assert finding()["chosen"]["speed"] >= 20


NOT_FEASIBLE = [
    (["--max-increase", "0.0001%", "--max-size", "15.6KB"], "Nearest is", "max-increase is 0.0001%"),
    (["--max-increase", "0.3%", "--max-size", "15.6KB"], "Nearest is", "max-increase is 0.3%"),
    (["--max-size", "1KB"], "the fewest", "max-size is 1KB"),
    (["--min-speed", "999999999"], "Nearest is", "min-speed is 999999999"),
]


@pytest.mark.parametrize(("limits", "near", "missed"), NOT_FEASIBLE)
def test_where_nothing_is_feasible_the_nearest_is_named_and_nothing_written(
    limits: list[str], near: str, missed: str, here: Path
) -> None:
    before = names(here)
    outcome = run(*FIT, "-o", "out", *limits, code=NOTHING)
    words = " ".join(outcome.stdout.split())
    assert "No size is feasible" in words and near in words and missed in words
    assert "Nothing was written." in words and names(here) == before
    document = json.loads(run(*FIT, "-o", "out", *limits, "--json", code=NOTHING).stdout)
    assert document["out"] is None and document["chosen"] is None and not document["feasible"]
    assert (document["nearest"] is None) == (near == "the fewest")
    assert document["points"] or near == "the fewest"
    assert names(here) == before


def test_an_old_result_stays_where_nothing_is_feasible_and_where_it_is_not_to_be_replaced() -> None:
    run(*FIT, "-o", "out", "--max-size", "17KB")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert "'out' exists" in refused(*FIT, "-o", "out", "--max-size", "18KB")
    run(*FIT, "-o", "out", "--max-increase", "0.0001%", "--max-size", "15.6KB", "--force", code=NOTHING)
    assert before == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    run(*FIT, "-o", "out", "--max-size", "18KB", "--force")
    assert finding()["asked"]["max-size"] == 18_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no limit was given"),
        (["--max-increase", "2"], "write 2% for 2 %"),
        (["--max-increase", "abc"], "max-increase is 'abc'; allowed: a share"),
        (["--max-size", "big"], "max-size is 'big'; allowed: a size"),
        (["--min-speed", "0"], "min-speed is '0'; allowed: a number"),
        (["--max-drop", "1%"], "no task was named"),
        (["--max-increase", "1%", "--tasks", "piqa"], "needs --max-drop"),
        (["--max-increase", "1%", "--data", "nowhere"], "data"),
        (["--max-increase", "1%", "--data", "short.txt"], "share nothing with a calibration window"),
        (["--max-increase", "1%", "--length", "100000"], "text"),
    ],
)
def test_nonsense_is_refused_in_one_line_and_leaves_nothing(words: list[str], told: str, here: Path) -> None:
    Path("short.txt").write_text(Path("text.txt").read_text()[:100])
    before = names(here)
    assert told in refused(*FIT, "-o", "out", *words)
    assert names(here) == before


def test_a_directory_in_the_way_is_refused_before_the_work(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("mine")
    assert "is not a checkpoint" in refused(*FIT, "-o", "mine", "--max-size", "17KB", "--force")
    assert "overlaps the source" in refused(*FIT, "-o", "dense", "--max-size", "17KB", "--force")
    assert (here / "mine/notes.txt").read_text() == "mine"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sizes that were pruned to in this process."""
    sizes: list[float] = []
    real: Callable[..., Any] = Trials._tried

    def tried(self: Trials, bits: float) -> Any:
        sizes.append(bits)
        return real(self, bits)

    monkeypatch.setattr(Trials, "_tried", tried)
    return sizes


def test_a_killed_search_goes_on_where_it_was(
    here: Path, done: tuple[Path, str], counted: list[float]
) -> None:
    """kill -9 behind the first size that was measured: it is not measured again; the result is the same."""
    whole = done[0] / "out"
    sizes = [point["bits"] for point in finding(whole)["points"]]
    journal = here / "out.unfinished/journal.jsonl"
    with programs.Program([*COMMAND, *FIT, "-o", "out", *LIMIT, "--quiet"]) as program:
        until = time.monotonic() + 240
        while not (journal.is_file() and b'"point ' in journal.read_bytes()) and time.monotonic() < until:
            time.sleep(0.005)
        program.send_signal(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
    assert not Path("out").exists() and journal.is_file()
    line = refused(*FIT, "-o", "out", *LIMIT)
    assert "out.unfinished" in line and "--resume" in line and "steps done" in line
    line = refused(*FIT, "-o", "out", *LIMIT, "--resume", "--seed", "1")
    assert "seed 0, now 1" in line
    line = refused("prune", "dense", *FAST, "-o", "out", "--bits", "4", "--resume")
    assert "is the unfinished run of something else" in line
    outcome = run(*FIT, "-o", "out", *LIMIT, "--resume")
    assert "going on in" in outcome.stderr
    assert len(sizes) > 1 and sizes[0] not in counted and counted == sizes[len(sizes) - len(counted) :]
    assert not Path("out.unfinished").exists()
    for file in ("packed.safetensors", "config.json", "tokenizer.json"):
        assert Path("out", file).read_bytes() == (whole / file).read_bytes(), file
    assert finding()["verified"] == finding(whole)["verified"]
    assert [point["bits"] for point in finding()["points"]] == sizes


def test_resume_with_other_limits_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, counted: list[float]
) -> None:
    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "verify", ended)
        ends = run(*FIT, "-o", "out", *LIMIT, "--quiet", code=130)
    assert "what is done is kept in out.unfinished" in ends.stderr
    before = [*counted]
    counted.clear()
    run(*FIT, "-o", "out", "--max-increase", "50%", "--max-size", "17KB", "--resume")
    found = finding()
    assert found["asked"]["max-increase"] == 0.5 and found["asked"]["max-size"] == 17_000
    assert not {*counted} & {*before[-1:]} and len({*counted}) == len(counted)


def test_a_hybrid_has_a_speed_here(here: Path) -> None:
    pico_hybrid("zamba2").save_pretrained(here / "hybrid")
    pico_tokenizer().save_pretrained(here / "hybrid")
    words = ["fit", "hybrid", *FAST, "-o", "out"]
    outcome = run(*words, "--max-increase", "50%", "--min-speed", "1")
    found = finding()
    assert found["chosen"]["speed"] > 1 and "tokens/s here" in found["why"][0]
    assert row_of(outcome.stdout, f"{found['chosen']['bits']:g}")[-1] == "chosen"


@pytest.mark.parametrize(
    "how",
    [
        ["--pattern", "structured:channel", "--sparsity", "0.5"],
        ["--pattern", "structured:channel", "--allocation", "loss", "--sparsity", "0.5"],
        ["--bits", "5"],
    ],
    ids=["narrower", "widths of their own", "on the dial"],
)
def test_a_source_that_was_made_smaller_before(how: list[str], here: Path) -> None:
    run("prune", "dense", *FAST, "-o", "source", "--no-eval", *how)
    run("fit", "source", *FAST, "-o", "out", "--max-increase", "20%")
    found = finding()
    assert found["chosen"]["high"] <= 0.2 and found["verified"]["high"] <= 0.2
    assert sparsessm.runtime.load("out").logits("the state").isfinite().all()


@pytest.mark.usefixtures("little_library", "short_builtins")
def test_the_built_in_model() -> None:
    outcome = run(
        *("fit", "builtin:pycode", "-o", "out", "--samples", "2", "--length", "64"),
        *("--max-size", "0.88MB", "--json"),  # one size is tried
    )
    document = json.loads(outcome.stdout)
    assert document["feasible"] and document["out"] == "out"
    assert Path("out/packed.safetensors").stat().st_size == document["chosen"]["bytes"] <= 880_000
    assert document["verified"]["high"] <= 1.0 and document["chosen"]["speed"] > 0
    assert {event["event"] for event in map(json.loads, outcome.stderr.splitlines())} <= {
        "step", "progress", "note",
    }  # fmt: skip
    page = pages.Reader(Path("out/report.html").read_text())
    said = page.text.replace("\u00a0", " ")
    assert re.search(r"(A quarter|2[0-6] %) of the bytes, .*perplexity.*, ", said)
    assert "Find the largest size of builtin:pycode at which the file takes at most 880 kB." in said
    assert len(page.all_of("svg")) == 5 and Path("out/report.html").stat().st_size < 1_000_000
