"""What was asked and what was done, in sentences made of the record.

Place in the flow: between the record and the page's first section.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..record import remaining
from .layers import whole_units
from .words import at, figure, number_at, percent, plainly, table_at

FAMILIES = {
    "projections": "linear layers",
    "ssm": "state matrices (A_log)",
    "conv1d": "convolutions",
    "head": "head",
    "embedding": "embedding",
}
UNITS = {"state": "states", "channel": "channels", "head": "heads", "block": "blocks"}


def asked(record: Mapping[str, Any], fit: Mapping[str, Any] | None) -> str:
    """What the user wanted."""
    told = at(fit, "asked")
    if isinstance(told, str) and told:
        return told
    recipe = table_at(record, "recipe")
    model = recipe.get("model")
    of = f" of {model}" if isinstance(model, str) and model else ""
    if recipe.get("bits") is not None:
        bits = figure(number_at(recipe, "bits"), ".4g")
        return f"Store the matrices{of} in {bits} bits a weight, everything counted."
    pattern, sparsity = recipe.get("pattern"), percent(recipe.get("sparsity"), ".3g")
    if recipe.get("grid") not in (None, "none"):
        also = f", and remove {sparsity} of them" if number_at(recipe, "sparsity") else ""
        return f"Round the weights{of} to the grid {plainly(recipe['grid'])}{also}."
    if pattern == "structured":
        return f"Remove {sparsity} of the parameters{of} as whole units."
    if isinstance(pattern, str) and pattern.startswith("structured:"):
        return f"Remove {' and '.join(_axes(pattern[11:], sparsity))}{of}, whole."
    if isinstance(pattern, str) and pattern not in ("", "unstructured"):
        return f"Remove weights{of} in the pattern {pattern}."
    return (
        f"Remove {sparsity} of the weights{of}."
        if recipe.get("sparsity") is not None
        else f"A smaller form{of}."
    )


def _axes(told: str, sparsity: str) -> list[str]:
    """Of "state" or "state=0.5,block=0.1" what is removed of each."""
    found = []
    for part in told.split(","):
        axis, given, share = part.partition("=")
        with suppress(ValueError):
            sparsity = percent(float(share), ".3g") if given else sparsity
        found.append(f"{sparsity} of the {UNITS.get(axis, axis)}")
    return found


def done(record: Mapping[str, Any]) -> list[str]:
    """What happened, a sentence each."""
    sentences = []
    structure = table_at(record, "structure")
    before, after = (number_at(structure, "parameters", name) for name in ("dense", "pruned"))
    if before and after is not None:
        kept = remaining(table_at(structure, "shape"), at(record, "recipe", "allocation") == "loss")
        more = after > before  # a projected state: nothing is taken out, something is added
        sentences.append(
            f"{figure(after - before, ',.0f')} parameters were added, which project the states."
            if more
            else f"{figure(after, ',.0f')} of {figure(before, ',.0f')} parameters are left"
            + (f"; what remains: {kept}." if kept else ".")
        )
    for family, total in table_at(record, "totals").items():
        sentences.append(_family(family, total, units=whole_units(record)))
    recipe = table_at(record, "recipe")
    calibrated = number_at(recipe, "samples"), number_at(recipe, "length")
    data = recipe.get("data")
    if at(record, "calibration", "sha256") and None not in calibrated and isinstance(data, str):
        count, length = calibrated
        text = f"{figure(count, ',.0f')} windows of {figure(length, ',.0f')} tokens of {data}"
        sentences.append(f"What to keep was decided on {text}, without training.")
    if (seconds := number_at(record, "seconds")) is not None:
        cpu = at(record, "machine", "cpu")
        where = f" on {cpu}" if isinstance(cpu, str) and cpu else ""
        sentences.append(f"That took {_time(seconds)}{where}.")
    return [sentence for sentence in sentences if sentence]


def _family(family: str, total: Any, *, units: bool) -> str:
    share, bits = number_at(total, "sparsity"), number_at(total, "bits")
    if share is None:
        return ""
    if units:
        gone, of = number_at(total, "pruned"), number_at(total, "entries")
        counts = f"{figure(gone, ',.0f')} of {figure(of, ',.0f')}"
        return f"{percent(share)} of the {UNITS.get(family, family)} were removed ({counts})."
    name = FAMILIES.get(family, family)
    stored = "" if bits is None else f", stored in {figure(bits, '.2f')} bits a weight"
    return (
        f"In the {name}, {percent(share)} of the weights are zero{stored}."
        if family != "ssm"
        else (f"In the {name}, {percent(share)} of the entries were removed{stored}.")
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return figure(seconds, ".0f", "s")
    return figure(seconds / 60, ".0f", "min") if seconds < 5400 else figure(seconds / 3600, ".1f", "h")
