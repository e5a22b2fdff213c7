"""Build a release: an sdist, and from it wheels that run on any Linux with glibc 2.17 and later.

    python tools/wheels.py python3.11 python3.12        # into dist/

Place in the flow: `make wheel`. Each wheel is built from the unpacked sdist, so that the sdist is known to
build. The compiler is clang as the package ziglang has it: it links against the symbols of glibc 2.17,
whatever this machine has, and takes its C++ library in. CPython 3.11 gets a wheel of its own; what 3.12
builds uses the stable ABI and serves all later versions (pyproject.toml). auditwheel checks what a wheel
needs, and names it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLIBC = "2.17"
BUILD = {
    "CXXFLAGS": "-include stdio.h",  # nanobind counts on Python.h for it, whose stable part has it no more
    "LDFLAGS": "-s",  # clang keeps the names of all functions otherwise
}
LARGEST = 40_000_000  # bytes of a wheel


def run(*command: str | Path, **environment: str) -> None:
    """Run a command with this Python's own programs first; what fails ends the build with its exit code."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run([str(word) for word in command], env={**os.environ, "PATH": path, **environment})
    if done.returncode:
        raise SystemExit(f"error: {command[0]} failed")


def compiler(folder: Path) -> Path:
    """A program that compiles C++ for an old glibc: CMake wants one path."""
    script = folder / "c++"
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target {target} "$@"\n')
    script.chmod(0o755)
    return script


def build(pythons: list[str], out: Path) -> list[Path]:
    """The sdist and the wheels, in `out`, which is replaced as a whole at the end.

    Args:
        pythons: interpreters, as names or paths; each builds one wheel.
        out: a directory.

    Raises:
        SystemExit: a step failed, or a wheel is too large; `out` is then as it was.
    """
    with tempfile.TemporaryDirectory() as made:
        work, done = Path(made), Path(made, "done")
        run(sys.executable, "-m", "build", "--sdist", "-o", done, ROOT)
        (sdist,) = done.iterdir()
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        source = work / sdist.name.removesuffix(".tar.gz")
        for i, python in enumerate(pythons):
            raw = work / f"raw{i}"
            run(
                python,
                "-m",
                "pip",
                "wheel",
                "-q",
                "--no-deps",
                "-w",
                raw,
                source,
                **BUILD,
                CXX=str(compiler(work)),
            )
            (wheel,) = raw.iterdir()
            tag = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
            run("auditwheel", "repair", "--plat", tag, "-w", done, wheel)
        results = sorted(done.iterdir())
        large = [file.name for file in results if file.stat().st_size > LARGEST]
        if large:
            raise SystemExit(f"error: larger than {LARGEST:,} bytes: {', '.join(large)}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(done, out)
        return [out / file.name for file in results]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreters that build a wheel each")
    options = parser.parse_args()
    missing = [name for name in options.pythons if not shutil.which(name)]
    if missing:
        parser.error(f"there is no {', '.join(missing)}; give names or paths of CPython 3.11 or later")
    for file in build(options.pythons, ROOT / "dist"):
        print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
