"""The recipe: what is pruned, by which method, in which pattern, how much; checked before any work starts.

Place in the flow: `cli` builds it from flags and YAML, `sparsessm.prune` from keyword arguments; rules.py
makes a rule of it for each target; `report` writes it into the result, where `Recipe.load` finds it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..data.edition import edition
from ..data.foreign import bytes_of, decoded, from_json, from_yaml, read_bytes, short
from ..data.inert import is_text
from ..data.text_files import is_local
from ..data.texts import DATASETS, FILES, refuse_idle_column
from ..methods import DEFAULTS, entry_methods, unit_methods
from ..methods.grids import parse as parse_grid
from ..methods.patterns import NofM, Structured, parse
from .fields import MOST_SAMPLES, OPTIONS, Choice, known
from .fits import dialled, fits_grid, on_grid

DEFAULT_SPARSITY = 0.5
DEFAULT_LENGTH = 2048
# Targets that are several families: the head and conv1d must be asked for.
SEVERAL = {"all": ("ssm", "projections"), "matrices": ("projections", "head", "embedding")}
TARGETS = ("all", "matrices", "projections", "ssm", "conv1d", "head", "embedding")


def _listed(selectors: Any) -> Any:
    """One selector is a list of one."""
    return (selectors,) if isinstance(selectors, str) else selectors


class RuleFields(Choice):
    """One rule of a mixed recipe: which targets, and what is different for them.

    The first rule whose `targets` match a target applies; what it does not say is the recipe's.
    """

    targets: tuple[str, ...] = Field(
        min_length=1, description="Selectors: names, class names, families, layer:N, or re:REGEX."
    )
    ignore: tuple[str, ...] = Field((), description="Selectors of targets that this rule leaves alone.")

    _listed = field_validator("targets", "ignore", mode="before")(_listed)

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...


class Recipe(Choice):
    """One pruning run, complete and repeatable: on the same machine with the same number of threads the same
    recipe gives bit-identical masks.

    Raises:
        ValueError: one line that names the field, what was given and what is allowed.
    """

    model: str | None = Field(None, description="A hub id, a local directory or builtin:NAME.")
    tokenizer: str | None = Field(
        None, description="Tokenizer to use instead of the model's own: hub id, directory or tokenizer.json."
    )
    target: str | None = Field(
        None,
        description=f"What to prune: {', '.join(TARGETS)}. all (the default) is projections (the linear "
        "layers) and ssm (A_log); matrices is projections, head and embedding (head: also a tied embedding). "
        "On a grid the default is projections, on q4_0 matrices; with bits or size it is matrices where "
        "embedding and head are more than a tenth of the bytes.",
    )
    ignore: tuple[str, ...] = Field(
        (), description="What to leave dense: names, class names, layer:N or re:REGEX."
    )
    rules: tuple[RuleFields, ...] = Field(
        (), description="Different rules for different targets, instead of `target`; see below."
    )
    data: str = Field("stdlib", description=f"Calibration text: {', '.join(DATASETS)}, or {FILES}.")
    column: str | None = Field(
        None, description="Field or column of the data that holds the text. By default text."
    )
    size: str | None = Field(
        None,
        description="Bytes of the weights' file, such as 100MiB: the number of bits that gives it is found, "
        "instead of bits.",
    )
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | Literal["auto"] = Field(
        64, description="Number of calibration windows, or auto (doubled until the masks hardly change)."
    )
    length: int | None = Field(
        None, ge=2, description="Tokens in a window. By default 2048, or the model's length if shorter."
    )
    compute: Literal["float32", "bfloat16", "auto"] = Field(
        "auto",
        description="Precision of the products of calibration and evaluation: float32; bfloat16 (inputs are "
        "rounded, sums stay float32); auto (bfloat16 where the CPU has AMX, else float32). The record says "
        "which it was.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random: windows, random scores.")

    _listed = field_validator("ignore", mode="before")(_listed)

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str | None) -> str | None:
        return target if target is None else known("target", target, TARGETS)

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, size: str | None) -> str | None:
        if size is not None:
            bytes_of(size, "size")
        return size

    @field_validator("data")
    @classmethod
    def _known_data(cls, data: str) -> str:
        return data if is_local(data) else known("data set", data, DATASETS, f"or {FILES}")

    @field_validator("model", "tokenizer", "data", "column")
    @classmethod
    def _is_text(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None and not is_text(name):  # the record and the card could not name it
            raise ValueError(f"{info.field_name} is {short(name)}, which is not UTF-8; rename it")
        return name

    @property
    def takes_units(self) -> bool:
        """Whether whole units are taken out."""
        return _takes_units(self.pattern)

    @property
    def families(self) -> tuple[str, ...]:
        """The target families that `target` names; with rules, any."""
        return _families(self.target or self._usual_target, self.rules)

    @property
    def _said(self) -> dict[str, Any]:
        """`chosen`, and the size."""
        return self.chosen | ({"size": self.size} if self.size else {})

    @property
    def _usual_target(self) -> str:
        """Where none is named: a grid leaves A_log alone, and a file of blocks has them in all matrices."""
        if self.grid and parse_grid(self.grid).blocks:
            return "matrices"
        return "projections" if on_grid(self._said) else "all"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rules and self.target is not None:
            raise ValueError(
                f"target is {self.target!r}, but the rules say what is pruned; give only one of them"
            )
        refuse_idle_column(self.data, self.column)
        if self.size:
            fits_grid(self._said)
        if self.size and self.rules:
            raise ValueError(f"size is {self.size}, which is for a recipe without rules; give them bits")
        if self.takes_units:
            if self.samples == "auto":
                raise ValueError(
                    "samples 'auto' supports single entries only; give a number of samples for whole units"
                )
            for name in ("target", "rules", "ignore", "size"):
                if getattr(self, name) not in (None, ()):
                    raise ValueError(
                        f"{name} has no effect with pattern {self.pattern!r}, which removes units of every "
                        "layer"
                    )
            return self
        if self.samples == "auto" and on_grid(self._said):
            raise ValueError("samples 'auto' compares masks; give a number of samples with grid or bits")
        for rule in self.rules:
            if isinstance(parse(rule.pattern or "unstructured"), Structured):
                raise ValueError(f"pattern {rule.pattern!r} is for the whole model, not for a rule")
        for sentence in self.idle(self.families).values():
            raise ValueError(sentence)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file (YAML), or the recipe inside a result (its pruning.json, or its directory).

        Raises:
            ValueError: not a recipe, or a field that is unknown or not allowed; the message names the path.
        """
        path, fields = _read(path)
        try:
            fields = fields.get("recipe", fields) if isinstance(fields, dict) else fields
            if not isinstance(fields, dict):
                raise ValueError("expected lines of the form 'field: value'")
            return cls(**_plain(fields))
        except ValueError as error:
            raise ValueError(f"recipe {path}: {' '.join(str(error).split())}") from None

    @staticmethod
    def calibrated_on(path: str | Path) -> str | None:
        """SHA-256 of the calibration tokens of a result; None for a plain recipe. `path` as for `load`."""
        calibration = _record(path).get("calibration")
        return calibration.get("sha256") or None if isinstance(calibration, dict) else None

    @staticmethod
    def made_with(path: str | Path) -> dict[str, Any]:
        """Machine and packages of a result, to compare with `machine.differences`; empty for a plain recipe.
        `path` as for `load`."""
        record = _record(path)
        parts = (record.get(name) for name in ("machine", "versions"))
        found = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
        return {name: value for name, value in found.items() if name != "python"}

    def other_text(self, path: str | Path) -> str:
        """Why the calibration tokens of a result may not be those of this recipe here, as a clause.

        Returns:
            Which Python's standard library each run read, where it was another; empty if none is known.
        """
        if not (here := edition(self.data, "calibration")):
            return ""
        record = _record(path)
        made = record.get("recipe")
        if isinstance(made, dict) and made.get("data", self.data) != self.data:
            return ""
        parts = [record.get(name) for name in ("calibration", "versions")]
        calibration, versions = (part if isinstance(part, dict) else {} for part in parts)
        text = calibration.get("text")
        there = text if isinstance(text, dict) else {"python": versions.get("python")}
        python = there.get("python") or ""
        if here["sha256"] == there.get("sha256") or not re.fullmatch(r"[\w.+-]{1,30}", str(python), re.ASCII):
            return ""
        if here["python"] != python:
            return f"{self.data} was the library of Python {python}, here it is that of {here['python']}"
        return f"{self.data} is another text here, of Python {python} too" if "sha256" in there else ""

    def updated(self, **fields: Any) -> Recipe:
        """A copy with `fields` replaced, checked as a whole; what was never given stays at its default.

        What the old method, pattern, target or data brought along makes room for the new one, unless it is
        among `fields` itself: the options of the method; with another pattern the sparsity and the
        allocation; with another target what has no effect on it; with other data the column.

        Raises:
            ValueError: an unknown or impossible field, or `fields` that do not fit together or to the rest.
        """
        kept = self.model_dump(exclude_unset=True)
        brought = set()
        if (method := fields.get("method", self.method)) != self.method:
            brought |= {*OPTIONS}
            if on_grid({"method": method}) != on_grid(self._said):  # one leaves A_log and all weights there
                brought |= {"sparsity", "target", "removed"}
        if fields.get("pattern", self.pattern) != self.pattern:
            brought |= {"sparsity", "allocation"}
            if _takes_units(fields["pattern"]):
                brought |= {"target", "rules", "ignore", "removed", "diagonal", "time_weights"}
            if _takes_units(fields["pattern"]) != self.takes_units:  # other methods and repairs
                brought |= self._strange(_takes_units(fields["pattern"]))
        if dialled(fields):
            brought |= {"grid", "sparsity", "allocation", "bits", "size"}
        elif fields.get("grid") or fields.get("sparsity") is not None:
            brought |= {"bits", "size"}
        if fields.get("data", self.data) != self.data:
            brought |= {"column"}
        if fields.get("rules"):
            brought |= {"target"}
        if (target := fields.get("target")) is not None:
            brought |= {"rules"}
            if target in TARGETS and not self.takes_units:
                brought |= self.idle(_families(target)).keys() - {"method"}
        return Recipe(**{name: value for name, value in kept.items() if name not in brought} | fields)

    def _strange(self, units: bool) -> set[str]:
        """What is said in words that mean nothing for whole units, or (not `units`) for single entries."""
        if not units:
            return {"repair", "price"} | (
                {"method"} if self.method and self.method not in entry_methods() else set()
            )
        return {
            name
            for name, strange in (
                ("method", self.method not in unit_methods()),
                ("repair", (self.repair or "").startswith("self")),
                ("price", self.price == "norms"),
            )
            if strange
        }

    def resolved(self, *, model: str, trained_length: int | None) -> Recipe:
        """Fill what depends on the model, so that the recipe in the result says everything.

        Args:
            model: where the model came from (Checkpoint.source).
            trained_length: longest text in tokens the model was trained on, None if unknown.
        """
        pattern = parse(self.pattern or "unstructured")
        usual = 0.0 if on_grid(self._said) else DEFAULT_SPARSITY
        sparsity = usual if self.sparsity is None else self.sparsity
        facts: dict[str, Any] = {
            "model": model,
            "sparsity": pattern.sparsity if isinstance(pattern, NofM) else sparsity,
            "pattern": str(pattern),
            "length": self.length or window_length(trained_length),
        }
        if dialled(self._said) and not isinstance(pattern, NofM):
            del facts["sparsity"]  # what comes out
        if isinstance(pattern, Structured):
            if pattern.mixed:
                del facts["sparsity"]
            return Recipe(**{**self.model_dump(), **facts})
        if not self.rules and not dialled(self._said):  # those follow from the model's own sizes (aims.py)
            facts["target"] = self.target or self._usual_target
        if "ssm" in self.families:
            facts["removed"] = self.removed or "memoryless"
        return Recipe(**{**self.model_dump(), **facts})


def _record(path: str | Path) -> dict[str, Any]:
    """What a result says of itself; empty for a plain recipe."""
    _, record = _read(path)
    return record if isinstance(record, dict) else {}


def _takes_units(pattern: str | None) -> bool:
    return isinstance(parse(pattern or "unstructured"), Structured)


def _families(target: str | None, rules: Iterable[Any] = ()) -> tuple[str, ...]:
    if rules:
        return tuple(DEFAULTS)
    return SEVERAL.get(target or "all", (target,))  # type: ignore[return-value]


def _read(path: str | Path) -> tuple[Path, Any]:
    """What is in a recipe file or in the record of a result, and the file.

    Raises:
        ValueError: begins with the file: not there, not JSON or YAML, or a field is there twice.
    """
    path = Path(path)
    path = path / "pruning.json" if path.is_dir() else path
    try:
        text = decoded(read_bytes(path))
    except ValueError as error:
        told = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"recipe {path}: {told}") from None
    try:
        # YAML leaves every scalar as written and pydantic gives it its type. The usual loader would read the
        # pattern 2:4 as a number to base sixty (124).
        return path, from_json(text, strict=True) if path.suffix.lower() == ".json" else from_yaml(text)
    except ValueError as error:
        told = _twice(text) or str(error)
    raise ValueError(f"recipe {path}: {told}")


def _twice(text: str) -> str | None:
    """What YAML says of a field that is there twice: its reader knows the line, JSON's does not."""
    try:
        from_yaml(text)
    except ValueError as error:
        return str(error) if "twice" in str(error) else None
    return None


def _plain(value: Any) -> Any:
    """What a file says, with None for what it leaves empty."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value in ("null", "~", "") else value


def window_length(trained_length: int | None) -> int:
    """Tokens in a window if none is given: the usual 2048, or less for a model trained on shorter text."""
    return min(DEFAULT_LENGTH, trained_length or DEFAULT_LENGTH)
