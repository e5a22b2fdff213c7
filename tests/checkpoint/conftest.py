"""A checkpoint directory for every test that reads, spoils or copies one."""

from pathlib import Path

import pytest
from directories import write_stock

from sparsessm import checkpoint
from sparsessm.checkpoint import Checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pico model written by transformers itself, in `tmp_path / "in"`."""
    write_stock(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def loaded(folder: Path) -> Checkpoint:
    """The same, read."""
    return checkpoint.load(folder)
