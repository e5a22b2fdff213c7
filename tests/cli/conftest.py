"""Commands are run in a directory of their own, on little text."""

from pathlib import Path

import pytest

from sparsessm.cli import demonstration
from sparsessm.evaluation import before_after


@pytest.fixture
def here(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, fresh; little text is evaluated."""
    monkeypatch.setattr(before_after, "WINDOWS", 4)
    monkeypatch.setattr(demonstration, "WINDOWS", 2)
    monkeypatch.setattr(demonstration, "ROUNDS", 1)
    return here
