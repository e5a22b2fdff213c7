"""Commands are run in a directory of their own, on little text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsessm.cli import demonstration
from sparsessm.evaluation import before_after, beside_dense, timing


@pytest.fixture
def here(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, fresh; little text is evaluated, and a speed is timed once."""
    monkeypatch.setattr(before_after, "WINDOWS", 4)
    monkeypatch.setattr(demonstration, "WINDOWS", 2)
    monkeypatch.setattr(demonstration, "ROUNDS", 1)
    monkeypatch.setattr(beside_dense, "SPEED", {"batches": (1,), "rounds": 1, "prompt": 8})
    monkeypatch.setattr(timing, "PHASE", 0.2)
    monkeypatch.setattr(timing, "BUFFER", 1 << 20)
    return here


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the output a terminal of so many columns."""

    def of(columns: int) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))

    return of
