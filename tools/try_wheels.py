"""Install each wheel of dist/ into an environment of its own, where there is no compiler, and use it.

    python tools/try_wheels.py python3.11 python3.13

Place in the flow: `make wheel-test`, after `make wheel`. pip itself chooses the wheel for each interpreter.
PATH then holds the environment's own programs only, and the work is done in an empty directory, so that
neither the repository nor a compiler can help. The kernels must be native; a small prune with bits and some
text must come out, also with the portable kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRUNE = "sparsessm prune builtin:pycode -o small --bits 3.25 --samples 2 --length 128 --no-eval --quiet"
GENERATE = "sparsessm generate small import --max-new-tokens 8 --quiet"


def said(folder: Path, command: str | list[str], **environment: str) -> str:
    """What a program of the environment `folder`/venv prints, run in `folder`, with its own PATH."""
    programs = folder / "venv/bin"
    kept = {
        key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "HTTP", "NO_"))
    }
    clean = {**kept, "PATH": str(programs), "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    program, *words = command.split() if isinstance(command, str) else command
    done = subprocess.run(
        [programs / program, *words], cwd=folder, env=clean, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: `{command}` ended with {done.returncode}")
    return done.stdout.strip()


def tried(python: str, dist: Path) -> str:
    """Install and use the wheel for an interpreter; a line that says what was seen.

    Raises:
        SystemExit: something failed, or the kernels are not native.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        install = ["pip", "install", "-q", "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt")]
        install += ["--find-links", str(dist), "sparsessm"]
        said(folder, [*install, "--no-index", "--no-deps"])  # ours, not a registry's
        said(folder, install)
        version = said(folder, "sparsessm --version")
        portable = said(folder, "sparsessm --version", SPARSESSM_KERNELS="portable")
        if "reference" in version or "(kernels: portable)" not in portable:
            raise SystemExit(f"error: no native kernels: {version}; {portable}")
        said(folder, PRUNE)
        texts = [said(folder, GENERATE), said(folder, GENERATE, SPARSESSM_KERNELS="portable")]
        if not all(texts):
            raise SystemExit("error: a model pruned by the wheel generates nothing")
        installed = said(folder, "python --version")
        return f"{installed}: {version}; pruned, and generated {texts[0]!r}, portable {texts[1]!r}"


def main() -> None:
    if not sys.argv[1:]:
        raise SystemExit("error: name the interpreters, such as python3.12")
    for python in sys.argv[1:]:
        print(tried(python, ROOT / "dist"), flush=True)


if __name__ == "__main__":
    main()
