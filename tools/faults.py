"""Try the promises of docs/faults.md: signals, kills, full disks, damaged files, little memory.

    python tools/faults.py            # everything ten times as often
    python tools/faults.py --quick    # about four minutes

Prints a table of figures. Everything happens in a temporary directory; exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAM = [sys.executable, "-m", "sparsessm"]
MODEL = "builtin:pycode"
PRUNE = ["prune", MODEL, "--samples", "2", "--length", "128", "--no-eval", "--method", "magnitude"]
RESULT = {"config.json", "pruning.json", "model.safetensors"}
PACKED = {"config.json", "packed.safetensors"}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# Limits itself and runs the program: what a full disk, or a machine with little memory, does to it.
LIMITED = """
import resource, sys
kind, amount = sys.argv[1], int(sys.argv[2])
sys.argv = ["sparsessm", *sys.argv[3:]]
import sparsessm.cli, sparsessm.cli.commands, sparsessm.checkpoint, sparsessm.runtime.engine
from transformers.models.mamba import modeling_mamba
if kind == "memory":
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + amount, size + amount))
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
sparsessm.cli.main()
"""

Found = Counter[str]


def whole(target: Path, names: set[str]) -> bool:
    """Whether a result is there with all of its files, and every tensor can be read."""
    if not names <= {path.name for path in target.iterdir()}:
        return False
    from sparsessm.checkpoint import load, packed

    try:
        packed.read(target) if "packed.safetensors" in names else load(target)
    except ValueError:
        return False
    return True


def judge(found: Found, work: Path, target: Path, names: set[str], told: str) -> None:
    """Count what a run left behind that it must not leave."""
    found["runs"] += 1
    found["tracebacks"] += "Traceback" in told
    found["litter"] += any(path.name.startswith(".") for path in work.iterdir())
    if target.exists():
        found["complete"] += 1
        found["broken targets"] += not whole(target, names)


def start(words: list[str], work: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *words], cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def duration(words: list[str], work: Path) -> float:
    """Seconds that a command takes undisturbed."""
    began = time.monotonic()
    start(words, work).communicate()
    return time.monotonic() - began


def interrupts(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """Ctrl-C and SIGTERM, one or two, at random moments from the first import to the exit."""
    for name, words, names in (
        ("prune", [*PRUNE, "-q", "-o", "out"], RESULT),
        ("prune --force", [*PRUNE, "-q", "-o", "out", "--force"], RESULT),
        ("pack", ["pack", MODEL, "-q", "-o", "out"], PACKED),
        ("generate", ["generate", MODEL, "import os", "-n", "40", "-q"], set()),
    ):
        found, target = Found(), work / "out"
        replaced = "--force" in words
        span = duration(words, work)
        for _ in range(number):
            if replaced and not target.exists():
                start(words, work).communicate()
            elif not replaced:
                shutil.rmtree(target, ignore_errors=True)
            before = target.stat().st_ino if target.exists() else None
            program, sent = start(words, work), draw.choice(list(SIGNALS))
            time.sleep(draw.uniform(0.1, span))  # before, Python itself starts
            program.send_signal(sent)
            if draw.random() < 0.3:
                time.sleep(draw.uniform(0, 0.01))
                program.send_signal(sent)
            told = program.communicate()[1]
            judge(found, work, target, names, told)
            if program.returncode == 0:
                found["too late"] += 1
                continue
            now = target.stat().st_ino if target.exists() else None
            found["wrong exit codes"] += program.returncode != SIGNALS[sent]
            found["not one line"] += told.count("\n") != 1
            kept = now == before
            said = "complete" not in told if kept else "complete" in told
            found["told wrong"] += not said or (
                replaced and kept and "as it was" not in told and "nothing" not in told
            )
        yield f"signals, {name}", found
        shutil.rmtree(target, ignore_errors=True)


def kills(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """kill -9 while a result is being replaced: the old or the new is there, the next run clears up."""
    found, target = Found(), work / "out"
    words = [*PRUNE, "-q", "-o", "out", "--force"]
    span = duration(words, work)
    for _ in range(number):
        program, began = start(words, work), time.monotonic()
        while (
            not list(work.glob(".out.saving-*"))
            and program.poll() is None
            and time.monotonic() - began < 9 * span
        ):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.03))
        program.kill()
        program.communicate()
        subprocess.run([*PROGRAM, *words, "--samples", "1"], cwd=work, capture_output=True)
        judge(found, work, target, RESULT, "")
        found["lost targets"] += not target.exists()
    yield "kill -9 while saving, and the next run", found
    shutil.rmtree(target, ignore_errors=True)


def limited(kind: str, amount: int, words: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", LIMITED, kind, str(amount), *words]
    return subprocess.run(line, cwd=work, capture_output=True, text=True)


def full_disks(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """A disk that takes so many bytes of a file and no more; the old result must stay."""
    found, target = Found(), work / "out"
    words = [*PRUNE, "-q", "-o", "out", "--force"]
    start(words, work).communicate()
    size = (target / "model.safetensors").stat().st_size
    for _ in range(number):
        done = limited("disk", draw.randrange(size), words, work)
        judge(found, work, target, RESULT, done.stderr)
        found["wrong exit codes"] += done.returncode != 1
        found["not one line"] += not done.stderr.startswith("error: ") or done.stderr.count("\n") != 1
        found["lost targets"] += not target.exists()
    yield "full disks", found
    shutil.rmtree(target, ignore_errors=True)


def short_memory(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """Address space for 1 to 150 MiB more than the imported libraries take."""
    found, target = Found(), work / "out"
    for _ in range(number):
        words = draw.choice(
            [
                ["generate", MODEL, "import os", "-n", "2", "-q"],
                ["eval", MODEL, "--limit", "2", "--length", "512", "-q"],
                ["pack", MODEL, "-q", "-o", "out", "--force"],
                [*PRUNE, "-q", "-o", "out", "--force"],
            ]
        )
        done = limited("memory", int(draw.uniform(1, 150) * 2**20), words, work)
        shutil.rmtree(target, ignore_errors=True) if words[0] == "pack" else None
        judge(found, work, target, RESULT, done.stderr)
        found["signals"] += done.returncode < 0
        found["wrong exit codes"] += done.returncode not in (0, 1)
        found["enough"] += done.returncode == 0
    yield "little memory", found
    shutil.rmtree(target, ignore_errors=True)


def damages(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """Bytes of a packed file changed, cut off or added: refused in words, or read as numbers."""
    code = """
import random, sys
from pathlib import Path
import sparsessm
file, number, draw = Path("packed/packed.safetensors"), int(sys.argv[1]), random.Random(int(sys.argv[2]))
good = file.read_bytes()
for _ in range(number):
    data = bytearray(good)
    where = draw.randrange(len(data) if draw.random() < 0.5 else 4096)
    if draw.random() < 0.2:
        data = data[:where]
    else:
        data[where : where + draw.choice([0, 1, 8])] = draw.randbytes(draw.choice([1, 1, 8]))
    file.write_bytes(data)
    try:
        sparsessm.runtime.load("packed").generate("import", 2)
        print("read")
    except ValueError:
        print("refused")
    except MemoryError:
        print("memory")
file.write_bytes(good)
"""
    start(["pack", MODEL, "-q", "-o", "packed"], work).communicate()
    line = [sys.executable, "-c", code, str(number), str(draw.randrange(10**6))]
    done = subprocess.run(line, cwd=work, capture_output=True, text=True)
    found = Found(done.stdout.split())
    found["runs"], found["tracebacks"] = number, done.stderr.count("Traceback")
    found["crashes"] = number - len(done.stdout.split())
    yield "damaged packed files", found


def hostile_streams(number: int, work: Path, draw: random.Random) -> Iterator[tuple[str, Found]]:
    """stdout and stderr full, closed, or a pipe that nobody reads: the result is written all the same."""
    found = Found()
    for one in (">/dev/full", ">&-", "| true"):
        for two in ("2>/dev/full", "2>&-", ""):
            if one == "| true" and two == "2>&-":
                continue
            shutil.rmtree(work / "out", ignore_errors=True)
            shell = f"set -o pipefail; {' '.join([*PROGRAM, *PRUNE])} -o out {two} {one}"
            done = subprocess.run(["bash", "-c", shell], cwd=work, capture_output=True, text=True)
            judge(found, work, work / "out", RESULT, done.stderr)
            found["wrong exit codes"] += done.returncode != 0
            found["lost targets"] += not (work / "out").exists()
    yield "full and closed streams", found


ALL: dict[str, tuple[Callable[[int, Path, random.Random], Iterator[tuple[str, Found]]], int, int]] = {
    "interrupts": (interrupts, 60, 6),  # each of four commands; what it takes, times as often, and quickly
    "kills": (kills, 60, 4),
    "disks": (full_disks, 40, 4),
    "memory": (short_memory, 60, 6),
    "damages": (damages, 2000, 200),
    "streams": (hostile_streams, 1, 1),
}
BROKEN = (
    "broken targets",
    "lost targets",
    "litter",
    "tracebacks",
    "wrong exit codes",
    "not one line",
    "told wrong",
)
BROKEN += ("signals", "crashes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--only", choices=ALL, help="one kind of fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    broken = 0
    for name, (run, often, quick) in ALL.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as work:
            draw = random.Random(f"{name} {options.seed}")
            for title, found in run(quick if options.quick else often, Path(work), draw):
                rest = ", ".join(f"{found[key]} {key}" for key in found if key not in ("runs", *BROKEN))
                bad = ", ".join(f"{found[key]} {key}" for key in BROKEN if key in found)
                print(f"{title}: {found['runs']} runs ({rest}); {bad}", flush=True)
                broken += sum(found[key] for key in BROKEN)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
