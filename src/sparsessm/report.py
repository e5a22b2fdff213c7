"""The report: what was removed from which tensor, and what that cost; as a record and as a model card.

Place in the flow: `pipeline` adds a Row for each target; `sparsessm.save` has `checkpoint` write the record
(pruning.json) and the card (README.md) into the result. Nothing here touches a disk or a terminal.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .data import DATASETS

if TYPE_CHECKING:
    from torch import Tensor, dtype

RECORD_FORMAT = 1
REMOVED_WORDS = {
    "memoryless": "its state forgets at once (decay 0; stored as `A_log` = 38)",
    "unit": "its state decays with A = -1 (stored as `A_log` = 0)",
}


@dataclass(frozen=True)
class Row:
    """What happened to one target.

    Attributes:
        target: full parameter name, as in the checkpoint.
        layer: index of its block.
        family: "ssm" or "projections".
        method, pattern, removed: as in the recipe.
        total: entries of the matrix.
        pruned: entries removed, counted from the mask and not from values.
        error: energy of the output error of the mask with the layer's input fixed, if the method knows it.
        signal: energy of the layer's output, in the unit of `error`.
        score: min, median and max of the scores.
        repaired: other parameters that were changed to make up for the removal, by full name.
    """

    target: str
    layer: int
    family: str
    method: str
    pattern: str
    removed: str
    total: int
    pruned: int
    error: float | None = None
    signal: float | None = None
    score: dict[str, float] = field(default_factory=dict)
    repaired: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of entries removed."""
        return self.pruned / self.total if self.total else 0.0

    @property
    def relative_error(self) -> float | None:
        """error / signal; None if either is unknown."""
        return _relative(self.error, self.signal)


@dataclass
class Report:
    """The whole run.

    Attributes:
        recipe: the resolved recipe as plain values.
        rows: one for each target, in the order of the model.
        fingerprint: SHA-256 of the calibration tokens (hex); empty for a method that needs none.
        seconds: wall time of the pruning.
        perplexity: records under "dense", "pruned" and "difference"; empty if not measured.
        sizes: bytes in the checkpoint by kind of tensor ("A_log", "in_proj", ...), in the stored dtypes.
        pruned_before: the model had been pruned in memory already, so the recipe alone does not repeat it.
    """

    recipe: dict[str, Any]
    rows: list[Row]
    fingerprint: str
    seconds: float
    perplexity: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    pruned_before: bool = False

    @property
    def totals(self) -> dict[str, dict[str, Any]]:
        """By family: tensors, entries, pruned, sparsity and the mean relative error (None if unknown)."""
        totals: dict[str, dict[str, Any]] = {}
        for family in dict.fromkeys(row.family for row in self.rows):
            rows = [row for row in self.rows if row.family == family]
            entries, pruned = sum(row.total for row in rows), sum(row.pruned for row in rows)
            errors = [row.relative_error for row in rows if row.relative_error is not None]
            totals[family] = {
                "tensors": len(rows),
                "entries": entries,
                "pruned": pruned,
                "sparsity": pruned / entries if entries else 0.0,
                "error": sum(errors) / len(errors) if errors else None,
            }
        return totals

    @property
    def target_share(self) -> float | None:
        """Share of the checkpoint's bytes that the targets are; None without `sizes`."""
        kinds = {kind_of(row.target) for row in self.rows}
        return (
            sum(self.sizes.get(kind, 0) for kind in kinds) / sum(self.sizes.values()) if self.sizes else None
        )

    def record(self) -> dict[str, Any]:
        """The content of pruning.json: plain values only; described in docs/checkpoint.md."""
        record = {
            "format": RECORD_FORMAT,
            "versions": {
                "python": platform.python_version(),
                **{package: _version(package) for package in ("sparsessm", "torch", "transformers")},
            },
            "recipe": dict(self.recipe),
            "pruned_before": self.pruned_before,
            "calibration": {"sha256": self.fingerprint or None},
            "seconds": round(self.seconds, 3),
            "totals": self.totals,
            "targets": [{**asdict(row), "sparsity": row.sparsity} for row in self.rows],
            "bytes": dict(self.sizes),
            "perplexity": dict(self.perplexity),
        }
        return finite(record)

    def card(self, source: str, *, base_model: str | None = None, format: str = "transformers") -> str:
        """The model card (README.md) of the result: Markdown after a YAML front matter for a hub.

        Args:
            source: where the dense model came from, as the user wrote it.
            base_model: its hub id; None for a model that is not on a hub.
            format: "transformers" or "state-spaces", how the result is stored.
        """
        front = [
            "---",
            *(["library_name: transformers"] if format == "transformers" else []),
            "pipeline_tag: text-generation",
            *([f"base_model: {base_model}"] if base_model else []),
            "tags:",
            *(f"- {tag}" for tag in ("mamba", "pruning", "sparse", "sparsessm")),
            "---",
        ]
        recipe = [[name, f"`{value}`"] for name, value in self.recipe.items() if value is not None]
        repeat = "The same recipe gives the same masks: `sparsessm prune --recipe pruning.json -o DIR`."
        if self.pruned_before:
            repeat = (
                "The model in memory had been pruned before: this is its last run, not all that was done."
            )
        return "\n".join(
            [
                *front,
                "",
                f"# {_name(source)}, pruned",
                "",
                f"`{source}` pruned in one shot by sparsessm {_version('sparsessm')}, without training.",
                "",
                "## What was removed",
                "",
                *self._removed(),
                "",
                "## How it was made",
                "",
                *_markdown(["option", "value"], recipe),
                "",
                f"SHA-256 of the calibration tokens: `{self.fingerprint or 'none were needed'}`.",
                repeat,
                "",
                "## What it cost",
                "",
                *self._cost(),
                "",
                "## How to load it",
                "",
                _LOADING[format],
                "",
                "## What it does not do",
                "",
                self.honesty(),
                "",
            ]
        )

    def honesty(self) -> str:
        """The sentence about bytes and speed that belongs under every result."""
        kinds = " and ".join(dict.fromkeys(f"`{kind_of(row.target)}`" for row in self.rows))
        share = self.target_share
        size = "" if share is None else f"{kinds} is {100 * share:.2g} % of the bytes of this model. "
        return size + (
            "Removed entries are stored as ordinary values in tensors of the same shape: "
            "zeros or other constants alone make neither the file smaller nor the model faster."
        )

    def caveat(self) -> str:
        """The sentence for a perplexity measured on the text of the calibration; empty if it was not."""
        data = self.recipe.get("data")
        measured = self.perplexity.get("pruned", {}).get("data")
        if not self.fingerprint or data != measured or data in DATASETS:
            return ""
        return (
            f"{data} is one file without a held-out part: the perplexity was measured on the same text "
            "as the calibration, so it may flatter the result."
        )

    def _removed(self) -> list[str]:
        columns = ["family", "tensors", "entries", "removed", "share", "mean relative error of the output"]
        cells = [
            [
                family,
                str(total["tensors"]),
                str(total["entries"]),
                str(total["pruned"]),
                percent(total["sparsity"]),
                number(total["error"], ".2e"),
            ]
            for family, total in self.totals.items()
        ]
        lines = _markdown(columns, cells)
        for removed in dict.fromkeys(row.removed for row in self.rows):
            lines += ["", f"A removed entry becomes `{removed}`: {REMOVED_WORDS[removed]}."]
        if repaired := dict.fromkeys(kind_of(name) for row in self.rows for name in row.repaired):
            names = ", ".join(f"`{kind}`" for kind in repaired)
            lines += ["", f"Changed to make up for it, in the layers of the targets: {names}."]
        return lines

    def _cost(self) -> list[str]:
        records = {name: self.perplexity[name] for name in ("dense", "pruned") if name in self.perplexity}
        if not records:
            return ["The perplexity was not measured."]
        changes = {
            name: self.perplexity["difference"] for name in ("pruned",) if "difference" in self.perplexity
        }
        columns, cells = perplexity_table(records, changes)
        first = next(iter(records.values()))
        text = f"Measured on {first['windows']} windows of {first['length']} tokens of `{first['data']}`"
        lines = [*_markdown(columns, cells), "", text + "; the change is that on the same windows."]
        return [*lines, *([self.caveat()] if self.caveat() else [])]


def removed_table(
    rows: Iterable[Mapping[str, Any]], totals: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each row of a record, then one for each family."""
    cells = []
    for row in rows:
        counts = [str(row["pruned"]), str(row["total"]), percent(row["sparsity"])]
        cells.append([row["target"], *counts, number(_relative(row["error"], row["signal"]), ".2e")])
    for family, total in totals.items():
        counts = [str(total["pruned"]), str(total["entries"]), percent(total["sparsity"])]
        cells.append([f"all {family}", *counts, number(total["error"], ".2e")])
    return ["target", "removed", "of", "share", "relative error"], cells


def perplexity_table(
    records: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each model, with the paired change where there is one."""
    cells = []
    for name, record in records.items():
        low, high = (number(record[bound], ".2f") for bound in ("low", "high"))
        change = ""
        if name in changes:
            mean, least, most = (percent(changes[name][part], "+") for part in ("mean", "low", "high"))
            change = f"{mean} ({least} to {most})".replace(" %", "")
        bits = number(record["bits_per_byte"], ".4f")
        cells.append([name, f"{number(record['perplexity'], '.2f')} ({low} to {high})", bits, change])
    return ["model", "perplexity (95 %)", "bits/byte", "change in % (95 %)"], cells


def checked(record: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
    """A record read from a file, if it has the shape of one.

    Raises:
        ValueError: it is of another format, or not a record at all; names the path.
    """
    if record is None:
        return None
    if record.get("format") != RECORD_FORMAT:
        raise ValueError(f"{path}: record format {record.get('format')!r}; known: {RECORD_FORMAT}")
    try:
        for row in record["targets"]:
            if row["removed"] not in REMOVED_WORDS or not {int} == {type(row["pruned"]), type(row["total"])}:
                raise ValueError(row)
        removed_table(record["targets"], record["totals"])
        dict(record["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of a pruning ({type(error).__name__}: {error})") from None
    return record


def percent(share: float | None, sign: str = "") -> str:
    """0.5 -> "50.00 %"; with sign "+", "+50.00 %"."""
    if share is None or not math.isfinite(share):
        return "-"
    return f"{round(100 * share, 2) + 0.0:{sign}.2f} %"  # + 0.0: no "-0.00"


def number(value: float | None, form: str) -> str:
    """The number in this format; "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{form}}"


def finite(value: Any) -> Any:
    """The same nested value with None for every NaN and Inf: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kind_of(parameter: str) -> str:
    """The kind of a tensor by its name: "A_log" of "...mixer.A_log", "in_proj" of "...in_proj.weight"."""
    parts = parameter.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


def contents(tensors: Mapping[str, Tensor], stored: Mapping[str, dtype]) -> dict[str, tuple[int, set[dtype]]]:
    """Kind of tensor -> the bytes it takes in the checkpoint and its dtypes there, the largest first.

    Args:
        tensors: parameters by name, any shape; only their number of elements is read.
        stored: the dtype of each name in the checkpoint; what it lacks (tied tensors) takes no bytes.
    """
    kinds: dict[str, tuple[int, set[dtype]]] = {}
    for name in stored:
        size, dtypes = kinds.get(kind_of(name), (0, set()))
        size += tensors[name].numel() * stored[name].itemsize
        kinds[kind_of(name)] = size, dtypes | {stored[name]}
    return dict(sorted(kinds.items(), key=lambda item: -item[1][0]))


def _relative(error: float | None, signal: float | None) -> float | None:
    return error / signal if error is not None and signal else None


def _markdown(columns: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _name(source: str) -> str:
    return re.split(r"[/:\\]", source.rstrip("/\\"))[-1] or source


_LOADING = {
    "transformers": """\
No special code is needed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```""",
    "state-spaces": """\
It has the format of the original state-spaces checkpoints:

```python
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("path/to/this/directory")
```

or, without a GPU, `sparsessm.load("path/to/this/directory").model`, a transformers model.""",
}
