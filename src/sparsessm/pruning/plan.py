"""The plan: what a run will do with a model, whatever it takes out; seen beforehand, then carried out.

Place in the flow: `make_plan` (pruning/__init__.py) makes one of a recipe and a model; who runs it asks the
same questions of every kind: what it looks at, by which methods, what it will hit, and then to run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from torch import Tensor

from sparsessm.architectures import Architecture
from sparsessm.calibration.journal import Forgetful, Journal, Stage
from sparsessm.calibration.progress import Progress
from sparsessm.data.edition import edition
from sparsessm.data.texts import fingerprint
from sparsessm.methods.levels import CodedLevels
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import Assignment
from sparsessm.report.contents import Table
from sparsessm.report.record import Report
from sparsessm.report.row import Row


@dataclass(frozen=True)
class Preview:
    """What a plan will do: plain values, and the same as tables."""

    record: dict[str, Any]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Outcome:
    """What a plan did, as a `Report` tells it; see there.

    Attributes:
        levels: codes and scales of every target on a grid, by its name: what a file holds of it.
    """

    rows: list[Row]
    parameters: dict[str, int] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    levels: dict[str, CodedLevels] = field(default_factory=dict)


@final
class Rows:
    """The rows of a report as they come, behind those that an earlier run noted with the blocks it left.

    Attributes:
        all: of them. levels: of the targets on a grid, by name.
    """

    def __init__(self, stage: Stage) -> None:
        self.all: list[Row] = []
        self.levels: dict[str, CodedLevels] = {}
        for noted in (row for note in stage.left.values() for row in note or ()):
            row = dict(noted)
            levels = row.pop("levels", None)
            self.add(Row(**{**row, "repaired": tuple(row["repaired"])}), levels and CodedLevels(**levels))
        self._noted = len(self.all)

    def add(self, row: Row, levels: CodedLevels | None = None) -> None:
        """What was done to a target."""
        self.all.append(row)
        if levels is not None:
            self.levels[row.target] = levels

    def new(self) -> list[dict[str, Any]]:
        """Those since this was asked last, as a journal takes them."""
        rows, self._noted = self.all[self._noted :], len(self.all)
        return [
            asdict(row)
            | ({"levels": dict(vars(self.levels[row.target]))} if row.target in self.levels else {})
            for row in rows
        ]


class Plan(ABC):
    """What one recipe does to one model.

    Attributes:
        recipe: resolved (`Recipe.resolved`).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    @abstractmethod
    def methods(self) -> list[str]:
        """Names of the methods, in the order in which they come."""

    @property
    @abstractmethod
    def asks(self) -> str:
        """What of it looks at calibration windows, in words; empty if nothing does."""

    @property
    @abstractmethod
    def assignment(self) -> Assignment:
        """Which rule prunes which matrix; empty where whole units go."""

    @abstractmethod
    def preview(self, architecture: Architecture) -> Preview:
        """What it will hit, before anything is looked at."""

    @abstractmethod
    def share_left(self, architecture: Architecture) -> float:
        """About the share of the parameters that the result will have, at most: zeros are stored."""

    @abstractmethod
    def working(self, architecture: Architecture) -> int:
        """About the bytes that a journal on a disk takes, beside those of hidden states."""

    @abstractmethod
    def _carry_out(
        self, architecture: Architecture, tokens: Tensor | None, progress: Progress | None, journal: Journal
    ) -> Outcome:
        """Change the model in place; `tokens` are there where the plan `asks`."""

    @final
    def settle(self, samples: int) -> None:
        """The number of calibration windows is known now, where the recipe said auto."""
        self.recipe = self.recipe.updated(samples=samples)

    @property
    @final
    def looks(self) -> bool:
        """Whether calibration windows are needed."""
        return bool(self.asks)

    @final
    def run(
        self,
        architecture: Architecture,
        tokens: Tensor | None,
        progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> Report:
        """Prune the model in place, block after block, each seeing what the pruned blocks before it produce.

        Args:
            architecture: that the plan was made for.
            tokens: (W, L) int64 calibration windows; may be None where nothing looks at them.
            progress: called as (stage, done, total, block).
            journal: keeps what is done, and says what an earlier run did; the same plan on the same model.

        Raises:
            ValueError: no windows where they are needed; a target whose scores, Hessian or activations are
                not finite, by name.
        """
        if self.looks and tokens is None:
            raise ValueError(f"{self.asks} needs calibration windows, but none were given")
        journal = journal or Forgetful(architecture)
        journal.start()
        done = self._carry_out(architecture, tokens if self.looks else None, progress, journal)
        sha256 = fingerprint(tokens) if tokens is not None and self.looks else ""
        return Report(
            self.recipe.model_dump(),
            done.rows,
            sha256,
            journal.seconds,
            parameters=done.parameters,
            shape=done.shape,
            trials=done.trials,
            levels=done.levels,
            text=edition(self.recipe.data, "calibration") if sha256 else {},
        )
