"""The recipe: what is pruned, by which method, in which pattern, how much; checked before any work starts.

Place in the flow: `cli` builds it from flags and YAML, `sparsessm.prune` from keyword arguments; `pipeline`
follows it; `report` writes it into the result, where `Recipe.load` finds it again. Names are looked up in the
tables they belong to (METHODS, DATASETS, patterns): a new row there needs no change here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from .data import DATASETS, FILE_TYPES
from .methods import METHODS
from .methods.sparsessm import time_weights
from .patterns import NofM, parse

DEFAULT_SPARSITY = 0.5
DEFAULT_LENGTH = 2048
_FILE = f"a file ({', '.join(FILE_TYPES)})"
TARGETS = sorted({family for method in METHODS.values() for family in method.families})
# Fields that only some methods read. Given with another method they are refused, not ignored.
OPTIONS = sorted({option for method in METHODS.values() for option in method.options})


class Recipe(BaseModel):
    """One pruning run, complete and repeatable: the same recipe gives bit-identical masks.

    Raises:
        ValueError: one line that names the field, what was given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="Hub id, local directory or builtin:NAME.")
    tokenizer: str | None = Field(
        None, description="Tokenizer to use instead of the model's own: hub id, directory or tokenizer.json."
    )
    target: str = Field("ssm", description=f"What is pruned: {', '.join(TARGETS)}.")
    method: str = Field("exact", description=f"How entries are scored: {', '.join(METHODS)}.")
    sparsity: float | None = Field(
        None, description="Share removed, in [0, 1); 0.5, or what an N:M pattern says."
    )
    pattern: str = Field(
        "unstructured", description="unstructured, or N:M: N entries KEPT of every M states."
    )
    removed: Literal["memoryless", "unit"] = Field(
        "memoryless", description="What a removed entry becomes: memoryless (decay 0) or unit (A = -1)."
    )
    budget: Literal["layer", "model"] = Field(
        "model", description="model: one threshold over all layers; layer: one for each."
    )
    diagonal: bool = Field(False, description="Method exact: leave out the off-diagonal Gram (cheaper).")
    time_weights: str = Field(
        "power:1", description="Method sparsessm: uniform, linear, power:P, discount:G or window:SHARE."
    )
    data: str = Field("stdlib", description=f"Calibration text: {', '.join(DATASETS)}, or {_FILE}.")
    samples: int = Field(64, ge=1, le=100_000, description="Number of calibration windows.")
    length: int | None = Field(
        None, ge=2, description="Tokens in a window; 2048, or the model's own length if shorter."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything drawn: windows, random scores.")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError("; ".join(_line(detail) for detail in error.errors())) from None

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str) -> str:
        return _known("target", target, TARGETS)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return _known("method", method, METHODS)

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: str) -> str:
        return data if Path(data).suffix in FILE_TYPES else _known("data set", data, DATASETS, f"or {_FILE}")

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        return pattern if ":" in pattern else _known("pattern", pattern, ["unstructured"], "or N:M, e.g. 2:4")

    @field_validator("time_weights")
    @classmethod
    def _known_weights(cls, weights: str) -> str:
        time_weights(weights, 2)
        return weights

    @field_validator("sparsity")
    @classmethod
    def _is_a_share(cls, sparsity: float | None) -> float | None:
        if sparsity is not None and not 0 <= sparsity < 1:  # also refuses nan
            raise ValueError(f"sparsity is {sparsity:g}; allowed: 0 <= sparsity < 1 (the share removed)")
        return sparsity

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        families = METHODS[self.method].families
        if self.target not in families:
            raise ValueError(
                f"method {self.method!r} does not prune target {self.target!r}; "
                f"it prunes: {', '.join(families)}"
            )
        for option in OPTIONS:
            if option in self.model_fields_set and option not in METHODS[self.method].options:
                readers = ", ".join(name for name, method in METHODS.items() if option in method.options)
                raise ValueError(
                    f"{option} has no effect with method {self.method!r}; it belongs to: {readers}"
                )
        pattern = parse(self.pattern)
        if isinstance(pattern, NofM):
            if self.sparsity is not None and abs(self.sparsity - pattern.sparsity) > 1e-9:
                raise ValueError(
                    f"sparsity is {self.sparsity:g}, but pattern {self.pattern!r} keeps {pattern.n} of "
                    f"{pattern.m}, which is sparsity {pattern.sparsity:g}; give only one of them"
                )
            if "budget" in self.model_fields_set and self.budget != "layer":
                raise ValueError(
                    f"budget {self.budget!r} has no effect with pattern {self.pattern!r}, "
                    "which fixes the number kept in every group"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_idle_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what method and pattern do not read: what is written had an effect, and loads again."""
        idle = set(OPTIONS) - set(METHODS[self.method].options)
        idle |= {"budget"} if isinstance(parse(self.pattern), NofM) else set()
        return {name: value for name, value in handler(self).items() if name not in idle}

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file (YAML), or the recipe inside a result (its pruning.json, or its directory).

        Raises:
            ValueError: not a recipe, or a field that is unknown or not allowed; the message names the path.
        """
        path = Path(path)
        path = path / "pruning.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"recipe {path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
            # BaseLoader leaves every scalar as written and pydantic gives it its type. The usual loader would
            # read the pattern 2:4 as a number to base sixty (124).
            fields = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.BaseLoader)
            fields = fields.get("recipe", fields) if isinstance(fields, dict) else fields
            if not isinstance(fields, dict):
                raise ValueError("expected lines of the form 'field: value'")
            return cls(
                **{str(name): None if value in ("null", "~", "") else value for name, value in fields.items()}
            )
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"recipe {path}: {' '.join(str(error).split())}") from None

    @staticmethod
    def calibrated_on(path: str | Path) -> str | None:
        """SHA-256 of the calibration tokens of a result; None for a plain recipe. `path` as for `load`."""
        path = Path(path)
        path = path / "pruning.json" if path.is_dir() else path
        record = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
        calibration = record.get("calibration")
        return calibration.get("sha256") or None if isinstance(calibration, dict) else None

    def updated(self, **fields: Any) -> Recipe:
        """A copy with `fields` replaced, checked as a whole; what was never given stays at its default.

        A complete recipe (that of a result) says more than its user chose. What its old method or pattern
        brought along makes room for the new one, unless it is among `fields` itself: options that the new
        method does not read, and with another pattern the sparsity and the budget.

        Raises:
            ValueError: an unknown or impossible field, or `fields` that do not fit together or to the rest.
        """
        kept = self.model_dump(exclude_unset=True)
        method = METHODS.get(fields.get("method", self.method))
        brought = {*OPTIONS} - {*method.options} if method else set()
        if fields.get("pattern", self.pattern) != self.pattern:
            brought |= {"sparsity", "budget"}
        return Recipe(**{name: value for name, value in kept.items() if name not in brought} | fields)

    def resolved(self, *, model: str, states: int, trained_length: int | None) -> Recipe:
        """Fill what depends on the model, so that the recipe in the result says everything.

        Args:
            model: where the model came from (Checkpoint.source).
            states: the model's d_state; an N:M pattern runs along it.
            trained_length: longest text in tokens the model was trained on, None if unknown.

        Raises:
            ValueError: M of an N:M pattern does not divide `states`.
        """
        pattern = parse(self.pattern)
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        budget = self.budget
        if isinstance(pattern, NofM):
            if states % pattern.m:
                divisors = ", ".join(str(m) for m in range(2, states + 1) if states % m == 0)
                raise ValueError(
                    f"pattern {self.pattern!r}: groups of {pattern.m} do not divide the model's d_state "
                    f"of {states}; allowed M: {divisors}"
                )
            sparsity, budget = pattern.sparsity, "layer"  # both are the pattern's own
        length = self.length or window_length(trained_length)
        facts = {"model": model, "sparsity": sparsity, "budget": budget, "length": length}
        return Recipe(**{**self.model_dump(), **facts})


def window_length(trained_length: int | None) -> int:
    """Tokens in a window if none is given: the usual 2048, or less for a model trained on shorter text."""
    return min(DEFAULT_LENGTH, trained_length or DEFAULT_LENGTH)


def _known(kind: str, given: str, known: Iterable[str], more: str = "") -> str:
    """Return `given` if it is one of `known`; otherwise raise, listing them and the nearest."""
    if given in known:
        return given
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1)
    raise ValueError(
        f"unknown {kind} {given!r}; known: {', '.join(names)}"
        + (f", {more}" if more else "")
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _line(detail: ErrorDetails) -> str:
    """One of pydantic's findings as one line."""
    field = str(detail["loc"][0]) if detail["loc"] else ""
    given = detail["input"]
    try:
        if detail["type"] == "extra_forbidden":
            _known("recipe field", field, Recipe.model_fields)
        if detail["type"] == "literal_error":
            _known(field, str(given), get_args(Recipe.model_fields[field].annotation))
    except ValueError as error:
        return str(error)
    if detail["type"] == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    return f"{field} is {given!r}; {detail['msg'][:1].lower()}{detail['msg'][1:]}"
