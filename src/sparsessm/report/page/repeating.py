"""What was not tested, and how to repeat what was: the end of the page.

Place in the flow: between `parts.py` and the whole page.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .markup import Content, Safe, plain, tag
from .measured import Measured
from .parts import Number, folded, listed, section, table
from .words import (
    at,
    figure,
    number_at,
    plainly,
    table_at,
)


def untested(record: Mapping[str, Any], measured: Measured, perplexity: Mapping[str, Any]) -> Safe:
    """What the figures do not say."""
    found = [str(sentence) for sentence in measured.missing]
    data = at(perplexity, "pruned", "data")
    windows = number_at(perplexity, "pruned", "windows")
    if isinstance(data, str) and data:
        found.append(f"Text of another kind than {data} may lose more: only that was measured.")
    if windows is not None and windows < 16:
        found.append(
            f"Only {figure(windows, '.0f')} windows were measured; from fewer than 16, intervals are narrow."
        )
    if measured.speed:
        found.append(
            "Speed was measured for one sequence, on this machine alone; other processors and batches differ."
        )
    found.append("Nobody read the texts that the model writes, and its safety was not looked at.")
    return section("untested", "What was not tested", listed(found))


def repeat(record: Mapping[str, Any], measured: Measured, directory: str) -> Safe:
    """The recipe, the machine and the commands."""
    recipe = [
        [name, plainly(value)] for name, value in table_at(record, "recipe").items() if value is not None
    ]
    facts: list[list[Content | Number]] = []
    for title, found in (("", table_at(record, "machine")), ("version of ", table_at(record, "versions"))):
        for name, value in found.items():
            facts.append([f"{title}{name}", plainly(value)])
    for title, value in (
        ("SHA-256 of the calibration tokens", at(record, "calibration", "sha256")),
        ("SHA-256 of the weights and config.json", measured.weights),
        ("compared with", measured.against),
        ("measured on", measured.day),
    ):
        if isinstance(value, str) and value:
            facts.append([title, value])
    file = shlex.quote(plain(f"{directory}/pruning.json"))
    commands = f"sparsessm prune --recipe {file} -o again\nsparsessm report again"
    again = (
        "The first command makes the pruned model again (one that was packed later is packed again), the "
        "second such a page. On the same machine with the same number of threads the result is the same."
    )
    before = at(record, "pruned_before") is True
    return section(
        "repeat",
        "How to repeat it",
        tag("pre", commands, keep="\n", class_="command", tabindex=0),
        tag("p", again),
        tag("p", "The model had been pruned before in memory, so the recipe alone does not repeat it.")
        if before
        else None,
        table("Recipe", ["field", "value"], recipe, words=2, sorts=False),
        folded(
            "Machine and versions",
            table("Machine and versions", ["what", "value"], facts, words=2, sorts=False),
        ),
    )
