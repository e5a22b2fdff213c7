"""How the program ends: signals at any moment, streams that fail, memory, threads, hostile names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparsessm import cli
from sparsessm.checkpoint import atomic
from sparsessm.cli import ending
from sparsessm.data import unfinished
from sparsessm.data.inert import visible
from sparsessm.runtime.threads import MOST_THREADS, checked_threads

PROGRAM = [sys.executable, "-m", "sparsessm"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
PRUNE = ["prune", "dense", "--data", "text.txt", "--samples", "2", "--length", "16", "--no-eval"]


def ran(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return programs.run([*PROGRAM, *words], **options)


def in_a_shell(*words: str) -> subprocess.CompletedProcess[str]:
    """From its start: where a stream is closed, Python begins without it."""
    line = " ".join([*PROGRAM, *words])
    return subprocess.run(line, shell=True, env=ALONE, capture_output=True, text=True, timeout=300)


# ---- signals


@pytest.mark.parametrize(
    ("sent", "module"), [(signal.SIGINT, "yaml"), (signal.SIGTERM, "typer"), (signal.SIGHUP, "torch")]
)
def test_a_signal_while_libraries_are_imported_ends_in_one_line(
    sent: signal.Signals, module: str, tmp_path: Path
) -> None:
    """A module that is imported on the way says when; it hides the real one."""
    (tmp_path / f"{module}.py").write_text("import os, time\nos.write(1, b'now')\ntime.sleep(60)\n")
    env = {**ALONE, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [*PROGRAM, "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup has it ignored
    ) as program:
        assert program.stdout and program.stdout.read(3) == "now"
        program.send_signal(sent)
        told = program.communicate(timeout=30)[1]
    assert (program.returncode, told) == (128 + sent, "interrupted; nothing was written\n")


# Runs the program and is interrupted at a chosen call of a chosen function, as often as asked for.
CUT = """
import os, signal, sys
import sparsessm.cli, sparsessm.cli.commands
from sparsessm.checkpoint import atomic
sys.argv = ["sparsessm", *sys.argv[4:]]
module, name = {"os": os, "atomic": atomic}[MODULE], NAME
real, left = getattr(module, name), [int(NUMBER)]
def cut(*arguments, **options):
    result = real(*arguments, **options)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
    return result
setattr(module, name, cut)
sparsessm.cli.main()
"""


KEPT = "interrupted; what is done is kept in out.unfinished: the same command with --resume goes on"


def interrupted(module: str, name: str, number: int, *words: str) -> subprocess.CompletedProcess[str]:
    code = CUT.replace("MODULE", repr(module)).replace("NAME", repr(name)).replace("NUMBER", str(number))
    return programs.run([sys.executable, "-c", code, "-", "-", "-", *words])


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (("os", "mkdir", 1), "interrupted; nothing was written"),
        (("os", "fsync", 2), "interrupted; nothing was written"),
        (("atomic", "_flush", 1), KEPT),
        (("os", "rename", 1), "interrupted; out is complete"),
        (("atomic", "_settle", 1), "interrupted; out is complete"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_interrupt_while_saving_says_what_is_there(
    place: tuple[str, str, int], told: str, here: Path
) -> None:
    """Two signals, wherever the save is: what is told is what the disk has, and nothing else is left."""
    before = sorted(path.name for path in here.iterdir())
    done = interrupted(*place, *PRUNE, "-q", "--method", "magnitude", "-o", "out")
    assert (done.stderr, done.returncode) in [(f"{told}\n", 130), (f"{told}\n", 143)]
    complete = "complete" in told
    left = ["out"] * complete + ["out.unfinished"] * (told == KEPT)
    assert sorted(path.name for path in here.iterdir()) == sorted(before + left)
    if told == KEPT:
        assert ran(*PRUNE, "-q", "--method", "magnitude", "-o", "out", "--resume").returncode == 0
        assert sorted(path.name for path in here.iterdir()) == sorted([*before, "out"])
    if complete:
        assert ran("inspect", "out", "--quiet").returncode == 0


@pytest.mark.parametrize(
    ("number", "told"), [(1, "out is as it was"), (2, "out is complete, in place of the old")]
)
def test_an_interrupt_while_replacing_keeps_the_old_or_the_new(number: int, told: str, here: Path) -> None:
    old = load_file("dense/model.safetensors")
    assert CliRunner().invoke(cli.app, [*PRUNE, "-q", "--method", "magnitude", "-o", "out"]).exit_code == 0
    marked = Path("out/model.safetensors").stat().st_ino
    done = interrupted("os", "rename", number, *PRUNE, "-q", "--method", "random", "-o", "out", "--force")
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
    kept = ["out.unfinished"] * (number == 1)
    assert sorted(path.name for path in here.iterdir()) == ["dense", "out", *kept, "text.txt"]
    assert (Path("out/model.safetensors").stat().st_ino == marked) == (number == 1)
    assert load_file("out/model.safetensors").keys() == old.keys()


def test_what_is_not_finished_is_undone_once_whoever_ends_it(tmp_path: Path) -> None:
    """`clear`, as a signal's handler calls it, at the worst moment; the block then ends as well."""
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic.replacing(tmp_path / "a/b/new") as folder:
        (folder / "file").write_text("half")
        unfinished.clear()
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "out"]
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_an_analysis_that_is_interrupted_says_that_it_goes_on(here: Path) -> None:
    words = ["analyze", "dense", "--data", "text.txt", "--samples", "2", "--windows", "2", "--length", "16"]
    done = interrupted("os", "fsync", 3, *words, "-o", "out", "-q")
    assert done.stderr == "interrupted; what is in out/analysis.json is kept, the same command goes on\n"
    assert [path.name for path in Path("out").iterdir()] == ["analysis.json"]


# ---- streams


def test_work_is_done_and_kept_where_nothing_can_be_printed(here: Path) -> None:
    with open("/dev/full", "w") as full:
        done = ran(*PRUNE, "-o", "a", stdout=full, stderr=full)
    assert done.returncode == 0
    assert in_a_shell(*PRUNE, "-o", "b", ">&-", "2>&-").returncode == 0
    reading, unread = os.pipe()
    os.close(reading)
    assert ran(*PRUNE, "-o", "c", stdout=unread).returncode == 0
    os.close(unread)
    assert load_file("a/model.safetensors").keys() == load_file("b/model.safetensors").keys()
    first, second = (json.loads(Path(name, "pruning.json").read_text()) for name in "ab")
    assert Path("c/pruning.json").is_file()
    assert first["targets"] == second["targets"]  # nothing printed has gone into a file that got its number


def test_a_dry_run_that_nobody_reads_ends_without_a_word(here: Path) -> None:
    reading, unread = os.pipe()
    os.close(reading)
    done = ran("prune", "dense", "--dry-run", stdout=unread)
    os.close(unread)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("closed", [False, True], ids=["full", "closed"])
def test_a_result_that_cannot_be_printed_is_an_error(closed: bool, here: Path) -> None:
    words = ["inspect", "dense", "--json"]
    with open("/dev/full", "w") as full:
        done = in_a_shell(*words, ">&-") if closed else ran(*words, stdout=full)
    assert done.returncode == 1
    event = json.loads(done.stderr)
    assert event["event"] == "error" and event["text"].startswith("stdout cannot be written to: ")


def test_a_terminal_without_unicode_gets_tables(here: Path) -> None:
    tensors = load_file("dense/model.safetensors")
    Path("dense").rename("größe")
    save_file(tensors, "größe/model.safetensors", {"format": "pt"})
    line, ascii = [*PROGRAM, "inspect", "größe"], {**ALONE, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, env=ascii, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout


# ---- names and text of files

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eback\u2066 \x00\x7f\r"


@given(st.text())
def test_visible_text_has_no_controls_and_loses_nothing_else(text: str) -> None:
    shown = visible(text)
    assert all(ord(char) >= 0x20 and not 0x7F <= ord(char) < 0xA0 for char in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()  # no halves of characters
    assert visible(shown) == shown
    if text.isprintable():
        assert shown == text


def test_names_of_tensors_and_fields_reach_a_terminal_as_text(here: Path) -> None:
    def bare(*words: str) -> str:
        outcome = CliRunner().invoke(cli.app, list(words))
        assert not {char for char in outcome.stdout + outcome.stderr if char in HOSTILE and char > "\x7f"}
        assert not {"\x1b", "\x07", "\x00", "\x7f", "\r"} & set(outcome.stdout + outcome.stderr)
        return outcome.stdout + outcome.stderr

    record = {"format": 1, "versions": {HOSTILE: HOSTILE}, "totals": {}, "targets": []}
    Path("dense/pruning.json").write_text(json.dumps({**record, "recipe": {"model": HOSTILE}}))
    bare("inspect", "dense")
    Path("dense/pruning.json").unlink()
    tensors = load_file("dense/model.safetensors")
    tensors[HOSTILE.replace("\x00", "")] = torch.ones(2)
    save_file(tensors, "dense/model.safetensors", {"format": "pt"})
    assert "\\x1b[31mred" in bare("inspect", "dense")
    Path("r.yaml").write_text(f'"method{HOSTILE[:4]}": 1\n')
    bare("prune", "dense", "--recipe", "r.yaml", "-o", "out")
    bare("eval", HOSTILE[:10])


def test_a_name_that_is_not_utf8_is_refused_in_one_line(here: Path) -> None:
    odd = os.fsencode(here) + b"/caf\xe9"
    Path("dense").rename(os.fsdecode(odd))
    line = [*PROGRAM, "inspect", odd]
    done = subprocess.run(line, env=ALONE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "caf\\xe9' is not UTF-8" in done.stderr and done.stderr.count("\n") == 1


# ---- memory, threads, bugs


def test_memory_that_is_short_is_one_line(here: Path) -> None:
    code = """
import resource, sys
import sparsessm.cli, sparsessm.cli.commands, sparsessm.runtime.engine
from transformers.models.mamba import modeling_mamba
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 8 * 2**20,) * 2)
sparsessm.cli.main()
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how large a process is")
    done = programs.run([sys.executable, "-c", code, "eval", "builtin:pycode", "--limit", "2", "--quiet"])
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory") and "--length" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("lib.so: failed to map segment from shared object"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("sparsity is 2"), False),
    ],
    ids=repr,
)
def test_what_libraries_say_of_memory_is_understood(error: Exception, short: bool) -> None:
    assert ending.is_shortage(error) == short
    wrapped = ValueError("cannot be read")
    wrapped.__cause__ = error
    assert ending.is_shortage(wrapped) == short


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize(
    "error", [TypeError("x"), RecursionError(), KeyError("y"), PanicException("z")], ids=repr
)
def test_a_bug_is_one_line_with_its_place(
    error: BaseException, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sparsessm.checkpoint.load", broken)
    outcome = CliRunner().invoke(cli.app, ["prune", "dense", "-o", "out"])
    assert outcome.exit_code == 1
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith(f"error: this is a bug: {type(error).__name__}")
    assert f"{Path(__file__).name}:" in outcome.stderr and "SPARSESSM_TRACEBACK" in outcome.stderr
    monkeypatch.setenv("SPARSESSM_TRACEBACK", "1")
    assert (
        "Traceback (most recent call last)"
        in CliRunner().invoke(cli.app, ["prune", "dense", "-o", "out"]).stderr
    )


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 100_000, 10**20, True, 2.0, "2"])
def test_a_number_of_threads_that_no_machine_has_is_refused(threads: Any) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads!r}; allowed: a whole number from 1 to "):
        checked_threads(threads)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OMP_NUM_THREADS", "100000", False),
        ("OMP_NUM_THREADS", "many", False),
        ("OMP_NUM_THREADS", "0", False),
        ("OMP_NUM_THREADS", "2,1", True),
        ("OMP_NUM_THREADS", " 1 ", True),
        ("RAYON_NUM_THREADS", "0", True),
        ("MKL_NUM_THREADS", "9" * 30, False),
    ],
)
def test_numbers_of_threads_in_the_environment_are_checked(
    name: str, value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    if allowed:
        return ending.refuse_surroundings([])
    with pytest.raises(ValueError, match=f"the environment has {name}="):
        ending.refuse_surroundings([])


def test_one_thread_that_finds_no_memory_ends_a_step_and_not_the_process() -> None:
    """Inside of the team, between its barriers: nobody waits for ever, and the next step is right."""
    code = """
import os, resource, torch
from sparsessm import kernels, runtime
engine = runtime.load("builtin:pycode").engine
many, few = list(engine.new_state(4000)), engine.new_state(2)
tokens, logits = torch.zeros(4000, dtype=torch.int64), torch.empty(4000, engine.vocabulary)
step = engine._decoder._native.step
step(kernels.LEVEL, 1, tokens, many, logits)  # what all threads share is there
step(kernels.LEVEL, 4, tokens[:2], list(few.clone()), right := logits[:2].clone())  # and the threads are
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
try:
    step(kernels.LEVEL, 4, tokens, many, logits)
    print("it had enough", flush=True)
except MemoryError:
    print("short", flush=True)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
for threads in (4, 10**6):
    step(kernels.LEVEL, threads, tokens[:2], list(few.clone()), again := logits[:2].clone())
    assert torch.equal(right, again)
os._exit(0)  # Triton, where it is installed, says what its bindings leak when Python ends
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how large a process is")
    done = programs.run([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("short\n", "it had enough\n")
