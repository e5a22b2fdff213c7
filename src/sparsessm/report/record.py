"""The report: what was removed from which tensor, and what that cost; as a record and as tables.

Place in the flow: a plan adds a Row for each target; `sparsessm.save` has `checkpoint` write the record
(pruning.json) and the model card (card.py) into the result. Nothing here touches a disk or a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.texts import DATASETS
from ..methods.hessian import DAMPING
from ..methods.levels import CodedLevels
from . import machine
from .html import html_table
from .row import Row, relative

RECORD_FORMAT = 1
ENOUGH = 16  # windows; intervals from fewer are too narrow (evaluation/perplexity.py)
REMOVED_WORDS = {
    "memoryless": "the state forgets at once (decay 0; stored as `A_log` = 38, in float16 as 11)",
    "unit": "the state decays with A = -1 (stored as `A_log` = 0)",
    "zero": "the connection is gone (stored as 0)",
    "cut": "it was cut out of every tensor that contained it",
    "projected": "the state was projected to fewer directions by `B_projection` and `C_projection`",
}
ON_GRIDS = {
    "projections": "The linear layers take",
    "head": "The head takes",
    "embedding": "The embedding takes",
}
PACKED_ONLY = "No stock configuration can describe this model: only sparsessm can load this directory."
ON_GRID = (
    "They are stored as codes and scales, which only sparsessm can load; `sparsessm unpack` makes a stock "
    "checkpoint, and says what rounding to its dtype changes. Our runtime computes with the codes as "
    "they are."
)


@dataclass
class Report:
    """The whole run.

    Attributes:
        recipe: the resolved recipe as plain values.
        rows: one for each target, in the order of the model.
        fingerprint: SHA-256 of the calibration tokens (hex); empty for a method that needs none.
        text: which text `data` stood for, where its name does not say it (`edition.edition`); else empty.
        seconds: wall time of the pruning.
        advice: the curve from which `samples: auto` chose (`studies.windows.Step`s, plain); else empty.
        perplexity: records under "dense", "pruned" and "difference"; empty if not measured.
        sizes: bytes in the checkpoint by kind of tensor ("A_log", "in_proj", ...), in the stored dtypes.
        parameters: of the model, under "dense" and "pruned", where whole units were taken out; else empty.
        shape: axis -> units that stayed in every layer, then. trials: what was measured to find how much each
            axis gives, where the recipe left it open (`mixes.Trial`s as plain values).
        pruned_before: the model had been pruned in memory already, so the recipe alone does not repeat it.
        levels: codes and scales of the targets on a grid, by name, coded (`levels()` of one gives codes and
            values); not part of the record.
        held_out: perplexity was measured on windows that share nothing with the calibration's, although the
            text is the same; not part of the record.
        packed: no stock checkpoint can hold it: projected states, or layers of different widths.
        machine: on which it ran; masks may differ on another (`machine.current`).
    """

    recipe: dict[str, Any]
    rows: list[Row]
    fingerprint: str
    seconds: float
    advice: list[dict[str, Any]] = field(default_factory=list)
    perplexity: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    levels: dict[str, CodedLevels] = field(default_factory=dict, repr=False)
    text: dict[str, str] = field(default_factory=dict)
    pruned_before: bool = False
    packed: bool = False
    held_out: bool = False
    machine: dict[str, Any] = field(default_factory=machine.current)

    @property
    def totals(self) -> dict[str, dict[str, Any]]:
        """By family: tensors, entries, pruned, sparsity, the mean relative error and stored bits a weight
        (None if unknown, or not on a grid)."""
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
                "error": _mean(errors),
                "bits": _bits([vars(row) for row in rows]),
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
        text = {"text": self.text} if self.fingerprint and self.text else {}
        trials = [dict(trial) for trial in self.trials]
        structure = {"parameters": dict(self.parameters), "shape": dict(self.shape), "trials": trials}
        record = {
            "format": RECORD_FORMAT,
            "versions": machine.versions(),
            "machine": dict(self.machine),
            "recipe": dict(self.recipe),
            "pruned_before": self.pruned_before,
            "calibration": {"sha256": self.fingerprint or None, **text},
            "advice": [dict(step) for step in self.advice],
            "seconds": round(self.seconds, 3),
            "totals": self.totals,
            "targets": [{**asdict(row), "sparsity": row.sparsity} for row in self.rows],
            "bytes": dict(self.sizes),
            "structure": structure if self.parameters else None,
            "perplexity": dict(self.perplexity),
        }
        return finite(record)

    def _repr_html_(self) -> str:
        """What a notebook shows: what was removed, and what it cost."""
        record = self.record()
        shown = [html_table("What was removed", *removed_table(record["targets"], record["totals"]))]
        models = record["perplexity"]
        change = models.pop("difference", None)
        if models:
            changes = {"pruned": change} if change else {}
            shown.append(html_table("What it cost", *perplexity_table(models, changes)))
        return "".join(shown)

    def honesty(self) -> str:
        """The sentence about bytes and speed that belongs under every result."""
        if any(row.removed == "projected" for row in self.rows):
            gone = percent(self.totals["state"]["sparsity"])
            more = self.parameters["pruned"] - self.parameters["dense"]
            return (
                f"{gone} of a sequence's state is gone: each layer keeps the directions that matter. The "
                f"projections add {more:,} parameters. {PACKED_ONLY}"
            )
        if self.parameters:
            dense, pruned = self.parameters["dense"], self.parameters["pruned"]
            kept = remaining(self.shape, self.recipe.get("allocation") == "loss")
            return (
                f"{pruned:,} of {dense:,} parameters are left ({percent(1 - pruned / dense)} gone). "
                f"What remains: {kept}. "
            ) + (
                PACKED_ONLY
                if self.packed
                else "It is a smaller stock model: it computes less everywhere and needs no sparse kernel."
            )
        kinds = [f"`{kind}`" for kind in dict.fromkeys(kind_of(row.target) for row in self.rows)]
        names = " and ".join(filter(None, [", ".join(kinds[:-1]), *kinds[-1:]]))
        share = self.target_share
        verb = "is" if len(kinds) == 1 else "are"
        size = (
            ""
            if share is None
            else f"{names} {verb} {float(f'{100 * share:.2g}'):g} % of the bytes of this model. "
        )
        size += "".join(
            f"{ON_GRIDS.get(family, family)} {total['bits']:.3g} bits a weight, masks and scales counted; "
            f"{percent(total['sparsity'])} of them are zero. "
            for family, total in self.totals.items()
            if total["bits"] is not None
        )
        if self.levels:
            return size + ON_GRID
        if self.packed:
            return f"{size}Removed entries are not stored if that takes fewer bytes. {PACKED_ONLY}"
        return size + (
            "Removed entries are stored as ordinary values in tensors of the same shape. "
            "This alone makes neither the file smaller nor the model faster. "
            "`sparsessm pack` writes a directory without them."
        )

    def damped(self) -> str:
        """The sentences for experts that saw too little, and for Hessians that had to be damped more than
        usual; empty if there are none."""
        experts = [row for row in self.rows if row.tokens is not None]
        few = [f"{row.target} ({row.tokens})" for row in experts if row.starved]
        starved = (
            f"{len(few)} of {len(experts)} expert matrices saw fewer calibration tokens than they have "
            f"inputs, and borrowed from their layer: {', '.join(few[:8])}{' ...' if len(few) > 8 else ''}. "
            if few
            else ""
        )
        shares = {row.target: row.damping for row in self.rows if row.damping is not None}
        more = {target: share for target, share in shares.items() if share > 1.5 * DAMPING}
        if not more:
            return starved.strip()
        most = max(more, key=lambda target: more[target])
        return starved + (
            f"{len(more)} of {len(shares)} Hessians were singular on the calibration windows and needed more "
            f"damping than {DAMPING:g} of their mean diagonal, at most {more[most]:g} ({most})."
        )

    def caveat(self) -> str:
        """What to know of the measured perplexity: it is of the calibration's text, or of few windows."""
        data = self.recipe.get("data")
        measured = self.perplexity.get("pruned", {})
        windows = measured.get("windows", ENOUGH)
        sentences = []
        same_text = data == measured.get("data") and data not in DATASETS
        if self.fingerprint and same_text and not self.held_out:
            sentences.append(
                f"{data} has no held-out part. Perplexity was measured on the text of the calibration, "
                "so the result may look better than it is."
            )
        if windows < ENOUGH:
            sentences.append(
                f"Only {windows} windows were measured; intervals from fewer than {ENOUGH} are too narrow."
                if windows > 1
                else "Only one window was measured, so there is no 95 % interval."
            )
        return " ".join(sentences)


def remaining(shape: Mapping[str, Any], widths: bool) -> str:
    """What a layer has after whole units went, in words.

    Args:
        shape: axis -> units. widths: layers differ in their channels.
    """
    where = {"state": " a layer", "head": " a group", "channel": " on average" * widths}
    return ", ".join(f"{size} {axis}{'s' * (size != 1)}{where.get(axis, '')}" for axis, size in shape.items())


def removed_table(
    rows: Iterable[Mapping[str, Any]], totals: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each kind of tensor in a record, one for a family of several kinds.

    The first two columns are words. Beside a kind's share stands that of its least and most pruned tensor.
    The last column, stored bits a weight, is there where something is on a grid.
    """
    rows = list(rows)
    on_grid = any(row.get("bits") is not None for row in rows)
    kinds: dict[str, dict[str, list[Mapping[str, Any]]]] = {family: {} for family in totals}
    for row in rows:
        kinds[row["family"]].setdefault(kind_of(row["target"]), []).append(row)
    cells = []
    for family, parts in kinds.items():
        for kind, same in parts.items():
            by = dict.fromkeys(f"{row['method']}, {row['pattern']}" for row in same)
            entries, pruned = (sum(row[count] for row in same) for count in ("total", "pruned"))
            errors = [e for row in same if (e := relative(row["error"], row["signal"])) is not None]
            cells.append(
                [
                    kind,
                    "; ".join(by),
                    str(len(same)),
                    *_counts(pruned, entries),
                    _range([row["pruned"] / row["total"] for row in same if row["total"]]),
                    number(_mean(errors), ".2e"),
                    *([number(_bits(same), ".3f")] if on_grid else []),
                ]
            )
        if len(parts) > 1:
            total = totals[family]
            counts = _counts(total["pruned"], total["entries"])
            cells.append(
                [f"all {family}", "", str(total["tensors"]), *counts, "", number(total["error"], ".2e")]
                + ([number(total["bits"], ".3f")] if on_grid else [])
            )
    head = ["kind", "method", "tensors", "removed", "of", "sparsity", "range", "relative error"]
    return head + ["bits a weight"] * on_grid, cells


def targets_table(
    rows: Iterable[Mapping[str, Any]], totals: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each row of a record, then one for each family."""
    cells = []
    for row in rows:
        error = number(relative(row["error"], row["signal"]), ".2e")
        by = f"{row['method']}, {row['pattern']}"
        cells.append([row["target"], by, *_counts(row["pruned"], row["total"]), error])
    for family, total in totals.items():
        counts = _counts(total["pruned"], total["entries"])
        cells.append([f"all {family}", "", *counts, number(total["error"], ".2e")])
    return ["target", "method", "removed", "of", "sparsity", "relative error"], cells


def recipe_table(recipe: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each field of a recipe that says something, one for each rule."""
    cells = []
    for name, value in recipe.items():
        if name == "rules":
            lines = ["; ".join(f"{field}: {_words(part)}" for field, part in rule.items()) for rule in value]
            cells += [[f"rule {number}", line] for number, line in enumerate(lines, 1)]
        elif value is not None:
            cells.append([name, _words(value)])
    return ["field", "value"], cells


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
        raise ValueError(f"{path}: not a pruning record ({type(error).__name__}: {error})") from None
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
    """The kind of a tensor by its name: "A_log" of "...mixer.A_log", "in_proj" of "...in_proj.weight",
    "down_proj" of "...experts.down_proj.3", "q_adapter_list" of "...q_adapter_list.0.1.weight"."""
    parts = [part for part in parameter.split(".") if not part.isdigit()] or [parameter]
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


def _bits(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Stored bits a weight, of rows of a record that are all on a grid."""
    bits, entries = [row.get("bits") for row in rows], sum(row["total"] for row in rows)
    return None if None in bits or not entries else sum(filter(None, bits)) / entries


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counts(pruned: int, entries: int) -> list[str]:
    return [str(pruned), str(entries), percent(pruned / entries if entries else 0.0)]


def _range(shares: list[float]) -> str:
    """The smallest and the largest, once if they read the same."""
    low, high = (percent(end(shares, default=None)) for end in (min, max))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
