"""The source distribution: what building takes, and nothing else. `make wheel` builds wheels from it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from sources import ROOT

BESIDE = {
    "pyproject.toml",
    "constraints.txt",
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "PKG-INFO",
}
MADE = {".py", ".pyi", ".cpp", ".h", ".json", ".md", ".typed", ".safetensors", ".css", ".js"}
# Stored, not compressed: this is about names.
BUILD = """
import gzip, sys
from scikit_build_core.build import build_sdist
gzip.GzipFile.__init__.__defaults__ = (None, None, 0, None, None)
build_sdist(sys.argv[1])
"""


def unwanted(names: set[str]) -> set[str]:
    """Of the files of an sdist those that no build needs."""
    return {
        name
        for name in names
        if name not in BESIDE and not (name.startswith("src/sparsessm/") and is_source(Path(name)))
    }


def is_source(file: Path) -> bool:
    return (file.suffix in MADE or file.name == "py.typed") and "__pycache__" not in file.parts


def test_the_sdist_has_what_building_takes_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (made,) = tmp_path.iterdir()
    with tarfile.open(made) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    here = {file.relative_to(ROOT).as_posix() for file in (ROOT / "src").rglob("*") if is_source(file)}
    assert {file for file in here if (ROOT / file).is_file()} | BESIDE == names
    assert not unwanted(names)


def test_what_does_not_belong_is_found() -> None:
    odd = {
        "dev/LOG.md",
        "tests/x.py",
        "src/sparsessm/kernels/_native.so",
        "src/sparsessm/__pycache__/a.py",
        ".env",
    }
    assert unwanted(odd | {"LICENSE", "src/sparsessm/kernels/scan.h"}) == odd


def test_cmake_finds_each_source_that_it_names() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    named = {word.split("/")[1] for word in text.replace(")", " ").split() if word.startswith("${kernels}/")}
    kernels = {file.name for file in (ROOT / "src/sparsessm/kernels").glob("*.cpp")}
    assert named == kernels
