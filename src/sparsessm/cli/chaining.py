"""The command that runs a chain of commands: run.

Place in the flow: `chain.py` reads the file. Each step is a program of its own, so its memory is given back
at its end, and a crash ends it alone. What a step read and wrote is kept beside the chain, so the next run
leaves out what has not changed.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.foreign import decoded, from_json, read_bytes
from ..data.unfinished import undoing
from ..recipe.recipe import Recipe
from ..report import machine
from . import chain, tables
from .answering import START, Json, Quiet, answering, app, argument, option, print_json
from .choosing import chosen_in
from .progress import Progress, to_stderr

EXAMPLES = """Example of a chain:

  source: builtin:pycode

  steps: [{run: fit, model: source, max-increase: 2%}, {run: report, model: fit}]"""
FORMAT = 1
_NEUTRAL = ("memory",)  # options that change no result
_GRACE = 60.0  # seconds for a step to clear up
_STEP = """
import ctypes, os, signal, sys
parent = int(sys.argv.pop(1))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # when the chain is killed
if os.getppid() == parent:
    sys.argv[0] = "sparsessm"
    from sparsessm.cli import main
    main()
"""


@app.command(name="run", rich_help_panel=START, epilog=EXAMPLES)
def run_chain(
    file: Annotated[Path, argument(metavar="CHAIN", help="A YAML file with the steps (docs/chain.md).")],
    dry_run: Annotated[
        bool, option("--dry-run", help="Say which steps would run, and why; write nothing.")
    ] = False,
    force: Annotated[
        bool, option("--force", help="Run all steps, and replace what is there.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the steps of a chain, and leave out those whose inputs have not changed.

    A run that was cut short goes on: give the same command again.
    """
    done: list[dict[str, Any]] = []
    code = 0
    kept = "the steps that are done are kept, the same command goes on"
    told = to_stderr(quiet=quiet, events=as_json)
    with answering(quiet, streaming=True, nothing=kept, events=as_json):
        commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
        steps = chain.read(file, commands)
        folder = file.resolve().parent
        with _alone(file):
            kept_at = file.resolve().with_suffix(".json")
            record = _record(kept_at)
            _refuse_foreign(steps, record, folder, force)
            for step in steps:
                now = _inputs(step, folder)
                before = record.get(step.name)
                waits = [row["step"] for row in done if row["state"] == "runs" and row["step"] in step.after]
                why = f"after {', '.join(waits)}" if waits else _why(step, before, now, folder, force)
                row = {"step": step.name, "run": step.run, "out": step.out, "why": why}
                done.append(row)
                if dry_run or not why:
                    row["state"] = "runs" if why else "skipped"
                    if not dry_run:
                        told.note(f"{step.name}: skipped, nothing has changed")
                    continue
                told.note(f"{step.name}: {step.run} ({why})")
                again = before is not None and before["state"] == "begun" and not _changed(before, now)
                words = _words(step, folder, again, force, as_json=as_json, quiet=quiet)
                wrote = {"wrote": before["wrote"]} if before and before.get("wrote") else {}
                record[step.name] = {"state": "begun", **now, **wrote}
                _keep(kept_at, record)
                began = time.perf_counter()
                code, printed = _program(words, folder, as_json)
                row |= {"state": "failed" if code else "ran", "seconds": time.perf_counter() - began}
                with suppress(ValueError):  # a program that was ended may have printed half of it
                    row |= {"result": from_json(printed)} if printed.strip() else {}
                if code:
                    row["code"] = code
                    _tell_failure(step, code, told)
                    break
                record[step.name] = {"state": "done", **now, "wrote": _wrote(step, folder)}
                _keep(kept_at, record)
    if as_json:
        print_json({"chain": str(file), "dry_run": dry_run, "steps": done})
    elif not quiet:
        rows = [[row["step"], row["run"], row["state"], row["why"] or "nothing has changed"] for row in done]
        tables.show(tables.table(f"Steps of {file}", ["step", "command", "", "why"], rows, left=4))
        if dry_run:
            tables.show("A dry run: nothing was written.")
    if code:
        raise typer.Exit(code)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Only one run of a chain at a time."""
    handle = os.open(file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"chain {file}: another process runs it; wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _record(file: Path) -> dict[str, dict[str, Any]]:
    """What is known of the steps, by name.

    Raises:
        ValueError: the file is something else.
    """
    if not os.path.lexists(file):
        return {}
    content = read_bytes(file)
    try:
        told = from_json(decoded(content))
        if told["chain"] != FORMAT:
            raise ValueError
        for step in told["steps"].values():
            kinds = {"state": str, "options": dict, "files": dict, "versions": dict}
            if not all(isinstance(step[name], kind) for name, kind in kinds.items()):
                raise ValueError
        return told["steps"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: it is no record of a chain; remove it, or rename the chain") from None


def _keep(file: Path, record: Mapping[str, Any]) -> None:
    from ..checkpoint.atomic import write_text

    write_text(file, json.dumps({"chain": FORMAT, "steps": record}, indent=1) + "\n")


def _refuse_foreign(
    steps: Sequence[chain.Step], record: Mapping[str, Any], folder: Path, force: bool
) -> None:
    """Refuse, before any work, to write where something is that this chain did not make."""
    made = {entry["options"].get("out") for entry in record.values() if entry.get("wrote")}
    for step in steps:
        there = step.out is not None and step.out not in made and os.path.lexists(folder / step.out)
        if there and not force and step.run != "report":  # a page knows whether it may be replaced
            raise ValueError(
                f"step {step.name}: {step.out!r} exists, and this chain did not make it; choose another out, "
                "or replace it with --force"
            )


def _inputs(step: chain.Step, folder: Path) -> dict[str, Any]:
    """What the result of a step depends on: options, what the files that it reads hold, versions."""
    from ..checkpoint import local_folder
    from ..checkpoint.companions import BESIDE
    from ..checkpoint.digests import digest

    names = list(step.reads)
    if isinstance(recipe := step.options.get("recipe"), str):
        with suppress(ValueError, OSError):  # the command says it
            fields = Recipe.load(folder / recipe)
            names += [name for name in (fields.model, fields.data, fields.tokenizer) if name is not None]
    files = {}
    for name in dict.fromkeys(names):
        path = local_folder(name) if name.startswith("builtin:") else folder / name
        if path is not None and path.exists():
            # what is left beside a result changes only what is uploaded
            files[name] = digest(path, without=() if step.run == "upload" else BESIDE)
            if name == step.counted:  # its seconds are others each time
                with suppress(ValueError):  # it holds something else
                    files[name] = str(chosen_in(path))
    return {"options": step.options, "files": files, "versions": machine.versions()}


def _wrote(step: chain.Step, folder: Path) -> str | None:
    """What the result of a step holds; None where there is none."""
    from ..checkpoint.companions import BESIDE
    from ..checkpoint.digests import digest

    if step.out is None or not (folder / step.out).exists():
        return None
    return digest(folder / step.out, without=BESIDE)


def _why(
    step: chain.Step, before: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Path, force: bool
) -> str:
    """Why a step runs; empty: it does not."""
    if force:
        return "--force"
    if before is None:
        return "it did not run yet"
    if changed := _changed(before, now):
        return f"changed: {', '.join(changed)}"
    if before["state"] != "done":
        return "it did not end well"
    if step.out is not None and (wrote := _wrote(step, folder)) != before.get("wrote"):
        return f"{step.out} {'is gone' if wrote is None else 'was changed'}"
    return ""


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of options, files and packages that are not the same."""
    found = []
    for part in ("options", "files", "versions"):
        names = dict.fromkeys([*now[part], *before[part]])
        idle = _NEUTRAL if part == "options" else ()
        changed = [name for name in names if before[part].get(name) != now[part].get(name)]
        found += [name for name in changed if name not in idle]
    return list(dict.fromkeys(found))


def _words(
    step: chain.Step, folder: Path, again: bool, force: bool, *, as_json: bool, quiet: bool
) -> list[str]:
    """The command line of a step.

    Args:
        again: it was begun with the same inputs, and goes on where it can. force: of the chain.
    """
    from ..checkpoint import folder_of

    words = [step.run]
    there = step.out is not None and (folder / step.out).exists()
    left = step.kind.resumes and step.out is not None and folder_of(folder / step.out).is_dir()
    if left and again:
        words.append("--resume")
    # an analysis goes on in its own directory; a page knows itself what it may replace
    replaces = force if step.run == "report" else there or (left and not again)
    if step.forces and replaces and not (again and step.run == "analyze"):
        words.append("--force")
    if step.counted:
        words.append(f"--samples={chosen_in(folder / step.counted)}")
    return [*words, *["--json"] * as_json, *["--quiet"] * quiet, *step.arguments]


def _program(words: Sequence[str], folder: Path, captured: bool) -> tuple[int, str]:
    """Run a command as a program of its own; returns its exit code and, if asked for, what it printed."""
    sys.stdout.flush()
    line = [sys.executable, "-P", "-c", _STEP, str(os.getpid()), *words]
    pipe = subprocess.PIPE if captured else None
    with subprocess.Popen(line, cwd=folder, stdin=subprocess.DEVNULL, stdout=pipe) as program:
        with undoing(lambda: _end(program)):
            printed = program.communicate()[0] or b""
    code = program.returncode
    return (128 - code if code < 0 else code), printed.decode(errors="replace")


def _end(program: subprocess.Popen[bytes]) -> None:
    """Tell a step to end, and wait until it has cleared up. Called from the handler of a signal, too."""
    if program.returncode is not None:
        return
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(program.pid, signal.SIGTERM)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            if os.waitpid(program.pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(program.pid, signal.SIGKILL)


def _tell_failure(step: chain.Step, code: int, told: Progress) -> None:
    """One line on a step that failed; its own line is above."""
    how = f"ended with exit code {code}"
    if code > 128 and code - 128 == signal.SIGKILL:
        how = "was killed, as the system does where memory is short"
    told.note(f"step {step.name} {how}; the steps before it are kept, the same command goes on")
