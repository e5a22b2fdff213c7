"""One thread a worker and a program that it starts, as two processes run on two cores; or as
SPARSESSM_TEST_THREADS says. And fixtures for tests of any folder."""

import gc
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: there may be no GPU here

import programs
import pytest
import shortened
import torch
from directories import write_stock
from pico import TEXT

from sparsessm import kernels
from sparsessm.calibration import slabs as dividing

torch.set_num_threads(int(os.environ.get("SPARSESSM_TEST_THREADS") or 1))


def pytest_collection_finish() -> None:
    """What is there before the first test is no garbage: the collector need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test sets for the whole process is as it was when it ends."""
    threads, level = torch.get_num_threads(), kernels.LEVEL
    yield
    torch.set_num_threads(threads)
    kernels.LEVEL = level


@pytest.fixture(autouse=True, scope="session")
def to_the_end() -> Iterator[None]:
    """The process that starts programs ends with the tests."""
    yield
    programs.end()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and a text of ten thousand words."""
    folder = tmp_path_factory.mktemp("shelf")
    write_stock(folder / "dense")
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(TEXT.split(), k=10_000)))
    return folder


@pytest.fixture
def here(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, fresh, with all that is on the shelf: `dense` and `text.txt`."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def little_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stdlib` is a few modules of each side."""
    shortened.use_library(monkeypatch)


@pytest.fixture(scope="session")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `shortened.use_builtins`."""
    return shortened.write_builtins(tmp_path_factory.mktemp("few_layers"))


@pytest.fixture
def short_builtins(few_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in models have two layers."""
    shortened.use_builtins(monkeypatch, few_layers)


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a slab at most, so that a window of 48 takes several."""
    monkeypatch.setattr(dividing, "LONGEST", 7)
