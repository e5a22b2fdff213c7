"""Kill a run at random moments, go on with it, and compare the result with one that nobody disturbed.

    python tools/kills.py --kills 200

Each trial prunes a small random model by the command in a process of its own, which is killed (SIGKILL) after
a random time, once or several times in a row; `--resume` then goes on to the end. The directory must have the
bytes of the undisturbed one but for the seconds in its record, no block may have been finished twice, and
nothing may be left beside it. Prints a line for each kind of run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import MambaConfig, MambaForCausalLM

# loaded before the first fork: a child would take seconds for it
LOADED = ("checkpoint", "evaluation.before_after", "pruning", "studies.windows")
KINDS = {
    "entries, default": ["--sparsity", "0.5"],
    "entries and head": ["--target", "all", "--target", "head", "--method", "sparsegpt"],
    "2:4": ["--pattern", "2:4", "--price", "none"],
    "states": ["--pattern", "structured:state", "--sparsity", "0.5"],
    "blocks": ["--pattern", "structured:block", "--sparsity", "0.4"],
}


def model_at(folder: Path) -> None:
    """A Mamba of six small layers with the built-in tokenizer."""
    found = find_spec("sparsessm")
    assert found is not None and found.origin is not None
    source = Path(found.origin).parent / "builtin" / "pycode"
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 6, "time_step_rank": 4}
    MambaForCausalLM(MambaConfig(vocab_size=vocabulary, **shape)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def run(arguments: list[str], seconds: float | None) -> int:
    """The command in a process of its own; its exit code, negative where it was killed."""
    child = os.fork()
    if child == 0:
        sys.argv = ["sparsessm", *arguments]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        runpy.run_module("sparsessm", run_name="__main__")
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                return 0
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, the seconds left out of its record."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    record = json.loads(found["pruning.json"])
    record.pop("seconds")
    found["pruning.json"] = json.dumps(record).encode()
    found.pop("README.md")  # says the seconds too
    return found


def finished_twice(folder: Path) -> int:
    """Blocks that the journal of an unfinished run has more than once."""
    file = folder / "journal.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    blocks = [(line["stage"], line["block"]) for line in map(json.loads, lines) if "block" in line]
    return len(blocks) - len(set(blocks))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", default="256MiB", help="as of prune: a size that has no room streams")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in LOADED:
        importlib.import_module(f"sparsessm.{name}")
    draw = random.Random(given.seed)
    kills = wrong = 0
    root = Path(tempfile.mkdtemp())  # by hand: a child ends as a program does, and would remove it
    model_at(root / "model")
    for kind, options in KINDS.items():
        out, unfinished = root / "out", root / "out.unfinished"
        common = ["prune", str(root / "model"), "-o", str(out), "--samples", "3", "--length", "48"]
        common += ["--memory", given.memory, "--quiet", *options]
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        if code := run(common, None):
            print(f"{kind}: the undisturbed run ended with {code}")
            return 1
        whole = time.monotonic() - began
        expected, here, bad, resumed = content(out), 0, 0, 0
        while here < given.kills / len(KINDS):
            shutil.rmtree(out)
            go_on: list[str] = []
            while True:
                killed = run([*common, *go_on], draw.uniform(0, whole)) < 0
                here += killed
                go_on = ["--resume"] if unfinished.exists() else []
                resumed += bool(go_on)
                bad += finished_twice(unfinished) > 0
                if not killed or draw.random() < 0.5:
                    break
            if not out.exists() and run([*common, *go_on], None):
                bad += 1
                break
            bad += content(out) != expected or unfinished.exists()
        kills, wrong = kills + here, wrong + bad
        print(f"{kind}: {here} kills, {resumed} left something to go on from, {bad} wrong", flush=True)
    shutil.rmtree(root)
    print(f"{kills} kills, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
